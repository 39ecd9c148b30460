"""Near-duplicates within and between sources: MinHash, with datatrove's steps.

Groups of near-duplicates are connected: if a is like b and b is like c, one of the three stays.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig

from llama_jax.corpus.finished import CorpusFile, corpus_files
from llama_jax.corpus.run import Run
from llama_jax.corpus.steps import Documents, Stage, Step, is_dropped
from llama_jax.io import atomic_write, read_json

MAX_TASKS = 500  # a bucket has one open file for each
_BLOCK = 2**16  # n-grams that are hashed at a time: 60 MB for each temporary array


class Settings(pydantic.BaseModel, extra="forbid", frozen=True):
    """See ``configs/corpus/deduplicate.toml``."""

    priority: tuple[str, ...]
    ngram: int = pydantic.Field(ge=1, le=100)
    buckets: int = pydantic.Field(ge=1, le=1000)
    hashes: int = pydantic.Field(ge=1, le=1000)
    seed: int = pydantic.Field(ge=0, lt=2**32)


def looks_like(content: bytes, name: str) -> bool:
    """`stages` says what is missing."""
    return True


def stages(run: Run) -> Iterator[Stage]:
    settings: Settings = run.settings
    grouped = by_priority(corpus_files(run.inputs), settings.priority)
    groups, first = [[file.path for file in g] for g in grouped], [g[0] for g in grouped]
    signatures, pairs, clusters = map(run.folder, ("signatures", "pairs", "clusters"))
    config = MinhashConfig(
        n_grams=settings.ngram,
        num_buckets=settings.buckets,
        hashes_per_bucket=settings.hashes,
        seed=settings.seed,
        hash_config=HashConfig(precision=64, hash_fc="xxhash"),
    )
    signature = Signature(signatures, config)
    yield Stage("signatures", [Documents(groups), signature], len(groups))
    yield Stage("pairs", [Pairs(str(signatures), str(pairs), config=config)], settings.buckets)
    yield Stage("clusters", [Clusters(signatures, pairs, clusters, first)], 1)
    _write_state(run, signatures, pairs)
    steps = [Documents(groups), Duplicates(clusters, first)]
    yield Stage("deduplicate", steps, len(groups), final=True, split="folder")


def by_priority(files: Sequence[CorpusFile], priority: Sequence[str]) -> list[list[CorpusFile]]:
    """Files for each task, in the order in which their documents are kept.

    Args:
        files: Of all sources.
        priority: Names of sources; sources not named come last.

    Returns:
        About `MAX_TASKS` groups at most; the files of a group have one folder.
    """
    rank = {source: i for i, source in enumerate(priority)}
    key = lambda f: (rank.get(f.source, len(rank)), f.source, f.folder)
    ordered = sorted(files, key=lambda f: (key(f), f.path))
    size = -(-len(files) // MAX_TASKS)
    folders = [list(found) for _, found in itertools.groupby(ordered, key)]
    return [found[i : i + size] for found in folders for i in range(0, len(found), size)]


class Signature(MinhashDedupSignature):
    """Writes the MinHash signatures of a task's documents; yields nothing.

    Words are what stands between spaces after datatrove's normalization, in place of its word
    splitters, each of which is made for one language.
    """

    def __init__(self, folder: Path, config: MinhashConfig):
        super().__init__(str(folder), config)
        self.folder, self.word_tokenizer = folder, _Words()

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Of a part at a time, so that a book needs no more memory than a page."""
        parts = [shingles[i : i + _BLOCK] for i in range(0, len(shingles), _BLOCK)]
        return np.min([super(Signature, self).get_signature(p) for p in parts], axis=0).tolist()

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        ids = []

        def documents() -> Iterator[Document]:
            for document in data:
                if not is_dropped(document):
                    ids.append(document.id)
                    yield document

        super().run(documents(), rank, world_size)
        atomic_write(ids_file(self.folder, rank), json.dumps(ids).encode())
        return iter(())


def ids_file(signatures: Path, rank: int) -> Path:
    """The file with the ids of a task's documents."""
    return signatures / f"{rank:05d}.ids.json"


