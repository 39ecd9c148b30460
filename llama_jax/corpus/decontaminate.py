"""Drops documents that contain text of evaluation sets.

Words are compared without case and punctuation. A document is dropped if it has ``ngram`` words in
a row in common with a question or an answer, or all of a shorter question.
"""

import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pydantic
from datatrove.data import Document
from datatrove.utils.hashing import HashConfig, create_hash_func

from llama_jax.corpus import evaluation_sets
from llama_jax.corpus.evaluation_sets import SUFFIXES, Text
from llama_jax.corpus.finished import CorpusFile, corpus_files
from llama_jax.corpus.run import Run
from llama_jax.corpus.steps import Documents, Stage, Step
from llama_jax.io import atomic_write, read_json

_WORD = re.compile(r"[^\W_]+")
_BLOCK = 1 << 20  # characters
_BASE = 0x9E3779B97F4A7C15  # odd: the base of the polynomial over the hashes of words


class Settings(pydantic.BaseModel, extra="forbid", frozen=True):
    """See ``configs/corpus/decontaminate.toml``."""

    ngram: int = pydantic.Field(ge=2, le=100)
    min_words: int = pydantic.Field(ge=2)
    ignored_fields: tuple[str, ...]


def looks_like(content: bytes, name: str) -> bool:
    """`stages` says what is missing."""
    return True


def stages(run: Run) -> Iterator[Stage]:
    settings: Settings = run.settings
    corpora, folder = corpus_files(run.inputs), run.folder("evaluation")
    texts = evaluation_sets.texts(_evaluation_files(run, corpora), settings.ignored_fields)
    index = Index.of(texts, settings.ngram, settings.min_words)
    index.save(folder)
    note = {"texts": len(index.places), "ngrams": index.hashes.size, "bytes": index.bytes}
    run.note("decontamination", note)
    steps = [
        Documents([[file.path] for file in corpora]),
        Decontaminate(folder, [file.folder for file in corpora]),
    ]
    yield Stage("decontaminate", steps, len(corpora), final=True, split="folder")


def _evaluation_files(run: Run, corpora: Iterable[CorpusFile]) -> dict[str, Path]:
    """The files of evaluation sets by name: those of arguments that hold no corpora.

    Raises:
        ValueError: There are none.
    """
    of_corpora, argument = {file.path for file in corpora}, lambda name: name.partition("/")[0]
    named = dict(zip(run.names, run.inputs, strict=True))
    other = {argument(name) for name, path in named.items() if path in of_corpora}
    found = {
        name: path
        for name, path in named.items()
        if argument(name) not in other and evaluation_sets.is_read(name)
    }
    if not found:
        raise ValueError(
            "no files of evaluation sets in the input; give their folder beside the corpora "
            f"(files of training splits are not read, the others are {', '.join(SUFFIXES)})"
        )
    return found


class Decontaminate(Step):
    """Drops a document with text of the index.

    Args:
        index: Folder of the index.
        folders: For each task, the folder of its documents in the output.
    """

    name = "decontaminate"

    def __init__(self, index: Path, folders: Sequence[str]):
        super().__init__()
        self.index, self.folders = index, folders

    def prepare(self, rank: int) -> None:
        self.loaded, self.folder = Index.load(self.index), self.folders[rank]

    def process(self, document: Document) -> str | None:
        document.metadata["folder"] = self.folder
        if not (match := self.loaded.find(document.text)):
            return None
        place, found = match
        document.metadata["detail"] = {"question": place, "words": found}
        return f"contains text of {place.partition(': ')[0]}"


