"""Joins the processes of a multi-host job, and combines their requests to stop.

Each launcher sets environment variables (on a Cloud TPU VM: values of its metadata server) with the
number of processes of the job and the index of this one. A process that is one of several joins the
others or ends with an error. It never trains alone: separate processes would overwrite each other's
checkpoints.

  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID   set by the user; take precedence
  Slurm (srun), Open MPI                                       their own variables
  Cloud TPU VMs, GKE with TPUs                                 detected by JAX
  indexed Kubernetes Jobs, JobSets                             detected by JAX (package kubernetes)

With JAX_NUM_PROCESSES=1 this process runs alone, whatever the launcher's variables say.
"""

import importlib.util
import os
import re
import socket
import sys
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import ConfigError
from llama_jax.model.sharding import AXES, slice_of_process
from llama_jax.train import failure
from llama_jax.train.failure import EXIT_CODE

RESOLVE_SECONDS = 60
"""How long to wait until the coordinator's name resolves (DNS learns of a new pod late)."""
JOIN_SECONDS = 300
"""How long the processes wait for each other."""
HEARTBEAT_SECONDS = 50
"""JAX ends the job this long after the last heartbeat of a process; `failure` is usually faster."""

_JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class JoinError(ConfigError):
    """A process of the job is missing; the same job may succeed when it is started again."""


class Job(NamedTuple):
    """This process in its job; JAX detects the fields that are None."""

    launcher: str
    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    process_id: int | None = None
    local_id: int | None = None
    """The GPU of this process, if its host runs several processes; None: all GPUs of the host."""


def start_distributed() -> None:
    """Join the other processes, if this is one of several.

    Raises:
      ConfigError: the environment is incomplete.
      JoinError: the other processes cannot be reached.
    """
    job = find_job()
    if job is None:
        return
    _join(job)
    _share_slices()
    alone = job.launcher == "Cloud TPU" and not jax.distributed.is_initialized()
    # JAX knows the number of hosts of a TPU slice even if they were not joined.
    if alone and jax.process_count() > 1:
        raise ConfigError(
            f"this TPU slice has {jax.process_count()} hosts, and its metadata server did not "
            f"provide what is needed to join them; set {', '.join(_JAX_VARIABLES)} on each"
        )


def find_job() -> Job | None:
    """This process as described by the environment; None if it runs alone.

    Raises:
      ConfigError: it is one of several, and a value is missing or invalid.
    """
    if os.environ.get("JAX_NUM_PROCESSES") == "1":
        return None
    found = _slurm() or _open_mpi() or _tpu() or _kubernetes()
    if not any(name in os.environ for name in _JAX_VARIABLES):
        return found
    return _from_jax_variables(found)


def _from_jax_variables(found: Job | None) -> Job | None:
    """The JAX variables, completed by those of the detected launcher."""
    job = found or Job("JAX variables")
    index = os.environ.get("JOB_COMPLETION_INDEX", "")
    process_id = int(index) if index.isdigit() else job.process_id
    job = job._replace(
        coordinator=os.environ.get("JAX_COORDINATOR_ADDRESS") or job.coordinator,
        num_processes=_number("JAX_NUM_PROCESSES", job.num_processes),
        process_id=_number("JAX_PROCESS_ID", process_id),
    )
    values = (job.coordinator, job.num_processes, job.process_id)
    missing = [name for name, value in zip(_JAX_VARIABLES, values, strict=True) if value is None]
    if missing and job.launcher != "Cloud TPU":
        given = ", ".join(f"{n}={os.environ[n]}" for n in _JAX_VARIABLES if n in os.environ)
        raise ConfigError(
            f"{given} without {' and '.join(missing)}: set all three for a job of several "
            "processes, none for one process"
        )
    if missing:  # JAX detects the others
        return job
    assert job.num_processes is not None
    assert job.process_id is not None
    if not 0 <= job.process_id < job.num_processes:
        raise ConfigError(
            f"JAX_PROCESS_ID={job.process_id} is not one of JAX_NUM_PROCESSES="
            f"{job.num_processes} processes, which are numbered from 0"
        )
    return job


def _number(name: str, default: int | None = None) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"\d{1,9}", text):
        raise ConfigError(f"{name}={text!r} is not a whole number")
    return int(text)


