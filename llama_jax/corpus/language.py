"""Language identification with fastText's model of 176 languages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document

from llama_jax.corpus.steps import Step


class Language(Step):
    """Sets the language and its score; drops documents without a clear or wanted language.

    Args:
        model: File of the fastText model.
        min_score: Lowest score of the best language, after rounding to 2 digits as CCNet does.
        languages: Codes that are kept; empty: all.
    """

    name = "language"

    def __init__(self, model: Path, min_score: float, languages: Sequence[str]):
        super().__init__()
        self.path, self.min_score, self.languages = model, min_score, tuple(languages)

    def prepare(self, rank: int) -> None:
        self.model = load_fasttext(self.path)

    def process(self, document: Document) -> str | None:
        language, score = predict(self.model, document.text)
        document.metadata["language"] = language
        document.metadata["scores"]["language"] = score
        if score < self.min_score:
            return f"language score below {self.min_score:g}"
        if self.languages and language not in self.languages:
            return f"language {language}"
        return None


def load_fasttext(path: Path) -> Any:
    from fasttext.FastText import _FastText  # the function load_model prints a warning

    return _FastText(str(path))


def predict(model: Any, text: str) -> tuple[str, float]:
    """The most probable label without its prefix, and its probability rounded to 2 digits."""
    labels, probabilities = model.predict(one_line(text))
    if not labels:
        return "unknown", 0.0
    return labels[0].removeprefix("__label__"), round(min(float(probabilities[0]), 1.0), 2)


def one_line(text: str) -> str:
    """The text without line breaks, as CCNet identifies its language."""
    return text.replace("\n", "").encode("utf-8", "replace").decode()
