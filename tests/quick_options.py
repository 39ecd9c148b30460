"""XLA options with which small programs for a CPU compile in less than half the time."""

import jax

# The older generator of code for fused operations. Later releases of XLA do not have it.
OPTIONS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
"""the same for the environment variable XLA_FLAGS"""
