"""The load script's arithmetic, and its requests to servers whose timing is known."""

import json
import subprocess
import sys

import pytest
from chat_server import chat_server

from benchmarks import serve, serve_compare
from benchmarks.common import ROOT

FIELDS = {"ignore_eos": True}


def test_numbers_by_hand():
    answer = serve.Answer
    first = [
        answer(0.0, [1.0, 1.5, 2.5], 3.0, 100, 3),  # TTFT 1, gaps 0.5, 1
        answer(0.5, [1.0, 1.25], 2.0, 110, 2),  # TTFT 0.5, gap 0.25
    ]
    second = [answer(10.0, [12.0, 14.0], 20.0, 105, 7)]  # TTFT 2, gap 2
    row = serve.summary(2, [first, second])
    assert row == {
        "streams": 2, "requests": 3, "prompt_tokens": 105, "new_tokens": 4,
        "output_tokens_per_s": 1.18,  # median of 5 / 3 s and 7 / 10 s
        "output_tokens_per_s_range": [0.7, 1.67],
        "requests_per_s": 0.383,  # median of 2 / 3 s and 1 / 10 s
        "ttft_p50_s": 1.0, "ttft_p99_s": 2.0,
        "itl_p50_ms": 750, "itl_p99_ms": 2000,
    }  # fmt: skip
    assert "| 2 | 3 | 105.0 | 4.0 | 1.18 | 0.383 | 1.0 | 2.0 | 750.0 | 2000.0 |" in serve.table(
        [row]
    )
    assert serve.quantile(range(1, 101), 0.99) == 99
    assert serve.quantile([5], 0.99) == 5


def test_load_on_a_server():
    with chat_server() as server:
        server.first_delay, server.delay = 0.05, 0.01
        load = serve.Load(server.url, "", 20, 8, FIELDS)
        row = serve.summary(4, [load.round(4), load.round(4)])
        bodies = server.requests
    assert [len(body["prompt"].split()) for body in bodies] == [20] * 8
    assert len({body["prompt"] for body in bodies}) == 8
    assert all(body["model"] == "base" and body["ignore_eos"] for body in bodies)
    assert (row["requests"], row["prompt_tokens"], row["new_tokens"]) == (8, 105, 8)
    assert 0.05 <= row["ttft_p50_s"] < 2
    assert 9 <= row["itl_p50_ms"] < 400
    # 4 answers of 8 tokens in 0.05 s + 7 * 0.01 s.
    assert 5 < row["output_tokens_per_s"] < 32 / 0.12
    assert row["requests_per_s"] == pytest.approx(row["output_tokens_per_s"] / 8, rel=0.01)


def test_shared_prefix():
    with chat_server() as server:
        load = serve.Load(server.url, "", 5, 2, FIELDS)
        result = load.prefix(30, 3)
        prompts = [body["prompt"].split() for body in server.requests]
    assert [len(p) for p in prompts] == [35] * 7
    begin = [" ".join(p[:30]) for p in prompts]
    assert len(set(begin)) == 4
    assert len(set(begin[3:])) == 1
    assert len({" ".join(p[30:]) for p in prompts}) == 7
    assert result["ratio"] == pytest.approx(
        result["ttft_shared_s"] / result["ttft_new_s"], rel=0.02
    )


def test_command():
    command = [sys.executable, "-m", "benchmarks.serve"]
    sizes = ["--streams", "1", "2", "--rounds", "1", "--new-tokens", "3", "--shared-prefix", "9"]
    run = lambda *args: subprocess.run(
        [*command, *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    with chat_server() as server:
        done = run(server.url, *sizes)
        result = json.loads(done.stdout.splitlines()[-1])
        server.key = "secret"
        refused = run(server.url)
        other = run(server.url + "/index.html")
    assert [row["streams"] for row in result["load"]] == [1, 2]
    assert result["machine"]["cores"] > 0
    assert result["prefix"]["shared_tokens"] == 9
    assert "HTTP 401" in refused.stderr
    assert "Traceback" not in refused.stderr + other.stderr
    assert other.returncode == 1


def test_our_server(tmp_path):
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from api_tools import FakeEngine, Running, chat_tokenizer, model

    tokenizer = chat_tokenizer(tmp_path)
    engine = FakeEngine(tokenizer)
    engine.script = engine.says("the cat sat on the mat", finish="length")
    with Running(engine, [model(tokenizer, "base")]) as server:
        load = serve.Load(server.url, "base", 10, 6, FIELDS)
        row = serve.summary(2, [load.round(2)])
    assert row["requests"] == serve.LEAST_REQUESTS
    assert row["new_tokens"] == 6
    assert all(request.max_new_tokens == 6 for request in engine.requests)
    assert all(request.eos_ids == () for request in engine.requests)
    with Running(engine, [model(tokenizer, "base")]) as server:
        load = serve.Load(server.url, "absent", 10, 6, FIELDS)
        with pytest.raises(RuntimeError, match=r"HTTP 404.*absent"):
            load.ask()


def test_a_server_that_does_not_start(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(SystemExit, match="did not start:\nno such model"),
        serve_compare.running(command, serve_compare.free_port(), tmp_path / "log"),
    ):
        pass
