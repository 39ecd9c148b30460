"""Joining the processes of a job: launcher variables, missing values, and no separate training."""

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from llama_jax.config import ConfigError
from llama_jax.train import distributed, failure
from llama_jax.train.__main__ import main
from llama_jax.train.distributed import Job, JoinError, find_job, start_distributed

ROOT = Path(__file__).parents[2]
PREFIXES = ("JAX_", "SLURM", "OMPI", "PMI_", "TPU_", "MEGASCALE", "KUBERNETES", "JOB_COMPLETION")
HAND = dict(JAX_COORDINATOR_ADDRESS="h:1", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="2")
SLURM = dict(
    SLURM_JOB_ID="5000", SLURM_NTASKS="4", SLURM_PROCID="3", SLURM_LOCALID="0",
    SLURM_STEP_NODELIST="node[001-004]", SLURM_STEP_TASKS_PER_NODE="1(x4)",
)  # fmt: skip
MPI = dict(
    OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_LOCAL_RANK="1",
    OMPI_COMM_WORLD_LOCAL_SIZE="2",
    OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
)  # fmt: skip
POD = dict(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="1")


@pytest.fixture
def env(monkeypatch):
    """Set the given launcher variables and remove all others."""

    def use(variables: dict[str, str]) -> None:
        for name in [n for n in os.environ if n.startswith(PREFIXES)]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    use({})
    return use


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        (HAND, Job("JAX variables", "h:1", 4, 2)),
        (HAND | dict(JAX_NUM_PROCESSES="1"), None),
        # srun: all GPUs of a host for a task alone on it, else one each.
        (SLURM, Job("Slurm", "node001:62344", 4, 3)),
        (SLURM | dict(SLURM_STEP_NODELIST="a7,b[1-3]"), Job("Slurm", "a7:62344", 4, 3)),
        (SLURM | dict(SLURM_STEP_NODELIST="n[07,09-11],b"), Job("Slurm", "n07:62344", 4, 3)),
        (
            SLURM | dict(SLURM_STEP_TASKS_PER_NODE="2(x2)", SLURM_LOCALID="1"),
            Job("Slurm", "node001:62344", 4, 3, 1),
        ),
        (SLURM | dict(JAX_COORDINATOR_PORT="99"), Job("Slurm", "node001:99", 4, 3)),
        (SLURM | dict(JAX_COORDINATOR_ADDRESS="h:7"), Job("Slurm", "h:7", 4, 3)),
        (SLURM | dict(SLURM_NTASKS="1"), None),
        (SLURM | dict(JAX_NUM_PROCESSES="1"), None),
        (dict(SLURM_NTASKS="4") | HAND, Job("JAX variables", "h:1", 4, 2)),
        (MPI, Job("Open MPI", "10.96.0.1:62624", 4, 1, 1)),
        (MPI | dict(JAX_COORDINATOR_ADDRESS="h:7"), Job("Open MPI", "h:7", 4, 1, 1)),
        (MPI | dict(OMPI_COMM_WORLD_SIZE="1"), None),
        (dict(TPU_WORKER_HOSTNAMES="a,b"), Job("Cloud TPU")),
        (dict(TPU_PROCESS_ADDRESSES="a:1,b:1"), Job("Cloud TPU")),
        (dict(TPU_WORKER_HOSTNAMES="localhost"), None),
        (dict(MEGASCALE_COORDINATOR_ADDRESS="a"), Job("Cloud TPU")),
        # The manifest gives two variables, Kubernetes the index.
        (
            POD | dict(JAX_COORDINATOR_ADDRESS="job-0.svc:1", JAX_NUM_PROCESSES="2"),
            Job("JAX variables", "job-0.svc:1", 2, 1),
        ),
        (POD | dict(JAX_NUM_PROCESSES="1"), None),
        (dict(KUBERNETES_SERVICE_HOST="10.0.0.1"), None),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_launcher_variables(env, variables, job):
    env(variables)
    assert find_job() == job


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(JAX_COORDINATOR_ADDRESS="h:1"), "without JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (dict(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0"), "without JAX_COORDINATOR_ADDRESS:"),
        (dict(JAX_COORDINATOR_ADDRESS="h:1", JAX_NUM_PROCESSES="2"), "without JAX_PROCESS_ID:"),
        (HAND | dict(JAX_PROCESS_ID="4"), "JAX_PROCESS_ID=4 is not one of JAX_NUM_PROCESSES=4"),
        (HAND | dict(JAX_NUM_PROCESSES="two"), "JAX_NUM_PROCESSES='two' is not a whole number"),
        (HAND | dict(JAX_COORDINATOR_ADDRESS="host0"), "'host0' is not of the form HOST:PORT"),
        (HAND | dict(JAX_COORDINATOR_ADDRESS="h:1x"), "'h:1x' is not of the form HOST:PORT"),
        # In a shell of salloc, and in a batch script: no step.
        (dict(SLURM_NTASKS="2"), "was not started by srun"),
        (dict(SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_JOB_ID="1"), "was not started by srun"),
        (MPI | dict(OMPI_MCA_orte_hnp_uri=""), "set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        (dict(PMI_SIZE="2", PMI_RANK="0"), "PMI_SIZE=2: this MPI does not say"),
        (POD, "this is pod 1 of an indexed Kubernetes Job"),
        (dict(TPU_WORKER_HOSTNAMES="a,b", TPU_WORKER_ID="0"), "Cloud TPU says that this is one of"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_one_of_several_that_cannot_join_is_an_error(env, variables, message, capsys):
    """One line and an exit code, and nothing is trained."""
    env(variables)
    assert main([]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_pod_asks_its_cluster(env, monkeypatch):
    """With package kubernetes JAX finds the others; what it says is passed on."""
    env(POD)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    start_distributed()
    ((args, settings),) = calls
    assert args == (None, None, None)
    assert "cluster_detection_method" not in settings

    def refuse(*args, **kwargs):
        raise RuntimeError("Kubernetes API Error: 403 - Forbidden\nIt appears that")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ConfigError, match="403 - Forbidden; set JAX_COORDINATOR_ADDRESS"):
        start_distributed()


@pytest.fixture
def platforms():
    """Sets the platforms that JAX may use, as JAX_PLATFORMS does."""
    before = jax.config.values["jax_platforms"]
    yield lambda names: jax.config.update("jax_platforms", names)
    jax.config.update("jax_platforms", before)


def test_a_tpu_vm_always_asks_its_metadata_server(env, monkeypatch, platforms):
    """As Cloud TPU VMs set no variables; without an answer, more hosts than one are an error."""
    from jax._src import cloud_tpu_init

    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    platforms("cpu")
    assert find_job() is None  # this process uses its CPU
    platforms(None)
    assert find_job() == Job("Cloud TPU")
    platforms("cpu")
    monkeypatch.setattr(distributed, "_is_tpu_vm", lambda: True)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
    start_distributed()
    assert calls == [(None, None, None)]

    def nothing(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    start_distributed()  # one host
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match="this TPU slice has 4 hosts"):
        start_distributed()


def test_a_laptop_makes_no_network_request(env, monkeypatch):
    def network(*args, **kwargs):
        raise AssertionError(f"the network: {args}")

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, network)
    monkeypatch.setattr(jax.distributed, "initialize", network)
    start_distributed()


def test_a_coordinator_that_does_not_resolve(env, monkeypatch):
    monkeypatch.setattr(distributed, "RESOLVE_SECONDS", 0.1)
    env(HAND | dict(JAX_COORDINATOR_ADDRESS="no-such-host.invalid:1234"))
    with pytest.raises(JoinError, match=r"no-such-host.invalid does not resolve after 0.1 s"):
        start_distributed()
    assert main([]) == 75  # the same command may succeed later
    # A name that resolves a little later is not an error.
    monkeypatch.setattr(distributed, "RESOLVE_SECONDS", 2)
    answers = iter([OSError("not yet"), []])

    def resolve(*args):
        if isinstance(answer := next(answers), OSError):
            raise answer

    monkeypatch.setattr(distributed.time, "sleep", lambda _: None)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
    start_distributed()
    assert calls == [("no-such-host.invalid:1234", 4, 2)]


def test_a_port_in_use(env):
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        env(HAND | dict(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_PROCESS_ID="0"))
        with pytest.raises(ConfigError, match=f"port {port} of this host cannot be used"):
            start_distributed()


CODE = """
from llama_jax.train import distributed
distributed.JOIN_SECONDS = 2
distributed.start_distributed()
"""


def test_processes_that_never_join():
    """Two real processes: one error line each within the time limit, no C++ stack trace."""
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        ports = a.getsockname()[1], b.getsockname()[1]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(PREFIXES)}
    clean |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_NUM_PROCESSES": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CODE], stderr=subprocess.PIPE, text=True,
            env=clean | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PROCESS_ID": str(i)},
        )
        for i, port in enumerate(ports)
    ]  # fmt: skip
    said = ["the other processes did not join within 2 s", "no answer, or another process is"]
    began = time.monotonic()
    for i, (process, port) in enumerate(zip(running, ports, strict=True)):
        _, error = process.communicate(timeout=60)
        assert process.returncode == 75, error
        (line,) = [x for x in error.splitlines() if x.startswith("error: ")]
        assert f"process {i} of 2, coordinator 127.0.0.1:{port}" in line
        assert said[i] in line
        assert "@  " not in error
    assert time.monotonic() - began < 45


def test_a_connection_of_something_else_is_closed(monkeypatch):
    """A stranger that sends without end does not fill the memory of process 0."""
    peers = queue.SimpleQueue()
    client = SimpleNamespace(key_value_set=lambda name, value, allow_overwrite: peers.put(value))
    monkeypatch.setattr(failure, "_state", lambda: SimpleNamespace(client=client))
    monkeypatch.setattr(failure, "_done", threading.Event())
    thread = threading.Thread(target=failure._accept, daemon=True)
    thread.start()
    port, _ = peers.get(timeout=10).split()
    address = ("localhost", int(port))
    with socket.create_connection(address, 10) as stranger, pytest.raises(ConnectionError):
        stranger.sendall(b"x" * 50_000_000)
    failure._done.set()
    thread.join(10)
