"""Experiment trackers: what they record, a continued run, and trackers that fail."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from PIL import Image
from train_tools import write_recipe

from llama_jax.config import ConfigError, load_recipe
from llama_jax.train import loop, trackers
from llama_jax.train.__main__ import main
from llama_jax.train.metrics import read_records
from llama_jax.train.trackers import Trackers, redact
from llama_jax.versions import source_version


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run that has the two trackers, and was continued after its second step."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("tracked")
    recipe = write_recipe(
        folder, train={"steps": 2, "eval_batches": 1, "trackers": ["wandb", "mlflow"],
                       "sample_prompts": ["the cat"]},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", "s3cret" * 7)
        patch.setenv("MLFLOW_TRACKING_URI", f"file://{folder}/mlflow")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("XDG_DATA_HOME", str(folder / "share"))
        patch.setattr(trackers, "CLOSE_SECONDS", 120.0)
        assert main([str(recipe)]) == 0
        Image.new("RGB", (1, 1)).save(folder / "run/loss.png")  # these tests plot nothing
        used = Trackers(load_recipe(recipe), folder / "run")
        used.metrics(3, {"train/loss": 1.5})
        used.picture(folder / "run/loss.png")
        used.finished()
        used.close()
    return folder


def expected(folder: Path) -> list[tuple[int, float]]:
    records = read_records(folder / "run/metrics.jsonl")
    return [*((r["step"], r["loss"]) for r in records if r["kind"] == "train"), (3, 1.5)]


def wandb_records(path: Path):
    """The records of an offline run: protocol buffers in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_weights_and_biases_has_the_run(place):
    first, second = sorted((place / "run/wandb").glob("offline-run-*/*.wandb"))
    number = json.loads((place / "run/trackers.json").read_text())["wandb"]
    assert first.name == second.name == f"run-{number}.wandb"
    config, points, last = {}, [], {}
    for record in (r for path in (first, second) for r in wandb_records(path)):
        if record.HasField("run"):
            config |= {x.key: json.loads(x.value_json) for x in record.run.config.update}
            assert (record.run.project, record.run.display_name) == ("llama_jax", "run")
        items = record.history.item
        row = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in items}
        last |= row
        if "train/loss" in row:
            points.append((row["step"], row["train/loss"]))
    assert points == expected(place)
    assert config["train"]["batch_size"] == 8
    assert config["llama_jax"] == source_version()
    assert config["versions"]["jax"] == jax.__version__
    evaluation = [r for r in read_records(place / "run/metrics.jsonl") if r["kind"] == "eval"]
    assert last["eval/loss"] == evaluation[-1]["loss"]
    assert any(key.startswith("loss") and "image" in str(x) for key, x in last.items())
    texts = [p.read_text() for p in (place / "run/wandb").rglob("*.table.json")]
    assert ["the cat" in text for text in texts] == [True]
    assert not [p for p in place.rglob("*") if p.is_file() and b"s3cret" in p.read_bytes()]


def test_mlflow_has_the_run(place):
    from mlflow.tracking import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = MlflowClient(f"file://{place}/mlflow")
        number = json.loads((place / "run/trackers.json").read_text())["mlflow"]
        run = client.get_run(number)
        points = client.get_metric_history(number, "train/loss")
        files = sorted(f.path for f in client.list_artifacts(number))
        experiment = client.get_experiment_by_name("llama_jax")
        assert [r.info.run_id for r in client.search_runs([experiment.experiment_id])] == [number]
    assert [(p.step, p.value) for p in points] == expected(place)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.batch_size"] == "8"
    assert run.data.tags["llama_jax"] == source_version()
    assert run.data.tags["versions.jax"] == jax.__version__
    assert {"eval/sources/words/loss", "eval/loss", "goodput/goodput/steps"} <= set(
        run.data.metrics
    )
    assert files == ["loss.png", "samples-2.txt"]


FAILURES = {
    "exit(3)": "its process ended with status 3",
    "answer(error='UsageError: No API key configured.')": "UsageError: No API key configured.",
    "answer(id='7'); input(); answer(error='HTTP 500 from https://me:pw@host/?token=abc')": (
        "HTTP 500 from https://***@host/?token=***"
    ),
    "answer(id='7'); time.sleep(99)": "it has not answered for 0 s",
    "time.sleep(99)": "it has not answered for 0 s",
}


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Replace the trackers' process by a program that reads the first line and runs the source."""

    def use(source: str) -> None:
        path = tmp_path / "worker.py"
        path.write_text(
            "import json, time\ninput()\n"
            "answer = lambda **fields: print(json.dumps(fields), flush=True)\n" + source
        )
        monkeypatch.setattr(trackers, "WORKER", path)

    return use


@pytest.mark.parametrize("source", FAILURES)
def test_a_tracker_that_fails_is_one_warning(source, worker, tmp_path, monkeypatch, capsys):
    hangs = "not answered" in FAILURES[source]  # the others need time to start Python
    monkeypatch.setattr(trackers, "HANG_SECONDS", 0.4 if hangs else 20.0)
    worker(source)
    (tmp_path / "text").mkdir()
    recipe = load_recipe("tiny", ["train.trackers=['mlflow']"])
    used = Trackers(recipe, tmp_path)
    end, slowest, out = time.monotonic() + 20, 0.0, ""
    while not out and time.monotonic() < end:
        began = time.monotonic()
        used.metrics(1, {"train/loss": 2.0})
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.05)
        out = capsys.readouterr().out
    used.metrics(2, {"train/loss": 1.0})
    used.close()
    (line,) = (out + capsys.readouterr().out).splitlines()
    assert line == f"warning: mlflow stopped ({FAILURES[source]}); the run continues without it"
    assert slowest < 2


