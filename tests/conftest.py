"""Eight simulated CPU devices for the whole session; a test that sets no mesh runs on the first.

Through the config and not XLA_FLAGS: a program that a test starts keeps its one device.
"""

import jax

if jax.config.jax_platforms in (None, "", "cpu"):
    jax.config.update("jax_num_cpu_devices", 8)
