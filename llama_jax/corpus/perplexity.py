"""Quality of a document as CCNet measures it: its perplexity under a language model of Wikipedia.

Documents are split into head, middle and tail at two perplexities per language. These depend on
the language model, so by default they are percentiles of the scores of the run itself: a first
stage writes how often each score occurs, a second one splits the documents.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from llama_jax.corpus.steps import Step, is_dropped
from llama_jax.io import atomic_write

BUCKETS = ("head", "middle", "tail")
NO_MODEL = "all"
"""The bucket of documents in a language without a model, as in CCNet."""

_PUNCTUATION = {
    "，": ",", "。": ".", "、": ",", "„": '"', "”": '"', "“": '"', "«": '"', "»": '"', "１": '"',
    "」": '"', "「": '"', "《": '"', "》": '"', "´": "'", "∶": ":", "：": ":", "？": "?", "！": "!",
    "（": "(", "）": ")", "；": ";", "–": "-", "—": " - ", "．": ". ", "～": "~", "’": "'",
    "…": "...", "━": "-", "〈": "<", "〉": ">", "【": "[", "】": "]", "％": "%", "►": "-",
}  # fmt: skip
_TRANSLATION = str.maketrans(_PUNCTUATION | {chr(i): "" for i in [*range(32), *range(127, 160)]})
_DIGIT = re.compile(r"\d")


def normalize(line: str) -> str:
    """A line in lower case, without accents, with 0 for each digit and ASCII punctuation."""
    line = line.strip().lower()
    if not line.isascii():
        line = unicodedata.normalize("NFD", line)
        line = "".join(c for c in line if unicodedata.category(c) != "Mn")
    return _DIGIT.sub("0", line).translate(_TRANSLATION)


class LanguageModel:
    """A SentencePiece tokenizer and a KenLM model of one language."""

    def __init__(self, folder: Path, language: str):
        import kenlm
        from sentencepiece import SentencePieceProcessor

        tokenizer, model = model_paths(folder, language)
        self.tokenizer = SentencePieceProcessor(model_file=str(tokenizer), num_threads=1)
        self.model = kenlm.Model(str(model))

    def perplexity(self, text: str) -> float:
        """10 ** (-log10 probability / tokens), rounded to 0.1; each line ends with a token."""
        log_probability, tokens = 0.0, 0
        for pieces in self.tokenizer.encode_as_pieces([normalize(x) for x in text.split("\n")]):
            line = " ".join(pieces)
            log_probability += self.model.score(line)
            tokens += len(line.split()) + 1
        return round(10.0 ** (-log_probability / tokens), 1)


def model_paths(folder: Path, language: str) -> tuple[Path, Path]:
    """Files of the tokenizer and the model of a language; the names are CCNet's."""
    return folder / f"{language}.sp.model", folder / f"{language}.arpa.bin"


class Perplexity(Step):
    """Adds the perplexity to the scores; writes how often each one occurs, for ``cutoffs``.

    Args:
        models: Folder of the models.
        languages: Those that have a model; documents in others get no perplexity.
        folder: Where to write.
    """

    name = "perplexity"

    def __init__(self, models: Path, languages: Sequence[str], folder: Path):
        super().__init__()
        self.models, self.languages, self.folder = models, tuple(languages), folder

    def prepare(self, rank: int) -> None:
        self.loaded: dict[str, LanguageModel] = {}

    def process(self, document: Document) -> str | None:
        language = document.metadata["language"]
        if language in self.languages:
            if language not in self.loaded:
                self.loaded[language] = LanguageModel(self.models, language)
            perplexity = self.loaded[language].perplexity(document.text)
            document.metadata["scores"]["perplexity"] = perplexity
        return None

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        counts: dict[str, Counter[float]] = {}
        for document in super().run(data, rank, world_size):
            score = document.metadata.get("scores", {}).get("perplexity")
            if score is not None and not is_dropped(document):
                counts.setdefault(document.metadata["language"], Counter())[score] += 1
            yield document
        content = {language: sorted(scores.items()) for language, scores in counts.items()}
        atomic_write(self.folder / f"{rank:05d}.json", json.dumps(content).encode())


def cutoffs(folder: Path, percentiles: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """The perplexities of each language at which middle begins, and tail.

    Args:
        folder: Where ``Perplexity`` has written.
        percentiles: Share of the documents below each cut-off, in percent.
    """
    counts: dict[str, Counter[float]] = {}
    for path in sorted(folder.glob("*.json")):
        for language, scores in json.loads(path.read_bytes()).items():
            counter = counts.setdefault(language, Counter())
            for score, number in scores:
                counter[score] += number
    return {
        language: (_percentile(scores, percentiles[0]), _percentile(scores, percentiles[1]))
        for language, scores in sorted(counts.items())
    }


def _percentile(counts: Counter[float], percent: float) -> float:
    """The percentile, with linear interpolation; a score that equals it is below the cut-off."""
    scores = sorted(counts)
    ends = np.cumsum([counts[score] for score in scores])
    position = percent / 100 * (ends[-1] - 1)
    low, high = (
        scores[np.searchsorted(ends, index, side="right")]
        for index in (math.floor(position), math.ceil(position))
    )
    return float(np.nextafter(low + (position - math.floor(position)) * (high - low), np.inf))


class Bucket(Step):
    """Sets ``bucket`` to head, middle or tail, and drops the buckets that are not wanted.

    Args:
        cutoffs: For each language, the perplexities at which middle and tail begin.
        keep: Buckets that are kept.
    """

    name = "bucket"

    def __init__(self, cutoffs: Mapping[str, Sequence[float]], keep: Sequence[str]):
        super().__init__()
        self.cutoffs, self.keep = dict(cutoffs), tuple(keep)

    def process(self, document: Document) -> str | None:
        perplexity = document.metadata["scores"].get("perplexity")
        cuts = self.cutoffs.get(document.metadata["language"])
        if perplexity is None or cuts is None:
            bucket = NO_MODEL
        else:
            bucket = BUCKETS[sum(perplexity >= cut for cut in cuts)]
        document.metadata["bucket"] = bucket
        if bucket != NO_MODEL and bucket not in self.keep:
            return f"{bucket} of the perplexities"
        return None
