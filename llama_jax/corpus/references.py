"""A classifier of pages like those that Wikipedia cites: its step, and its training."""

from collections.abc import Iterable
from pathlib import Path

from datatrove.data import Document

from llama_jax.corpus.language import load_fasttext, one_line
from llama_jax.corpus.steps import Step

_CITED, _OTHER = "__label__wiki", "__label__cc"


class References(Step):
    """Adds the probability that Wikipedia cites a page, and drops pages where it is low.

    The classifier knows whole pages only; the probability of short texts is near 0.

    Args:
        model: File of the fastText model.
        min_probability: Pages with less are dropped.
    """

    name = "references"

    def __init__(self, model: Path, min_probability: float):
        super().__init__()
        self.path, self.min_probability = model, min_probability

    def prepare(self, rank: int) -> None:
        self.model = load_fasttext(self.path)

    def process(self, document: Document) -> str | None:
        probability = round(cited_probability(self.model, document.text), 4)
        document.metadata["scores"]["references"] = probability
        if probability < self.min_probability:
            return f"probability of a Wikipedia reference below {self.min_probability:g}"
        return None


def cited_probability(model, text: str) -> float:
    labels, probabilities = model.predict(_page_line(text), k=2)
    return min(1.0, float(dict(zip(labels, probabilities, strict=True)).get(_CITED, 0.0)))


def _page_line(text: str) -> str:
    return one_line(" ".join(text.split()))


def train(positive: Iterable[str], negative: Iterable[str], folder: Path):
    """Trains the classifier with the defaults of ``fasttext supervised``, as RedPajama did.

    Args:
        positive: Texts of pages that Wikipedia cites.
        negative: Texts of other pages. Of the side with more pages, only as many as the other
            has are used.
        folder: For a temporary file.

    Returns:
        The fastText model.

    Raises:
        ValueError: One side has no pages, or fastText cannot train on them.
    """
    import fasttext

    path = folder / "references.txt"
    pages = 0
    with path.open("w", encoding="utf-8") as file:
        # One after the other: fastText does not shuffle.
        for cited, other in zip(positive, negative, strict=False):
            file.write(f"{_CITED} {_page_line(cited)}\n{_OTHER} {_page_line(other)}\n")
            pages += 1
    if not pages:
        raise ValueError("--positive and --negative both need pages")
    try:
        # 12 threads, as in the program: with fewer than 10, fastText 0.9.2 leaves a part of its
        # weights uninitialized. The result depends slightly on their timing.
        return fasttext.train_supervised(str(path), thread=12, verbose=0)
    except RuntimeError as e:
        raise ValueError(f"fastText cannot train on {pages:,} pages of each kind: {e}") from None
