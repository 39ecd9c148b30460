"""Runs Python programs that a model has written, isolated from the machine.

A program runs in its own namespaces of Linux, made by bubblewrap or ``unshare``: it has no network,
reads only Python's standard library, writes only to an empty ``/tmp``, and cannot see or outlive
other processes. ``sandbox_worker`` sets the other limits inside.
"""

import functools
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

_WORKER = Path(__file__).with_name("sandbox_worker.py")
_TMP_BYTES = 64 << 20
_ANSWER_BYTES = 4096
_ENVIRONMENT = {
    "HOME": "/tmp", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
}  # fmt: skip


class Outcome(NamedTuple):
    """What became of a program."""

    passed: bool
    detail: str
    """the exception or the limit that ended it; "" if it passed"""


def run_python(program: str, tests: str = "", *, seconds: float, memory_bytes: int) -> Outcome:
    """Run a program, then its tests in the same namespace, isolated from the machine.

    A program passes if both end without an exception and if it fails in a second run with a test
    that always fails, so one that ends early or reports success itself does not. This catches
    accidents, not intent: the tests run in the program's process, where it could read them.

    Args:
      program: Python source that nobody has checked.
      tests: Python source that raises an exception if the program is wrong.
      seconds: limit of CPU time, rounded up; the limit of elapsed time is three times as long.
      memory_bytes: limit of the address space; files in /tmp have 64 MiB more.

    Raises:
      ValueError: no sandbox works on this machine.
    """
    run = functools.partial(_run, _tool(), program, seconds=seconds, memory_bytes=memory_bytes)
    outcome = run(tests)
    if outcome.passed and run(f"{tests}\nraise AssertionError").passed:
        return Outcome(False, "it reports success whatever the tests are")
    return outcome


def run_all(
    programs: Sequence[tuple[str, str]], *, seconds: float, memory_bytes: int
) -> list[Outcome]:
    """:func:`run_python` of programs and their tests, as many at a time as there are CPUs.

    Args:
      programs: pairs of a program and its tests; equal pairs run once.
      seconds: as for :func:`run_python`.
      memory_bytes: as for :func:`run_python`.
    """
    run = lambda pair: run_python(*pair, seconds=seconds, memory_bytes=memory_bytes)
    distinct = list(dict.fromkeys(programs))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = tqdm(pool.map(run, distinct), "programs", len(distinct), disable=None)
        outcomes = dict(zip(distinct, done, strict=True))
    return [outcomes[pair] for pair in programs]


def sandbox_name() -> str:
    """What isolates the programs, with its version.

    Raises:
      ValueError: no sandbox works on this machine.
    """
    tool = _tool()
    done = subprocess.run([tool, "--version"], capture_output=True, text=True)
    return " ".join(done.stdout.split()) or tool


def _run(tool: str, program: str, tests: str, *, seconds: float, memory_bytes: int) -> Outcome:
    """Run a program once."""
    cpu_seconds = math.ceil(seconds)
    elapsed_seconds = 3 * cpu_seconds
    token = secrets.token_hex()
    request = json.dumps(
        {"program": program, "tests": tests, "token": token, "seconds": cpu_seconds,
         "memory_bytes": memory_bytes}
    )  # fmt: skip
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryDirectory() as folder:
        stdin.write(request.encode())
        stdin.seek(0)
        with subprocess.Popen(
            _COMMANDS[tool](folder), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd="/", env=_ENVIRONMENT, start_new_session=True,  # kill(0, ...) reaches its group
        ) as process:  # fmt: skip
            late = threading.Timer(elapsed_seconds, process.kill)
            late.start()
            try:
                answer = process.stdout.read(_ANSWER_BYTES)  # type: ignore[union-attr]
            finally:
                late.cancel()
                process.kill()  # and with it all processes of the sandbox
    if answer == token.encode():
        return Outcome(True, "")
    text = "".join(c if c.isprintable() else " " for c in answer.decode(errors="replace"))[:200]
    if text.startswith("!"):
        return Outcome(False, text[1:].rstrip())
    limits = f"{cpu_seconds} s of CPU time, {elapsed_seconds} s of elapsed time"
    return Outcome(False, f"it ended itself or reached a limit ({limits}) {text}".rstrip())


@functools.cache
def _tool() -> str:
    """The first tool that works here: a container may forbid namespaces."""
    reasons = []
    for tool in _COMMANDS:
        if not (reason := _unusable(tool)):
            return tool
        reasons.append(f"{tool} {reason}")
    raise ValueError(
        "generated code runs only in a sandbox, and none works here: install bubblewrap (apt "
        f"install bubblewrap) and allow user namespaces; {'; '.join(reasons)}"
    )


def _unusable(tool: str) -> str:
    """Why a tool does not work here; "" if it does."""
    if not shutil.which(tool):
        return "is not installed"
    outcome = _run(tool, "pass", "pass", seconds=10, memory_bytes=1 << 30)
    return "" if outcome.passed else f"fails: {outcome.detail}"


def _bubblewrap(folder: str) -> list[str]:
    """The command line of the worker; the folder is not used."""
    shown = [argument for path in _visible() for argument in ("--ro-bind", path, path)]
    return [
        shutil.which("bwrap") or "", "--unshare-all", "--die-with-parent", "--new-session",
        "--cap-drop", "ALL", "--size", str(_TMP_BYTES), "--tmpfs", "/tmp", *shown,
        "--remount-ro", "/", "--", *_worker(),
    ]  # fmt: skip


def _unshare(folder: str) -> list[str]:
    """The command line of the worker, which gets the empty folder as its root."""
    return [
        shutil.which("setpriv") or "", "--pdeathsig", "KILL", shutil.which("unshare") or "",
        "--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup",
        "--fork", "--kill-child", "/bin/sh", "-c", _MOUNT, "sh", folder, *_visible(), "--",
        *_worker(),
    ]  # fmt: skip


_COMMANDS = {"bwrap": _bubblewrap, "unshare": _unshare}

# Arguments: the folder, the paths that are visible in it, "--", and the command.
_MOUNT = f"""
set -eu
root=$1; shift
mount -t tmpfs -o mode=755 none "$root"
mkdir "$root/tmp"
mount -t tmpfs -o nosuid,nodev,size={_TMP_BYTES} none "$root/tmp"
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$root${{1%/*}}"; : > "$root$1"; fi
  mount --rbind "$1" "$root$1"
  shift
done
shift
while read -r _ _ _ _ place _; do
  case $place in
    "$root/tmp") ;;
    "$root" | "$root"/*) mount -o remount,bind,ro "$place" ;;
  esac
done < /proc/self/mountinfo
exec chroot "$root" "$@"
"""


def _worker() -> list[str]:
    return [_python(), "-s", "-S", "-c", _WORKER.read_text()]


def _python() -> str:
    """The interpreter, outside of any virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@functools.cache
def _visible() -> list[str]:
    """Paths that Python needs: itself, the standard library, and shared libraries."""
    paths = [_python(), "/etc/ld.so.cache", sysconfig.get_path("stdlib")]
    for prefix in ("/", "/usr", sys.base_prefix, sys.base_exec_prefix):
        paths += [os.path.join(prefix, name) for name in ("lib", "lib64")]
    paths = [path for path in dict.fromkeys(paths) if os.path.exists(path)]
    return [path for path in paths if not any(str(up) in paths for up in Path(path).parents)]
