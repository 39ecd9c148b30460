"""Experiment trackers beside TensorBoard (``train.trackers``): Weights & Biases and MLflow.

Each tracker has a process of its own (``tracker_worker.py``). If its server does not respond or its
library fails, that process is ended with a warning, and the run continues without delay.
"""

import base64
import collections
import contextlib
import importlib.metadata
import importlib.util
import json
import netrc
import os
import platform
import queue
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from llama_jax.config import ConfigError, Recipe, to_dict
from llama_jax.config.recipe import Tracker as Name
from llama_jax.io import atomic_write, read_json_or_empty
from llama_jax.storage.errors import LOGIN
from llama_jax.train.metrics import PACKAGES, log
from llama_jax.versions import source_version

WORKER = Path(__file__).with_name("tracker_worker.py")
HANG_SECONDS = 300.0
"""A tracker that has not sent a record after this time is ended."""
CLOSE_SECONDS = 20.0
"""How long a run that is done waits for its trackers."""
IDS = "trackers.json"
"""The file of the run folder with the id of the run in each tracker."""

_SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
_KEYS = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")


def check_installed(names: tuple[Name, ...]) -> None:
    """Check that the packages of the trackers are installed, in the process that writes.

    Raises:
      ConfigError: one is not.
    """
    for name in names if jax.process_index() == 0 else ():
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.trackers: {name} is not installed: pip install 'llama_jax[{name}]', or "
                f'remove "{name}" from train.trackers'
            )


class Trackers:
    """The trackers of a run; only process 0 has any.

    Args:
      recipe: the run.
      folder: the run folder, which keeps the id of the run in each tracker.

    Example::

      trackers = Trackers(recipe, Path("checkpoints/tiny"))
      trackers.metrics(1, {"train/loss": 8.3})
      trackers.close()
    """

    def __init__(self, recipe: Recipe, folder: Path):
        names = recipe.train.trackers if jax.process_index() == 0 else ()
        self._lock = threading.Lock()
        self._file = folder / IDS
        self._ids: dict[str, Any] = {}
        with contextlib.suppress(ValueError, OSError):
            self._ids = read_json_or_empty(self._file)
        self._trackers = [self._start(name, recipe) for name in names]

    def _start(self, name: str, recipe: Recipe) -> "Tracker":
        folder = str(self._file.parent)
        if "://" not in folder:
            folder = os.path.abspath(folder)
        if name == "wandb" and name not in self._ids:
            self._save_id(name, secrets.token_hex(4))
        start = {
            "id": self._ids.get(name),
            "name": os.path.basename(folder),
            "folder": None if "://" in folder else folder,
            "config": redact(to_dict(recipe)),
            "notes": {"llama_jax": source_version(), "versions": _versions()},
        }
        return Tracker(name, start, lambda number: self._save_id(name, number))

    def _save_id(self, name: str, number: str) -> None:
        with self._lock:
            if self._ids.get(name) != number:
                self._ids[name] = number
                with contextlib.suppress(OSError):
                    atomic_write(self._file, json.dumps(self._ids).encode() + b"\n")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        self._send(kind="metrics", step=step, values=dict(values))

    def samples(self, step: int, texts: list[str]) -> None:
        """Texts that the model has generated."""
        self._send(kind="samples", step=step, texts=texts)

    def picture(self, path: Path) -> None:
        """A picture of the run folder, if it exists."""
        if path.is_file():
            content = base64.b64encode(path.read_bytes()).decode()
            self._send(kind="picture", name=path.name, content=content)

    def finished(self) -> None:
        """The run has reached its last step; it is marked as stopped otherwise."""
        self._send(kind="finished")

    def _send(self, **message: Any) -> None:
        for tracker in self._trackers:
            tracker.send(message)

    def close(self) -> None:
        """Wait until everything is sent, at most :data:`CLOSE_SECONDS`."""
        end = time.monotonic() + CLOSE_SECONDS
        for tracker in self._trackers:
            tracker.close()
        for tracker in self._trackers:
            tracker.wait(end)
        self._trackers = []


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | versions


class Tracker:
    """The process of one tracker.

    Args:
      name: the tracker.
      start: what describes the run, see ``tracker_worker.py``.
      on_id: called with the id of the run in the tracker.
    """

    def __init__(self, name: str, start: dict[str, Any], on_id: Any):
        self.name, self._on_id = name, on_id
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._pending: collections.deque[float] = collections.deque()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        # In a new session, so that Ctrl-C in the terminal does not end it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        self.send(start)
        for target in (self._write, self._read):
            threading.Thread(target=target, name=f"tracker {name}", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message soon, from another thread."""
        if self._ended.is_set():
            return
        now = time.monotonic()
        if self._pending and now - self._pending[0] > HANG_SECONDS:
            self._fail(f"it has not answered for {HANG_SECONDS:.0f} s")
            return
        self._pending.append(now)
        self._lines.put(json.dumps(message))

    def _write(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError):  # _read reports why the process ended
            while (line := self._lines.get()) is not None:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout
        error = ""
        with self._process.stdout as answers:
            for answer in map(json.loads, answers):
                if "error" in answer:
                    error = answer["error"]
                elif "closed" in answer:
                    self._ended.set()
                else:
                    self._pending.popleft()
                    if "id" in answer:
                        self._on_id(answer["id"])
        if not self._ended.is_set():
            self._fail(error or f"its process ended with status {self._process.wait()}")

    def _fail(self, reason: str) -> None:
        """Warn once, and end the process and those that it has started."""
        with self._lock:
            if self._ended.is_set():
                return
            line = " ".join(redact(reason).split())
            log(f"warning: {self.name} stopped ({line:.300}); the run continues without it")
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._ended.set()  # only now: whoever waits for it may end the program

    def close(self) -> None:
        """Let the process end when everything is sent."""
        self._lines.put(None)

    def wait(self, end: float) -> None:
        """Wait until the process has ended.

        Args:
          end: monotonic time at which it is ended.
        """
        if not self._ended.wait(max(0.0, end - time.monotonic())):
            self._fail(f"it had not sent everything {CLOSE_SECONDS:.0f} s after the end of the run")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)


# Secrets -----------------------------------------------------------------------------------------


def redact(value: Any) -> Any:
    """A nested value whose texts have no passwords of URLs and netrc, and no secrets of the
    environment."""
    secrets = _secrets()

    def redacted(x: Any) -> Any:
        if isinstance(x, str):
            return _redact_text(x, secrets)
        if isinstance(x, dict):
            return {key: redacted(y) for key, y in x.items()}
        return [redacted(y) for y in x] if isinstance(x, list | tuple) else x

    return redacted(value)


def _secrets() -> list[str]:
    """What must not be shown: the longest first, since one may be a part of another."""
    known = [value for name, value in os.environ.items() if name in _KEYS and len(value) >= 4]
    other = [x for name, x in os.environ.items() if len(x) >= 8 and _SECRET.search(name)]
    return sorted({*known, *other, *_netrc_passwords()}, key=len, reverse=True)


def _netrc_passwords() -> list[str]:
    """The passwords of all hosts: W&B and MLflow's HTTP library read the file of their host."""
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        hosts = netrc.netrc(path).hosts.values()
    except (OSError, ValueError, netrc.NetrcParseError):
        return []
    return [password for *_, password in hosts if password and len(password) >= 4]


def _redact_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    text = LOGIN.sub("***@", text)
    parameter = r"([?&][^=&\s]*(?:key|token|secret|passw|credential|sig)[^=&\s]*=)[^&\s]+"
    return re.sub(parameter, r"\1***", text, flags=re.IGNORECASE)
