"""Answers of a model, kept in a file as they are computed, so that a run continues after a kill."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.io import open_regular


class Answer(NamedTuple):
    """The answer to one request of the harness."""

    value: Any
    """log-likelihood and whether greedy decoding gives the continuation; or a sum; or a text"""
    truncated: bool
    """whether the prompt was longer than the model's context"""


class Journal:
    """Answers by request. Each is one line of a JSON Lines file.

    The key of an answer is a hash of ``identity`` and of the request, so that answers of another
    model or of other settings in the same file are never used.

    Args:
      path: the file; None keeps the answers in memory only.
      identity: what the answers depend on beside the requests: the hash of the weights, and
        settings such as the dtype.
    """

    def __init__(self, path: Path | None = None, identity: str = ""):
        self._path, self._identity = path, identity
        self._answers: dict[str, Answer] = {}
        if path is not None and path.exists():
            self._read(path)

    def key(self, kind: str, args: tuple, repeat: int) -> str:
        """The key of a request.

        Args:
          kind: type of the request, such as "loglikelihood".
          args: its arguments, values of JSON.
          repeat: number of this answer among those to equal requests.
        """
        request = json.dumps([self._identity, kind, args, repeat], sort_keys=True)
        return hashlib.sha256(request.encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def add(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Keep answers; all of them are in the file when this returns."""
        answers = list(answers)
        self._answers.update(answers)
        if self._path is None:
            return
        lines = [
            json.dumps({"key": key, "answer": answer.value, "truncated": answer.truncated}) + "\n"
            for key, answer in answers
        ]
        with self._path.open("ab", buffering=0) as f:
            content = "".join(lines).encode()
            if f.write(content) != len(content):
                raise OSError(f"{self._path} could not be written: the disk may be full")

    def _read(self, path: Path) -> None:
        """Read the file, and remove a last line that is incomplete."""
        with open_regular(path) as f:
            content = f.readall()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            os.truncate(path, complete)
        for line in content[:complete].splitlines():
            try:
                record = json.loads(line)
                answer = Answer(record["answer"], record["truncated"])
                self._answers[record["key"]] = answer
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a damaged line: the request is computed again
