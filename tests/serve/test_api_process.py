"""The command in a process of its own: ready, kill -9 and restart, SIGTERM, a second signal."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")

from engine_tools import TEXT
from model_tools import random_weights, small, tree_of

from llama_jax.checkpoint.checkpoints import Checkpoints
from llama_jax.checkpoint.file_hashes import record_files
from llama_jax.checkpoint.model_json import make_metadata, write_metadata
from llama_jax.prepare.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
BODY = {"prompt": "the cat", "temperature": 0, "max_tokens": 20, "logprobs": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a run of a tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    cfg = small(vocab_size=300, context=2048)
    checkpoints = Checkpoints(folder, keep=1)
    arrays = jax.tree.map(jnp.asarray, tree_of(random_weights(cfg)))
    checkpoints.save(1, arrays, {"count": jnp.zeros(())}, {"step": 1})
    checkpoints.close()
    write_metadata(folder, make_metadata(cfg, {"eos": 2}))
    tokenizer = train_tokenizer([t for t in TEXT for _ in range(50)], 300, folder / "t.model")
    shutil.move(tokenizer.path, folder / "tokenizer.model")
    record_files(folder, "model.json", "tokenizer.model")
    return folder


class Process:
    """A server in a process, which is ready."""

    def __init__(self, command, cache):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XDG_CACHE_HOME": str(cache), "PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/tests/serve",
        }  # fmt: skip
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, env=env, text=True)
        self.lines = []
        for line in self.popen.stderr:
            self.lines.append(line)
            if line.startswith("ready: "):
                self.url = line.split()[1]
                return
        raise AssertionError("".join(self.lines))

    def ask(self, **fields):
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(BODY | fields).encode()
        )
        return urllib.request.urlopen(request, timeout=30)

    def wait(self):
        try:
            return self.popen.wait(20)
        finally:
            self.popen.kill()
            self.popen.stderr.close()


def test_killed_and_restarted_and_stopped(checkpoint, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    options = ["--port", str(port), "--slots", "2", "--prefix-cache", "1MB"]
    command = [sys.executable, "-m", "llama_jax.serve", str(checkpoint), *options]
    server = Process(command, cache)
    assert server.url == f"http://127.0.0.1:{port}"
    assert server.lines[-1].split("serves ")[1] == "tiny\n"
    assert any(line.startswith("compiling 1 of") for line in server.lines)
    content = lambda: json.load(server.ask())["choices"]
    before = content()
    stream = server.ask(stream=True, max_tokens=1000)
    assert stream.read(10)
    server.popen.kill()
    assert server.wait() == -signal.SIGKILL

    server = Process(command, cache)
    assert content() == before
    stream = server.ask(stream=True, max_tokens=1900)
    assert stream.read(10)
    server.popen.send_signal(signal.SIGTERM)
    assert "stopping" in server.popen.stderr.readline()
    with pytest.raises(urllib.error.HTTPError) as e:
        server.ask()
    assert e.value.code == 503
    assert json.load(e.value)["error"]["code"] == "stopping"
    text = stream.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in text
    assert server.wait() == 0


SLOW = """
import sys
from pathlib import Path
from api_tools import FakeEngine, chat_tokenizer, model
from llama_jax.serve.access import Access
from llama_jax.serve.metrics import Metrics
from llama_jax.serve.server import serve
import socket

tokenizer = chat_tokenizer(Path(sys.argv[1]))
engine = FakeEngine(tokenizer)
engine.script = engine.holds
sock = socket.create_server(("127.0.0.1", 0))
say = lambda: print(f"ready: http://127.0.0.1:{sock.getsockname()[1]}", file=sys.stderr, flush=True)
serve(engine, {"tiny": model(tokenizer)}, Metrics("tiny"), Access([], [], []), sock,
      fingerprint="fp", on_ready=say)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number, tmp_path):
    server = Process([sys.executable, "-c", SLOW, str(tmp_path)], tmp_path)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as s:
        body = json.dumps({"prompt": "the cat"}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
        s.sendall(head.encode() + body)
        time.sleep(0.3)
        server.popen.send_signal(number)
        assert "stopping" in server.popen.stderr.readline()
        time.sleep(0.1)
        assert server.popen.poll() is None
        server.popen.send_signal(number)
        start = time.monotonic()
        assert server.wait() == 128 + number
        assert time.monotonic() - start < 2


def test_it_stops_although_nobody_reads_its_messages(tmp_path):
    server = Process([sys.executable, "-c", SLOW, str(tmp_path)], tmp_path)
    server.popen.stderr.close()
    server.popen.send_signal(signal.SIGTERM)
    assert server.wait() >= 0  # 120 if Python could not write the message
