"""The notebook is stored with its outputs, and runs with a checkpoint and without one."""

import json
import os
from pathlib import Path

import pytest
import quick_options

from llama_jax.train.__main__ import main

NOTEBOOK = Path(__file__).parents[2] / "notebooks/sampling.ipynb"
STEPS = "train.steps=100"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Settings of a run of seconds."""
    pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        text = f"the cat sat on mat {i} and saw {i * i} animals\n" * 20
        (folder / f"{i}.txt").write_text(text)
    sizes = "dim=32 num_layers=2 num_heads=2 num_kv_heads=2 head_dim=16 ffn_dim=64 vocab_size=300"
    return [
        *(f"model.{size}" for size in sizes.split()),
        f"data.sources={{text={{path='{folder}'}}}}",
        "data.seq_len=32", "train.steps=2", "train.batch_size=8", "optim.warmup_steps=1",
        "train.sample_prompts=[]", "train.eval_batches=1",
    ]  # fmt: skip


def test_the_notebook_is_stored_with_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert len(cells) <= 10
    # The first one only imports.
    assert all(c["outputs"] for c in code[1:])
    kinds = {kind for c in code for o in c["outputs"] for kind in o.get("data", {})}
    assert {"text/html", "image/png"} <= kinds
    assert not any(o["output_type"] == "error" for c in code for o in c["outputs"])


def execute(checkpoint, monkeypatch, settings=()):
    """The notebook, run with this checkpoint; ``settings`` replace those of its own training."""
    import nbclient
    import nbformat

    monkeypatch.setenv("LLAMA_JAX_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # Programs of the kernel take longer to compile than to run.
    monkeypatch.setenv("XLA_FLAGS", quick_options.FLAGS)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    root = str(NOTEBOOK.parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, 4)
    if settings:
        cell = notebook.cells[2]
        assert cell.source.count(STEPS) == 1
        quoted = " ".join(f'"{s}"' for s in settings).replace("{", "{{").replace("}", "}}")
        cell.source = cell.source.replace(STEPS, quoted)
    client = nbclient.NotebookClient(
        notebook, timeout=180, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    return notebook


def test_it_runs(tmp_path, monkeypatch, small_run):
    run = tmp_path / "run"
    recipe = str(NOTEBOOK.parents[1] / "configs/tiny.toml")
    assert main([recipe, *small_run, f"checkpoint.dir={run}"]) == 0
    execute(run, monkeypatch)


def test_it_runs_on_a_fresh_clone(tmp_path, monkeypatch, small_run):
    """Without a checkpoint, it says that it trains a small model, and does."""
    notebook = execute(tmp_path / "none", monkeypatch, small_run)
    output = "".join(o.get("text", "") for o in notebook.cells[2].outputs)
    assert "none does not exist: training" in output
    assert (tmp_path / "notebook/model.json").exists()
