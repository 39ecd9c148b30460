"""The files of finished corpora, which later commands read."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llama_jax.corpus.manifest import MANIFEST, MAX_BYTES, STARTED, read_manifest
from llama_jax.corpus.recipe import AFTERWARDS
from llama_jax.io import read_json


class CorpusFile(NamedTuple):
    """A file of documents.

    Attributes:
        path: The file.
        source: Name of the source of its documents.
        folder: Source and split, as in "commoncrawl/en_head".
        documents: Number of documents.
        text_bytes: Size of their text in UTF-8.
    """

    path: Path
    source: str
    folder: str
    documents: int
    text_bytes: int


def corpora(folder: Path) -> list[CorpusFile]:
    """The files of the finished corpus in a folder, or of all finished corpora in its folders.

    Raises:
        ValueError: There is none, or an unfinished one.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; give a finished corpus, or a folder of several"
        )
    places = [folder] if _is_corpus(folder) else sorted(filter(_is_corpus, folder.iterdir()))
    if not places:
        raise ValueError(f"{folder} has no finished corpus, which is a folder with {MANIFEST}")
    return [file for place in places for file in _files(place)]


def corpus_files(inputs: Iterable[Path]) -> list[CorpusFile]:
    """The files of documents among all files of finished corpora.

    Raises:
        ValueError: No finished corpus, or an unfinished one.
    """
    inputs = set(inputs)
    folders = {folder for path in inputs for folder in path.parents}
    places = sorted(filter(_is_corpus, folders))
    files = [file for place in places for file in _files(place) if file.path in inputs]
    if not files:
        raise ValueError(
            f"the input has no finished corpus, which is a folder with {MANIFEST} and documents; "
            "give what `llama-jax corpus SOURCE` has written"
        )
    return files


def _is_corpus(folder: Path) -> bool:
    """Whether a folder is a finished corpus; an unfinished one is an error."""
    if (folder / MANIFEST).is_file():
        return "files" in read_json(folder / MANIFEST, MAX_BYTES)
    if (folder / STARTED).is_file():
        raise ValueError(f"{folder} is not finished: no {MANIFEST}; run its command again")
    return False


def _files(place: Path) -> Iterator[CorpusFile]:
    manifest = read_manifest(place)
    for name, entry in sorted(manifest["files"].items()):
        source, split = manifest["source"], list(Path(name).parts[1:-1])
        if source in AFTERWARDS:  # these have a folder for each source
            source, *split = split
        if not (path := place / name).is_file():
            raise ValueError(f"{path} is missing; make the corpus again")
        folder = "/".join((source, *split))
        yield CorpusFile(path, source, folder, entry["documents"], entry["text_bytes"])
