"""Runs the stages of a source in this process, which is faster than the runner for small inputs."""

import json
from pathlib import Path

import zstandard

from llama_jax.corpus import recipe
from llama_jax.corpus.inputs import find_inputs
from llama_jax.corpus.run import Run
from llama_jax.corpus.steps import Writer


def run(source, inputs, output, languages=(), overrides=()):
    """Documents and dropped ones of all stages, sorted by id; and the counts, by stage."""
    files, names = find_inputs([Path(path) for path in inputs])
    settings = recipe.load_corpus_recipe(source, None, overrides).settings
    run = Run(source, settings, files, names, list(languages), output, output / "models")
    counts = {}
    for stage in recipe.source_module(source).stages(run):
        kept = output / "documents" if stage.final else output / "work/documents" / stage.name
        kept.mkdir(parents=True, exist_ok=True)
        folders = [kept, output / "dropped" / stage.name, output / "counts" / stage.name]
        for rank in range(stage.tasks):
            data = None
            for step in [*stage.steps, Writer(*folders, stage.split)]:
                data = step.run(data, rank, stage.tasks)
            for _ in data:
                pass
        counts[stage.name] = [json.loads(p.read_text()) for p in sorted(folders[2].iterdir())]
    documents = read(output / "documents")
    return documents, read(output / "dropped"), counts


def read(folder):
    found = []
    for path in sorted(folder.rglob("*.jsonl.zst")):
        with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            found += [json.loads(line) for line in lines]
    return sorted(found, key=lambda record: record["id"])
