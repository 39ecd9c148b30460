"""XLA options with which small programs for a CPU compile in less than half the time."""

import jax

# The older generator of code for fused operations, which later releases of XLA do not have, and one
# LLVM module per program: splitting it for several threads costs more than it saves here.
OPTIONS: dict[str, bool | int] = (
    {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    if jax.__version_info__ < (0, 11)
    else {}
)
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
"""the same for the environment variable XLA_FLAGS"""