class _Words:
    def word_tokenize(self, text: str) -> list[str]:
        return text.split()


class Pairs(MinhashDedupBuckets):
    """Writes pairs of documents with an equal bucket; one task a bucket; yields nothing."""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        super().run(None, rank, world_size)
        return iter(())


class Clusters(PipelineStep):
    """Writes for each task which documents are dropped, and what is kept in their place.

    datatrove's step keeps an arbitrary document of a group; this one keeps the first.

    Args:
        signatures: Folder that `Signature` has written.
        pairs: Folder that `Pairs` has written.
        output: Folder to write: NNNNN.json for each task, {number of the dropped document: [source,
            id of the kept document]}.
        files: The first file of each task.
    """

    type, name = "step", "clusters"

    def __init__(self, signatures: Path, pairs: Path, output: Path, files: Sequence[CorpusFile]):
        super().__init__()
        self.signatures, self.pairs, self.output, self.files = signatures, pairs, output, files

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        removed = np.empty((0, 4), np.uint32)
        for path in sorted(self.pairs.glob("*.dups")):
            # What is dropped so far stands for the pairs so far: the same groups result.
            new = np.fromfile(path, "<u4").reshape(-1, 4)
            removed = removed_documents(np.concatenate([removed, new]))
        kept = self._kept(removed[:, 2:])
        ends = np.searchsorted(removed[:, 0], np.arange(1, len(self.files)))
        for task, rows in enumerate(np.split(removed, ends)):
            record = {number: kept[t, n] for _, number, t, n in rows.tolist()}
            atomic_write(self.output / f"{task:05d}.json", json.dumps(record).encode())
        return iter(())

    def _kept(self, documents: np.ndarray) -> dict[tuple[int, int], tuple[str, str]]:
        """Source and id of documents; uint32 (n, 2): file and number."""
        found, ids, last = {}, [], -1
        for task, number in np.unique(documents, axis=0).tolist():
            if task != last:
                ids, last = json.loads(ids_file(self.signatures, task).read_bytes()), task
            found[task, number] = self.files[task].source, ids[number]
        return found


def removed_documents(pairs: np.ndarray) -> np.ndarray:
    """Which documents are dropped: all of each connected group except the first.

    Args:
        pairs: uint32 (n, 4): task and number of one document, task and number of another.

    Returns:
        uint32 (m, 4), sorted: task and number of the dropped document, and of the kept one.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return np.empty((0, 4), np.uint32)
    wide = pairs.astype(np.uint64)
    keys = (wide[:, 0::2] << 32) | wide[:, 1::2]
    nodes, edges = np.unique(keys, return_inverse=True)
    left, right = edges.reshape(-1, 2).T
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(len(nodes),) * 2)
    _, group = connected_components(graph, directed=False)
    _, first = np.unique(group, return_index=True)  # nodes are sorted: the first of each group
    kept = nodes[first[group]]
    parts = [part for node in (nodes, kept) for part in (node >> 32, node & (2**32 - 1))]
    return np.stack(parts, axis=1)[nodes != kept].astype(np.uint32)


class Duplicates(Step):
    """Drops the documents that `Clusters` names.

    Args:
        clusters: Folder that `Clusters` has written.
        files: The first file of each task.
    """

    name = "deduplicate"

    def __init__(self, clusters: Path, files: Sequence[CorpusFile]):
        super().__init__()
        self.clusters, self.files = clusters, files

    def prepare(self, rank: int) -> None:
        self.kept = read_json(self.clusters / f"{rank:05d}.json", 2**32)
        self.folder, self.number = self.files[rank].folder, -1

    def process(self, document: Document) -> str | None:
        self.number += 1
        document.metadata["folder"] = self.folder
        if not (kept := self.kept.get(str(self.number))):
            return None
        source, document.metadata["detail"] = kept[0], {"kept": kept[1]}
        return f"near-duplicate of a document of {source}"


def _write_state(run: Run, signatures: Path, pairs: Path) -> None:
    """Notes the size of what deduplication keeps on the disk, for the manifest."""
    size = lambda folder: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    state = {"signature_bytes": size(signatures), "pair_bytes": size(pairs)}
    run.note("deduplication", state)