def _slurm() -> Job | None:
    """A task of `srun`; the first task of the first node is the coordinator."""
    tasks = _number("SLURM_NTASKS", 1) or 1
    if tasks == 1 or ("JAX_COORDINATOR_ADDRESS" in os.environ and "SLURM_PROCID" not in os.environ):
        return None
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes is None or "SLURM_PROCID" not in os.environ:
        raise ConfigError(
            f"SLURM_NTASKS={tasks}, but this process was not started by srun: start all {tasks} "
            "with `srun python -m llama_jax.train ...`, or one alone with JAX_NUM_PROCESSES=1"
        )
    # "node[001-004,007],other" -> node001. All tasks know the job id, which determines the port.
    first = re.sub(r"\[(\w+).*", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])
    port = os.environ.get("JAX_COORDINATOR_PORT")
    port = port or str(61440 + (_number("SLURM_JOB_ID", 0) or 0) % 4096)
    here = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    several = int(here[0]) > 1 if here else False
    local = _number("SLURM_LOCALID") if several else None
    return Job("Slurm", f"{first}:{port}", tasks, _number("SLURM_PROCID"), local)


def _open_mpi() -> Job | None:
    """A process of `mpirun`. Open MPI 4 provides the address of the first host; others do not."""
    known = ("JAX_COORDINATOR_ADDRESS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE")
    if (_number("PMI_SIZE", 1) or 1) > 1 and not any(name in os.environ for name in known):
        raise ConfigError(
            f"PMI_SIZE={os.environ['PMI_SIZE']}: this MPI does not say where its first process "
            f"runs; set {', '.join(_JAX_VARIABLES)}"
        )
    size = _number("OMPI_COMM_WORLD_SIZE", 1) or 1
    if size == 1:
        return None
    several = (_number("OMPI_COMM_WORLD_LOCAL_SIZE", 1) or 1) > 1
    local = _number("OMPI_COMM_WORLD_LOCAL_RANK") if several else None
    uri = os.environ.get("OMPI_MCA_orte_hnp_uri", "")  # noqa: SIM112
    found = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if found:
        host = found[2] or f"[{found[3]}]"
        coordinator = coordinator or f"{host}:{61440 + int(found[1]) // 4096 % 4096}"
    if coordinator is None:
        raise ConfigError(
            f"OMPI_COMM_WORLD_SIZE={size}: this Open MPI does not say where its first process "
            "runs; set JAX_COORDINATOR_ADDRESS=HOST:PORT, as in mpirun -x JAX_COORDINATOR_ADDRESS"
        )
    return Job("Open MPI", coordinator, size, _number("OMPI_COMM_WORLD_RANK"), local)


def _tpu() -> Job | None:
    """A TPU host: JAX reads the variables of GKE, or asks the metadata server of a Cloud TPU VM."""
    # Only on machines with TPU chips: a laptop must not wait for the network.
    return Job("Cloud TPU") if _tpu_hosts() > 1 or _is_tpu_vm() else None


def _is_tpu_vm() -> bool:
    platforms = (jax.config.values["jax_platforms"] or "").split(",")
    if platforms != [""] and "tpu" not in platforms:
        return False
    from jax._src import cloud_tpu_init  # not public elsewhere

    return cloud_tpu_init.running_in_cloud_tpu_vm


def _kubernetes() -> Job | None:
    """A pod of an indexed Job (also of a JobSet)."""
    index = os.environ.get("JOB_COMPLETION_INDEX")
    if index is None or "KUBERNETES_SERVICE_HOST" not in os.environ:
        return None
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        return None
    if importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            f"this is pod {index} of an indexed Kubernetes Job, and it cannot join the other pods "
            "without an address: set JAX_COORDINATOR_ADDRESS=JOB-0.SERVICE:1234 and "
            "JAX_NUM_PROCESSES in its manifest, or pip install 'jax[k8s]' and give it a service "
            "account that may read pods; for a Job of one pod set JAX_NUM_PROCESSES=1"
        )
    return Job("Kubernetes")


# Joining -----------------------------------------------------------------------------------------