class Index:
    """Hashes of the n-grams of all texts, sorted: 12 bytes each.

    Args:
        lengths: Numbers of words of the n-grams; ascending.
        hashes: uint64, of all n-grams, ascending.
        text: uint32, for each hash the index of its text.
        places: Of the texts.
    """

    def __init__(
        self, lengths: Sequence[int], hashes: np.ndarray, text: np.ndarray, places: Sequence[str]
    ):
        self.lengths, self.hashes, self.text, self.places = list(lengths), hashes, text, places

    @staticmethod
    def of(texts: Iterable[Text], ngram: int, min_words: int) -> "Index":
        """The index of texts.

        Args:
            texts: Of evaluation sets.
            ngram: Words of an n-gram.
            min_words: Fewest words of a shorter text, all of which is one n-gram. It must be the
                first text of its record with so many words: a question, not a choice.

        Raises:
            ValueError: No text has enough words.
        """
        places: list[str] = []
        lengths, parts, numbers = set(), [], []
        for place, text in texts:
            words, is_first = split_words(text), place not in places[-1:]
            if len(words) < (min_words if is_first else ngram):
                continue
            length = min(ngram, len(words))
            hashes = dict(ngram_hashes(word_hashes(text), [length]))[length]
            lengths.add(length)
            parts.append(hashes)
            numbers.append(np.full(len(hashes), len(places), np.uint32))
            places.append(place)
        if not parts:
            raise ValueError(f"no text of the evaluation sets has min_words = {min_words} words")
        hashes, first = np.unique(np.concatenate(parts), return_index=True)
        return Index(sorted(lengths), hashes, np.concatenate(numbers)[first], places)

    @property
    def bytes(self) -> int:
        return self.hashes.nbytes + self.text.nbytes

    def save(self, folder: Path) -> None:
        content = io.BytesIO()
        np.savez(content, hashes=self.hashes, text=self.text)
        atomic_write(folder / "index.npz", content.getvalue())
        record = {"lengths": self.lengths, "places": self.places}
        atomic_write(folder / "index.json", json.dumps(record).encode())

    @staticmethod
    def load(folder: Path) -> "Index":
        record, arrays = read_json(folder / "index.json", 2**32), np.load(folder / "index.npz")
        return Index(record["lengths"], arrays["hashes"], arrays["text"], record["places"])

    def find(self, text: str) -> tuple[str, str] | None:
        """The place of a text of the index that occurs in ``text``, and the words in common."""
        for length, hashes in ngram_hashes(word_hashes(text), self.lengths):
            at = np.searchsorted(self.hashes, hashes)
            at[at == len(self.hashes)] = 0
            if len(found := np.flatnonzero(self.hashes[at] == hashes)):
                start = int(found[0])
                place = self.places[int(self.text[at[start]])]
                return place, " ".join(split_words(text)[start : start + length])
        return None


def split_words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return _WORD.findall(_normalize(text))


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def word_hashes(text: str) -> np.ndarray:
    """Hashes of the words of a text, uint64 (words).

    In blocks, because a list of all words takes up to 30 times the memory of the text.
    """
    text = _normalize(text)
    word_hash = create_hash_func(HashConfig(precision=64, hash_fc="xxhash"))
    blocks, start = [np.zeros(0, np.uint64)], 0
    while start < len(text):
        end = start + _BLOCK
        while end < len(text) and text[end].isalnum():
            end += 1
        words = _WORD.findall(text, start, end)
        blocks.append(np.fromiter(map(word_hash, words), np.uint64, len(words)))
        start = end
    return np.concatenate(blocks)


def ngram_hashes(of_word: np.ndarray, lengths: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Hashes of all n-grams of some lengths.

    Args:
        of_word: See `word_hashes`.
        lengths: Numbers of words of the n-grams, ascending.

    Yields:
        Each length that is not more than the number of words, and uint64 (words - length + 1).
    """
    # n-grams of different lengths differ: the length is the first coefficient of the polynomial.
    total, power, summed = np.zeros(len(of_word), np.uint64), 1, 0
    for length in lengths:
        if length > len(of_word):
            return
        for k in range(summed, length):
            power = power * _BASE % 2**64
            total[: len(of_word) - k] += of_word[k:] * np.uint64(power)
        summed = length
        yield length, total[: len(of_word) - length + 1] + np.uint64(length)
