"""A small source for tests of the runner: each line of a file is a document.

Some lines are instructions: "die" ends the process; "wait" writes the file ``waiting`` with the
process's id beside the input and waits.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pydantic
from datatrove.data import Document

from llama_jax.corpus.run import Run
from llama_jax.corpus.steps import Documents, Reader, Stage, Step


class Settings(pydantic.BaseModel, extra="forbid", frozen=True):
    max_characters: int
    sleep: float


class Lines(Reader):
    def read(self, path) -> Iterator[Document]:
        for number, line in enumerate(path.read_bytes().splitlines()):
            try:
                text = line.decode()
            except UnicodeDecodeError:
                yield self.skipped(f"{path.name}: line {number}", "invalid UTF-8")
                continue
            if text == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if text == "wait":
                path.with_name("waiting").write_text(str(os.getpid()))
                time.sleep(60)
            metadata = {"source": "toy", "url": f"http://{path.stem}/{number}", "language": "en"}
            yield Document(text=text, id=f"toy/{path.stem}/{number}", metadata=metadata)


class Upper(Step):
    name = "upper"

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings

    def prepare(self, rank: int) -> None:
        self.prefix = f"{rank}: "

    def process(self, document: Document) -> str | None:
        time.sleep(self.settings.sleep)
        document.text = document.text.upper()
        document.metadata["scores"] = {"length": float(len(document.text))}
        too_long = len(document.text) > self.settings.max_characters
        return "too many characters" if too_long else None


class Deduplicate(Step):
    """Drops what occurs earlier in the same task."""

    name = "deduplicate"

    def prepare(self, rank: int) -> None:
        self.seen: set[str] = set()

    def process(self, document: Document) -> str | None:
        if document.text in self.seen:
            return "duplicate"
        self.seen.add(document.text)
        return None


class Fail(Step):
    name = "fail"

    def prepare(self, rank: int) -> None:
        raise ValueError("no model: run llama-jax corpus models toy")

    def process(self, document: Document) -> str | None:
        return None


def looks_like(first_bytes: bytes, name: str) -> bool:
    return name.endswith(".txt")


def models(run: Run) -> list[Path]:
    return sorted(run.models.glob("*.model"))


def stages(run: Run) -> Iterator[Stage]:
    groups = [[path] for path in run.inputs]
    steps = [Lines(groups), Upper(run.settings)]
    if any(path.stem == "fail" for path in run.inputs):
        steps.append(Fail())
    yield Stage("lines", steps, len(groups))
    files = run.documents("lines")
    run.note("files", len(files))
    groups = [files[i : i + 2] for i in range(0, len(files), 2)]
    yield Stage("documents", [Documents(groups), Deduplicate()], len(groups), final=True)
