"""Joining the other processes of a job of several hosts."""

import os

import jax


def start_distributed() -> None:
    """Join the other processes where something has started this as one of several.

    Slurm, Open MPI, Cloud TPU and GKE are recognised by JAX; elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say it.
    """
    several = lambda name: int(os.environ.get(name, "1") or 1) > 1
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if (
        "JAX_COORDINATOR_ADDRESS" in os.environ
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or several("SLURM_NTASKS")
        or several("OMPI_COMM_WORLD_SIZE")
        or len(hosts) > 1
    ):
        number = lambda name: int(os.environ[name]) if name in os.environ else None
        # A process that died is noticed within half a minute, and the others end with an error.
        jax.distributed.initialize(
            num_processes=number("JAX_NUM_PROCESSES"),
            process_id=number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=30,
        )
