"""Programs that nobody has checked: what they cannot do, and what counts as passed.

Each test runs with every tool that works on this machine; if none does, it checks the refusal.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from llama_jax.evaluate import sandbox

LIMITS = {"seconds": 3, "memory_bytes": 512 << 20}
COMMANDS = dict(sandbox._COMMANDS)


TOOLS = [tool for tool in COMMANDS if not sandbox._unusable(tool)] or ["none"]


@pytest.fixture(params=TOOLS)
def run(request, monkeypatch):
    """Runs a list of pairs of a program and its tests."""
    tool = request.param
    if tool == "none":
        with pytest.raises(ValueError, match="install bubblewrap"):
            sandbox.run_all([("", "")], **LIMITS)
        pytest.xfail("no sandbox works here; programs are refused")
    sandbox._tool.cache_clear()
    monkeypatch.setattr(sandbox, "_COMMANDS", {tool: COMMANDS[tool]})
    yield lambda pairs, **more: sandbox.run_all(pairs, **LIMITS | more)
    sandbox._tool.cache_clear()


def processes_with(mark):
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def none_left(mark):
    end = time.monotonic() + 5
    while processes_with(mark) and time.monotonic() < end:
        time.sleep(0.05)
    return not processes_with(mark)


DAEMON = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        time.sleep(1000)
    os._exit(0)
"""


def test_harm_is_contained(run, tmp_path, monkeypatch):
    """The programs do little harm even if the sandbox does not contain them."""
    folder, secret = tmp_path / "folder", "s" + uuid.uuid4().hex
    folder.mkdir()
    canary = folder / "canary"
    canary.write_text(secret)
    monkeypatch.setenv("API_KEY", secret)
    mark = uuid.uuid4().hex
    monkeypatch.setitem(sandbox._ENVIRONMENT, "MARK", mark)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        harm = {
            "infinite loop": "while True: pass",
            "fork bomb": "import os\nfor _ in range(6): os.fork()",
            "shell": "import os\nassert os.system('true') == 0",
            "threads": "import threading\nfor _ in range(1000):\n"
            "    threading.Thread(target=__import__('time').sleep, args=[1]).start()",
            "daemon": DAEMON,
            "deletion": f"import os\nos.remove({str(canary)!r})",
            "deletion of a folder": f"import shutil\nshutil.rmtree({str(folder)!r})",
            "new file": f"open('/usr/lib/{mark}', 'w')",
            "new file at the top": f"open('/{mark}', 'w')",
            "mode of a folder": "import os\nos.chmod('/usr/lib', os.stat('/usr/lib').st_mode)",
            "network": f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)",
            "allocation of 10 GB": "x = bytearray(10 << 30)",
            "file of 10 GB": "open('/tmp/x', 'wb').truncate(10 << 30)",
            "many files": "for i in range(100):\n"
            "    with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(1 << 20))",
            "output": "for _ in range(100): print('x' * (1 << 20))",
            "output to any file": "import os\nfor i in range(64):\n    try:\n"
            "        for _ in range(1000): os.write(i, bytes(1 << 16))\n    except OSError: pass",
            "secret file": f"assert open({str(canary)!r}).read()",
            "secret variable": "import os\nassert os.environ['API_KEY']",
            "secret of any process": "import glob\nassert glob.glob('/proc/*/environ')",
            "devices": "import os\nassert os.listdir('/dev')",
            "process ids of the machine": "import os\nassert os.getpid() > 9",
            "more memory": "import resource\n"
            "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = bytearray(10 << 30)",
            "memory of the kernel": "import os\nos.memfd_create('x')",
            "namespaces": "import ctypes\nassert not ctypes.CDLL(None).unshare(0x10000000)",
            "crash": "import ctypes\nctypes.string_at(0)",
        }
        outcomes = run([(program, "") for program in harm.values()])
        failed = dict(zip(harm, outcomes, strict=True))
        assert [name for name, outcome in failed.items() if outcome.passed] == []
        with pytest.raises(TimeoutError):
            server.accept()
    assert "reached a limit (3 s of CPU time" in failed["infinite loop"].detail
    assert failed["fork bomb"].detail.startswith("PermissionError")
    assert failed["allocation of 10 GB"].detail == "MemoryError:"
    assert failed["secret file"].detail.startswith("FileNotFoundError")
    assert failed["secret variable"].detail == "KeyError: 'API_KEY'"
    assert not any(secret in outcome.detail for outcome in outcomes)
    assert canary.read_text() == secret
    assert none_left(mark)


CLAIM = """
import os, sys
def leave():
    frame = sys._getframe()
    while frame:
        frame = frame.f_back
        for name, value in (frame.f_locals if frame else {}).items():
            if name == "request":
                for fd in range(3, 64):
                    try: os.write(fd, value["token"].encode())
                    except OSError: pass
    os._exit(0)
"""


