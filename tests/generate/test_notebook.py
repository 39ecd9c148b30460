"""The notebook runs from first cell to last, on a run made here; it is kept with its outputs."""

import json
import os
from pathlib import Path

import pytest

from llama_jax.train import loop as train

NOTEBOOK = Path(__file__).parents[2] / "notebooks/sampling.ipynb"


def test_it_is_kept_with_its_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert len(cells) <= 10
    # The first two only import and load.
    assert all(c["outputs"] for c in code[2:])
    kinds = {kind for c in code for o in c["outputs"] for kind in o.get("data", {})}
    assert {"text/html", "image/png"} <= kinds
    assert not any(o["output_type"] == "error" for c in code for o in c["outputs"])


def test_it_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    run = tmp_path / "run"
    (tmp_path / "text").mkdir()
    for i in range(40):
        text = f"the cat sat on mat {i} and saw {i * i} animals\n" * 20
        (tmp_path / f"text/{i}.txt").write_text(text)
    small = ["dim=32", "num_layers=2", "num_heads=2", "num_kv_heads=2", "head_dim=16", "ffn_dim=64"]
    made = train.main(
        [
            str(NOTEBOOK.parents[1] / "configs/tiny.toml"),
            *(f"model.{s}" for s in [*small, "vocab_size=300"]),
            f"data.sources={{text = {{path = '{tmp_path / 'text'}'}}}}",
            "data.seq_len=32", "train.steps=2", "train.batch_size=8", "optim.warmup_steps=1",
            "train.sample_prompts=[]", "train.eval_batches=1", f"checkpoint.dir={run}",
        ]
    )  # fmt: skip
    assert made == 0
    monkeypatch.setenv("LLAMA_JAX_CHECKPOINT", str(run))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    root = str(NOTEBOOK.parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, 4)
    client = nbclient.NotebookClient(
        notebook, timeout=180, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