def _join(job: Job) -> None:
    if job.coordinator is not None:
        _check_coordinator(job.coordinator, job.process_id == 0)
    known = None not in (job.coordinator, job.num_processes, job.process_id)
    settings: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    if known:  # JAX would give a Slurm task one GPU even if it is alone on its host
        settings["cluster_detection_method"] = "deactivate"
        settings["local_device_ids"] = None if job.local_id is None else [job.local_id]
    # Earlier than JAX's own timeout, which aborts the process with a C++ stack trace.
    timer = threading.Timer(JOIN_SECONDS, _give_up, [job])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            job.coordinator,
            job.num_processes,
            job.process_id,
            initialization_timeout=JOIN_SECONDS + 60,
            **settings,
        )
    except Exception as e:
        lone_tpu = job == Job("Cloud TPU") and _tpu_hosts() < 2
        if not lone_tpu:
            reason = str(e).strip().split("\n")[0]
            raise ConfigError(
                f"{job.launcher} says that this is one of several processes, but joining them "
                f"failed: {reason}; set {', '.join(_JAX_VARIABLES)} yourself"
            ) from e
    finally:
        timer.cancel()


def _share_slices() -> None:
    """Record the slice of each process of a job on CPUs, where JAX ignores JAX_PARTITION_INDEX.

    Such a job simulates one on several TPU slices.
    """
    if not failure.several() or jax.config.values["jax_platforms"] != "cpu":
        return
    slices = failure.values(_number("JAX_PARTITION_INDEX"), range(jax.process_count()))
    if None in slices and len(set(slices)) > 1:
        raise ConfigError(f"JAX_PARTITION_INDEX of the processes: {slices}; set it in all or none")
    slice_of_process.update({p: i for p, i in enumerate(slices) if i is not None})


def _tpu_hosts() -> int:
    """Hosts named by the environment; 0 if only a metadata server could name them."""
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    hosts = next((os.environ[n] for n in names if os.environ.get(n)), "")
    many = "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    return 2 if many else hosts.count(",") + bool(hosts)


def _check_coordinator(address: str, first: bool) -> None:
    """Check that the name resolves and, in process 0, that the port is free; JAX would abort."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"coordinator {address!r} is not of the form HOST:PORT")
    end = time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
            break
        except OSError as e:
            if time.monotonic() > end:
                raise JoinError(
                    f"coordinator {address}: the name {host} does not resolve after "
                    f"{RESOLVE_SECONDS} s ({e.strerror or e})"
                ) from e
            time.sleep(min(2, RESOLVE_SECONDS))
    if first:
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("", int(port)))
            except OSError as e:
                raise ConfigError(
                    f"coordinator {address}: port {port} of this host cannot be used "
                    f"({e.strerror}); use another port"
                ) from e


def _give_up(job: Job) -> None:
    """End this process: it is blocked in JAX's C++ code, which exceptions cannot interrupt."""
    where = job.coordinator or f"found by {job.launcher}"
    who = "the other processes did not join"
    if job.process_id != 0:
        who = "no answer, or another process is missing"
    print(
        f"error: process {job.process_id} of {job.num_processes}, coordinator {where}: {who} "
        f"within {JOIN_SECONDS} s; start all of them together, and open the port to them",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_CODE)


# Stopping together -------------------------------------------------------------------------------


SAVE, STOP = 1, 2
"""Requests to :func:`exchange`; a run that stops saves too."""


def exchange(request: int, seconds: float, mesh: Mesh) -> tuple[jax.Array | int, Any]:
    """The highest request of any process of the job, and a number of every process.

    All processes must call this between the same two training steps, and get the same answer, so
    that all of them save or stop after the same step. The answer of several processes are arrays:
    they are computed on the devices in order with the steps, and reading them waits for the step
    before.

    JAX's own ``multihost_utils.reached_preemption_sync_point`` cannot be used: it reacts to SIGTERM
    only, through a handler that replaces ours, and not to Ctrl-C.

    Args:
      request: of this process: 0 none, :data:`SAVE`, :data:`STOP`.
      seconds: of this process.
      mesh: the devices of all processes.

    Returns:
      The highest request, and the seconds of the process of each device; None for one process.
    """
    if jax.process_count() == 1:
        return request, None
    row = np.array([[request, seconds]], np.float32)
    rows = jax.make_array_from_callback((mesh.size, 2), NamedSharding(mesh, P(AXES)), lambda _: row)
    return combine(rows)


@jax.jit
def combine(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest request, and all seconds, on every device."""
    return jnp.max(rows[:, 0]), jax.sharding.reshard(rows[:, 1], P())
