"""An error in one process of a job ends all processes, each with that error as its last line.

Otherwise the other processes would wait for the failed one in a collective operation, until JAX's
heartbeat ends them with an unrelated message. The error is shared through the key-value store of
`jax.distributed`, which a thread in each process reads once per second. A process that was killed
cannot report an error: each process has a connection to process 0, which the system closes then.
"""

import contextlib
import json
import os
import platform
import re
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, NoReturn, cast

POLL_SECONDS = 1.0
WAIT_SECONDS = 10
CONNECT_SECONDS = 60
VALUE_SECONDS = 600
MAX_BYTES = 4096
"""What a process tells process 0 about itself is shorter."""
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command may succeed when it is started again."""

_FAILURE, _PEERS = "llama_jax/failure", "llama_jax/peers"
# How an operation of several processes fails if one of them has died.
_LOST_PEER = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|coordination|heartbeat|unavailable|"
    "deadline.exceeded|socket closed|broken pipe",
    re.IGNORECASE,
)

_lock = threading.Lock()
_done = threading.Event()
_calls = 0
_hosts: dict[int, str] = {}
_connection: socket.socket | None = None


def several() -> bool:
    """Whether this process is one of several processes of a job."""
    state = _state()
    return state.client is not None and (state.num_processes or 1) > 1


def watch() -> None:
    """End this process when another process of the job reports an error or dies."""
    if several():
        _done.clear()
        first = _state().process_id == 0
        for target in (_watch, _accept if first else _connect):
            threading.Thread(target=target, name="failure", daemon=True).start()


def stop_watching() -> None:
    """Ignore later errors of other processes: this process has finished."""
    _done.set()
    if _connection is not None:
        with contextlib.suppress(OSError):
            _connection.sendall(b" finished")


def end_all(text: str, code: int, dead: tuple[int, ...] = ()) -> NoReturn:
    """Report an error to every process of the job, and end.

    If several processes report errors, all processes show the first one.

    Args:
      text: the error.
      code: exit status of every process.
      dead: processes that have died, for which no other waits.
    """
    state = _state()
    if several() and not dead:
        text = f"process {state.process_id} on {platform.node()}: {text}"
    report: dict[str, Any] = {"text": text, "code": code, "dead": dead}
    try:
        state.client.key_value_set(_FAILURE, json.dumps(report))
    except Exception:  # another process was first, or the coordinator does not respond
        report = _reported() or report
    _leave(report)


def wait_for_cause(error: str) -> None:
    """Wait for the report that a process has died, if an error looks like a consequence of that.

    The report ends this process; the call returns if there is none.
    """
    if not several() or not _LOST_PEER.search(error):
        return
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        if report := _reported():
            _leave(report)
        time.sleep(POLL_SECONDS / 2)


def host_of(process: int) -> str:
    """The name of the host of a process, in process 0."""
    return platform.node() if process == 0 else _hosts.get(process, "an unknown host")


def values(mine: Any, processes: Iterable[int]) -> list[Any]:
    """The JSON values that some processes give to the same call; all processes have to call it.

    Raises:
      RuntimeError: one gives none within :data:`VALUE_SECONDS`.
    """
    global _calls
    _calls += 1
    client, key = _state().client, f"llama_jax/value/{_calls}"
    client.key_value_set(f"{key}/{_state().process_id}", json.dumps(mine))
    wait = 1000 * VALUE_SECONDS
    return [json.loads(client.blocking_key_value_get(f"{key}/{p}", wait)) for p in processes]


def _watch() -> None:
    while not _done.wait(POLL_SECONDS):
        if (report := _reported()) is not None:
            _leave(report)


def _accept() -> None:
    """In process 0: accept a connection of each process, and report those that die."""
    token = secrets.token_hex(8)
    server = _listen()
    port = server.getsockname()[1]
    _state().client.key_value_set(_PEERS, f"{port} {token}", allow_overwrite=True)
    received: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while not _done.is_set():
            dead: list[int] = []
            for key, _ in selector.select(1.0):
                if key.fileobj is server:
                    connection = server.accept()[0]
                    _find_lost_host(connection)
                    selector.register(connection, selectors.EVENT_READ)
                    received[connection] = b""
                    continue
                connection = cast(socket.socket, key.fileobj)
                try:
                    data = connection.recv(4096)
                except OSError:
                    data = b""
                received[connection] += data
                if len(received[connection]) > MAX_BYTES:  # not a process of this job
                    data = received[connection] = b""
                said = received[connection].decode(errors="replace").split()
                if said[:1] == [token] and len(said) >= 3:
                    _hosts[int(said[1])] = said[2]
                if not data:
                    selector.unregister(connection)
                    connection.close()
                    if said[:1] == [token] and len(said) == 3:
                        dead.append(int(said[1]))
            if dead:
                _report_dead(tuple(sorted(dead)))


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 is disabled
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
    return socket.create_server(("", 0), backlog=1024)


def _find_lost_host(connection: socket.socket) -> None:
    """Let the system close the connection to a host that has not answered for about 35 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _report_dead(dead: tuple[int, ...]) -> None:
    """End the job, unless these processes have reported why they ended."""
    if _done.is_set() or _reported():
        return
    who = ", ".join(f"process {p} on {host_of(p)}" for p in dead)
    end_all(
        f"{who} ended without an error message (killed, out of memory, or lost with its host); "
        "start the same command again: it continues from the last checkpoint",
        EXIT_CODE,
        dead,
    )


def _connect() -> None:
    """In the other processes: connect to process 0; without that, JAX's heartbeat has to do."""
    global _connection
    state = _state()
    with contextlib.suppress(Exception):
        peers = state.client.blocking_key_value_get(_PEERS, 1000 * CONNECT_SECONDS)
        port, token = peers.split()
        host = state.coordinator_address.rpartition(":")[0].strip("[]")
        connection = socket.create_connection((host, int(port)), CONNECT_SECONDS)
        connection.sendall(f"{token} {state.process_id} {platform.node()}".encode())
        _connection = connection
        if _done.is_set():
            stop_watching()


def _reported() -> dict[str, Any] | None:
    """The error that a process reported: its text, exit status, and dead processes."""
    try:
        return json.loads(_state().client.key_value_try_get(_FAILURE))
    except Exception:  # no error reported, or the coordinator does not respond
        return None


def _leave(report: dict[str, Any]) -> NoReturn:
    """Print the error last, and end without JAX's shutdown, which would wait for the others."""
    with _lock:
        state = _state()
        try:
            alive = [p for p in range(state.num_processes) if p not in report["dead"]]
            # The coordinator runs in process 0, so process 0 ends after the others have read it.
            state.client.wait_at_barrier("llama_jax/failed", WAIT_SECONDS * 1000, alive)
            time.sleep(1.0 if state.process_id == 0 else 0.0)
        except Exception:  # a dead process never reaches the barrier
            pass
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os.write(2, f"\nerror: {report['text']}\n".encode())
        os._exit(report["code"])


def _state() -> Any:
    from jax._src import distributed  # the key-value store has no public name

    return distributed.global_state
