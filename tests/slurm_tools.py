"""A Slurm cluster of two nodes on this machine, for tests, from unpacked Debian packages.

    with slurm_tools.cluster(folder) as environment:
        subprocess.run(["sbatch", ...], env=environment)

Nothing is installed and root is not needed. The daemons write to ``folder`` only; authentication is
off, and they listen on free ports of this machine.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "slurm-client", "slurmctld", "slurmd", "slurm-wlm-basic-plugins", "libmunge2", "libhwloc15",
    "liblua5.1-0",
)  # fmt: skip
HOST = os.uname().nodename
NODES = (HOST, f"{HOST}-2")
"""The name of the first node resolves; Slurm sorts them."""
PARTITION = "all"
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
PluginDir={libraries}/slurm-wlm
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_min_interval=0,sched_interval=1,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
{nodes}
PartitionName={partition} Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"


class Unavailable(Exception):
    """Why Slurm cannot run here."""


def unpack(folder: Path) -> Path:
    """Downloads Debian's packages of Slurm and unpacks them; returns the folder of the files."""
    root = folder / "root"
    if not all(map(shutil.which, ("apt-get", "dpkg"))):
        raise Unavailable("apt-get and dpkg, which fetch Slurm's packages, are not on this machine")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "download", "-q", *PACKAGES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"Slurm's packages cannot be downloaded: {done.stderr.strip()[-300:]}")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    return root


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A running cluster; gives the environment in which Slurm's commands use it.

    Raises:
      Unavailable: Slurm cannot be fetched or does not start.
    """
    root = unpack(folder / "packages")
    (libraries,) = {path.parent for path in (root / "usr/lib").glob("*/slurm-wlm")}
    sockets = [socket.socket() for _ in range(1 + len(NODES))]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    port, *ports = (s.getsockname()[1] for s in sockets)
    for s in sockets:
        s.close()
    config = CONFIG.format(
        host=HOST,
        user=getpass.getuser(),
        libraries=libraries,
        port=port,
        folder=folder,
        nodes="\n".join(
            NODE.format(name=name, host=HOST, port=p) for name, p in zip(NODES, ports, strict=True)
        ),
        partition=PARTITION,
        names=",".join(NODES),
    )
    (folder / "slurm.conf").write_text(config)
    for name in ("state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    environment = {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{root}/usr/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{libraries}:{libraries}/slurm-wlm",
    }
    sbin = root / "usr/sbin"
    stepd = ["-d", str(sbin / "slurmstepd-wlm")]
    commands = [[str(sbin / "slurmctld-wlm"), "-D", "-i"]]
    commands += [[str(sbin / "slurmd-wlm"), "-D", "-N", node, *stepd] for node in NODES]
    daemons = [
        subprocess.Popen(c, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for c in commands
    ]
    try:
        _wait_until_idle(folder, environment, daemons)
        yield environment
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _wait_until_idle(
    folder: Path, environment: dict[str, str], daemons: list[subprocess.Popen]
) -> None:
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    for _ in range(300):
        states = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
        if states.split() == ["idle"] * len(NODES):
            return
        if any(daemon.poll() is not None for daemon in daemons):
            break
        time.sleep(0.2)
    logs = "\n".join(f"{p.name}: {p.read_text()[-500:]}" for p in sorted(folder.glob("*.log")))
    raise Unavailable(f"Slurm does not start: nodes {states.split()}\n{logs}")