def test_a_tracker_that_never_finishes_ends_with_the_run(worker, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.3)
    worker("answer(id='7')\nwhile True: time.sleep(1)")
    used = Trackers(load_recipe("tiny", ["train.trackers=['mlflow']"]), tmp_path)
    used.metrics(1, {"train/loss": 2.0})
    began = time.monotonic()
    used.close()
    assert time.monotonic() - began < 10
    assert "mlflow stopped (it had not sent everything 0 s after the end" in capsys.readouterr().out


def test_the_end_of_a_run_waits_for_the_warning(worker, tmp_path, monkeypatch):
    """The thread that warns would be lost when the program ends."""
    lines = []
    monkeypatch.setattr(trackers, "log", lambda line: (time.sleep(0.5), lines.append(line)))
    worker("answer(error='401')")
    used = Trackers(load_recipe("tiny", ["train.trackers=['mlflow']"]), tmp_path)
    used.close()
    assert lines == ["warning: mlflow stopped (401); the run continues without it"]


def test_real_trackers_without_login_or_server(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    for name in [n for n in os.environ if n.startswith(("WANDB", "MLFLOW"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter22@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 120.0)
    recipe = load_recipe("tiny", ["train.trackers=['wandb','mlflow']"])
    used = Trackers(recipe, tmp_path)
    used.close()
    lines = sorted(capsys.readouterr().out.splitlines())
    assert len(lines) == 2, lines
    assert lines[0].startswith("warning: mlflow stopped (")
    assert "127.0.0.1" in lines[0]
    assert "hunter22" not in lines[0]
    assert lines[1].startswith("warning: wandb stopped (")
    assert "API key" in lines[1]


def test_unknown_and_missing_trackers(tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"train\.trackers\.0='wanb'.*did you mean wandb\?"):
        load_recipe("tiny", ["train.trackers=['wanb']"])
    with pytest.raises(ConfigError, match="must name each tracker once"):
        load_recipe("tiny", ["train.trackers=['mlflow','mlflow']"])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *x: None if name == "mlflow" else find(name, *x)
    )
    monkeypatch.setattr(loop.Trainer, "_compile", None)  # nothing is compiled before
    folder = f"checkpoint.dir={tmp_path}/run"
    assert main(["configs/tiny.toml", folder, "train.trackers=['mlflow']"]) == 2
    error = capsys.readouterr().err
    assert "mlflow is not installed: pip install 'llama_jax[mlflow]'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_only_process_0_has_trackers(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    recipe = load_recipe("tiny", ["train.trackers=['wandb','mlflow']"])
    trackers.check_installed(recipe.train.trackers)
    used = Trackers(recipe, tmp_path)
    used.metrics(1, {"train/loss": 1.0})
    used.close()
    assert not list(tmp_path.iterdir())


def test_keys_of_trackers_are_replaced_in_their_errors(worker, tmp_path, monkeypatch, capsys):
    """Those of the environment, also short ones, and those of netrc; each in an error message."""
    values = {"WANDB_API_KEY": "wb-k", "MLFLOW_TRACKING_TOKEN": "tok-7", "MLFLOW_TRACKING_PASSWORD":
              "hunter2", "SOME_SECRET": "hunter2-and-more"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password 0123456789abcdef\n")
    netrc.chmod(0o600)
    keys = [*values.values(), "0123456789abcdef"]
    worker(f"answer(error='401: key {' '.join(keys)} of user')")
    used = Trackers(load_recipe("tiny", ["train.trackers=['mlflow']"]), tmp_path)
    used.close()
    line = capsys.readouterr().out
    assert "mlflow stopped (401: key *** *** *** *** *** of user); the run" in line
    monkeypatch.setenv("NETRC", str(tmp_path / "broken"))
    (tmp_path / "broken").write_text("machine\n nonsense {")
    assert redact("0123456789abcdef") == "0123456789abcdef"


def test_secrets_are_replaced(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh123")
    config = {"a": ["s3://id:pass@bucket/x", 3], "b": "x abcdefgh123 y", "c": "gs://bucket/run"}
    assert redact(config) == {
        "a": ["s3://***@bucket/x", 3], "b": "x *** y", "c": "gs://bucket/run",
    }  # fmt: skip


def test_an_error_with_a_huge_answer_of_a_server_is_cut():
    source = (
        "from llama_jax.train import tracker_worker as w\n"
        "def fail(start): raise ValueError('page ' * 10**6)\n"
        "w.WRITERS['mlflow'] = fail\nw.main('mlflow')"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], input="{}\n", capture_output=True, text=True, timeout=60
    )
    error = json.loads(done.stdout)["error"]
    assert error.startswith("ValueError: page page")
    assert len(error) < 20_000