def test_success_cannot_be_claimed(run):
    wrong = [
        *("import os\nos._exit(0)", "import sys\nsys.exit(0)", "raise SystemExit", "quit = 1/0"),
        *("print('OK')\nimport os\nos._exit(0)", "import os\nfor i in range(64): os.close(i)"),
        "import os\nos.close(1)\nos.close(2)",
        "import builtins\nbuiltins.exec = lambda *_: None",
        "import builtins\nbuiltins.compile = lambda *_: None",
        "import sys, os\nsys.excepthook = lambda *_: os._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)",
        "x = '''",
        "if 0:\\",
        CLAIM + "leave()",
        "import os\nos.write = lambda *_: None",
        "\udc80",
        "\0",
        "(" * 100000,
        "def f(): return",
    ]
    outcomes = run([(program, "\nassert 1 == 2  # '''") for program in wrong])
    assert [p for p, outcome in zip(wrong, outcomes, strict=True) if outcome.passed] == []
    # The function that is tested ends the process, or reports success.
    outcomes = run([(CLAIM, "leave()"), ("import os", "os._exit(0)"), ("", "raise SystemExit")])
    assert not any(outcome.passed for outcome in outcomes)
    assert outcomes[0].detail == "it reports success whatever the tests are"


def test_right_programs_pass(run):
    right = {
        "from typing import List\ndef f(x: List[int]): return max(x)": "assert f([1, 3])",
        "import collections, math, re, itertools, functools, heapq, bisect, cmath, hashlib": "",
        "import datetime, json, decimal, fractions, statistics, string, random, copy, sys": "",
        "open('/tmp/x', 'w').write('y')": "assert open('/tmp/x').read() == 'y'",
        "print('x' * 1000000)": "import sys\nprint('y', file=sys.stderr)",
        "import asyncio\nasync def f(): return 1": "assert asyncio.run(f()) == 1",
        "x = '\u00e9\u4e2d\U0001f600'": "assert len(x) == 3",
        "import os": "assert os.path.expanduser('~') == '/tmp' and not os.listdir('/tmp')",
        "try: input()\nexcept EOFError: x = 1": "assert x",
        "import random": "assert random.random() == 0.8444218515250481",  # seed 0
        "x = list({'a', 'b', 'c'})": "assert x == list({'a', 'b', 'c'})",
        "def f(n): return n and 1 + f(n - 1)": "assert f(900) == 900",
        "if __name__ == '__main__': raise ValueError": "",
    }
    outcomes = run(list(right.items()), seconds=5)
    assert [(p, o.detail) for p, o in zip(right, outcomes, strict=True) if not o.passed] == []
    # Equal programs have equal outcomes, although they run once.
    pairs = [("x = 1", "assert x == 2"), ("x = 1", ""), ("x = 1", "assert x == 2")]
    assert run(pairs, seconds=5) == [
        (False, "AssertionError:"), (True, ""), (False, "AssertionError:")
    ]  # fmt: skip


def test_sets_have_one_order(run):
    order = "raise ValueError(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    first, second = (run([(order, "")], seconds=5)[0] for _ in range(2))
    assert first == second
    assert "'a'" in first.detail


def test_details_are_one_short_line(run):
    (outcome,) = run([("raise ValueError('\\x1b[31m' + '\\n' + 'long' * 10**6)", "")])
    assert len(outcome.detail) < 300
    assert outcome.detail.isprintable()


def test_killed_from_outside(run):
    """If this process is killed, the programs that it runs end."""
    tool = next(iter(sandbox._COMMANDS))
    mark = uuid.uuid4().hex
    code = (
        f"import sys; sys.path.insert(0, {str(Path(sandbox.__file__).parent)!r})\n"
        f"import sandbox; sandbox._ENVIRONMENT['MARK'] = {mark!r}\n"
        f"sandbox._run({tool!r}, 'import time; time.sleep(1000)', '', seconds=100,"
        " memory_bytes=1 << 29)"
    )
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as parent:
        end = time.monotonic() + 20
        while not processes_with(mark) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.3)
        assert processes_with(mark)
        os.kill(parent.pid, signal.SIGKILL)
    assert none_left(mark)


def test_signals_to_the_group_of_processes(run):
    """A signal to process 0 is for all processes of the group, also those outside namespaces."""
    tool = next(iter(sandbox._COMMANDS))
    program = "import os, signal\nfor s in (signal.SIGSTOP, signal.SIGKILL): os.kill(0, s)"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(sandbox.__file__).parent)!r})\n"
        f"import sandbox; sandbox._run({tool!r}, {program!r}, '', seconds=1, memory_bytes=1 << 29)"
        "; print('alive')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=30, start_new_session=True)
    assert done.stdout == b"alive\n"


def test_refused_without_a_sandbox(monkeypatch):
    sandbox._tool.cache_clear()
    failing = {"sh": lambda folder: ["sh", "-c", "echo no namespaces"], "no-such-tool": None}
    monkeypatch.setattr(sandbox, "_COMMANDS", failing)
    with pytest.raises(ValueError, match="install bubblewrap") as error:
        sandbox.run_python("", seconds=1, memory_bytes=1 << 30)
    with pytest.raises(ValueError, match="install bubblewrap"):
        sandbox.sandbox_name()
    message = str(error.value)
    assert "no namespaces" in message
    assert "no-such-tool is not installed" in message
    assert "\n" not in message


def test_name(run):
    assert any(name in sandbox.sandbox_name() for name in ("bubblewrap", "unshare"))
