"""Tokenizer files: recognized by content, not by name, and converted to Hugging Face's format.

Three kinds are known: a SentencePiece model (LLaMA, Llama 2), tiktoken text (Llama 3) and
``tokenizer.json`` (Hugging Face).
"""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from llama_jax.config.loading import strings_of
from llama_jax.data import sentencepiece_json, tiktoken_text, tokenizer_json
from llama_jax.data.tokenizer_json import CONTROL_NAME
from llama_jax.io import MAX_JSON_BYTES, read_json, read_limited

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
_MAX_MODEL_BYTES = 8 << 20
"""Largest SentencePiece model; LLaMA's has 0.5 MB, Gemma's 4.7."""
_MAX_EXTRA_BYTES = 4 << 20
_MAX_VALUES = 3_000_000
"""Values in a tokenizer.json, which take 60 bytes or more each when parsed; Llama 3's has 1.1
million."""
EXTRAS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files that Hugging Face keeps beside a tokenizer."""
_TOKEN_SETTINGS = ("pad_token", "additional_special_tokens", "extra_special_tokens")
"""Keys of ``tokenizer_config.json`` that name control tokens."""
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer file whose kind is known; :attr:`size` and :attr:`ids` parse its content.

    Example::

      recognize(Path("tokenizer.model")).kind  # "sentencepiece"
    """

    path: Path
    kind: str
    """sentencepiece, tiktoken or tokenizer.json"""
    content: bytes = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """Number of tokens, special tokens included; ValueError if the file is damaged."""
        return self._vocabulary[0]

    @property
    def ids(self) -> dict[str, Any]:
        """Ids under bos, eos (an id or a list of stop ids) and pad; without those not defined."""
        return self._vocabulary[1]

    @functools.cached_property
    def _vocabulary(self) -> tuple[int, dict[str, Any]]:
        parse = {"sentencepiece": _sentencepiece, "tiktoken": _tiktoken, JSON_FILE: _json}
        try:
            return parse[self.kind](self.content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise self.damaged(e) from None

    def damaged(self, reason: Exception) -> ValueError:
        """The error to raise for a file that cannot be used."""
        problem = {
            "sentencepiece": "is not a SentencePiece model, tokenizer.json or tiktoken text, or",
            "tiktoken": "is a list of base64 tokens with ranks (tiktoken text) and",
            JSON_FILE: "is JSON, but not a usable tokenizer.json, or",
        }[self.kind]
        return ValueError(
            f"tokenizer {self.path} {problem} is damaged ({reason!s:.500}); copy it again, or "
            "leave it out"
        )


def recognize(path: Path) -> TokenizerFile:
    """Read a tokenizer file and determine its kind from its content.

    Anything that is neither JSON nor tiktoken text is read as a SentencePiece model.

    Raises:
      ValueError: missing, empty, too large, or a Git LFS pointer; names the file.
    """
    try:
        content = read_limited(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise ValueError(f"tokenizer {path} does not exist{_other_tokenizers(path)}") from None
    except ValueError as e:
        raise ValueError(f"tokenizer {e}") from None
    except OSError as e:
        raise ValueError(f"tokenizer {path} cannot be read: {e.strerror}") from None
    if not content:
        raise ValueError(f"tokenizer {path} is empty: it is damaged; copy it again")
    if content.lstrip()[:1] in (b"{", b"["):
        return TokenizerFile(path, JSON_FILE, content)
    kind = "tiktoken" if _TIKTOKEN_LINE.match(content) else "sentencepiece"
    return TokenizerFile(path, kind, content)


def _other_tokenizers(path: Path) -> str:
    folder = path.parent
    found = sorted(p.name for p in folder.glob("*token*")) if folder.is_dir() else []
    listed = f" (the folder has {', '.join(found)})" if found else ""
    return f"{listed}; give a tokenizer's file, or a folder with a {MODEL_FILE} or {JSON_FILE}"


def _json(content: bytes) -> tuple[int, dict[str, Any]]:
    if sum(map(content.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise ValueError(f"it has over {_MAX_VALUES:,} values, too many for a tokenizer")
    tree = json.loads(content)
    vocab = tree["model"]["vocab"]
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    ids += [t["id"] for t in tree.get("added_tokens") or []]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError("its ids are not integers from 0")
    return 1 + max(ids), {}


def _tiktoken(content: bytes) -> tuple[int, dict[str, Any]]:
    n = len(tiktoken_text.ranks_of(content))
    # Meta's 256 special tokens follow: 0 begins a text, 1 ends it, 8 and 9 end a message.
    return n + 256, {"bos": n, "eos": [n + 1, n + 8, n + 9]}


def _sentencepiece(content: bytes) -> tuple[int, dict[str, Any]]:
    model, _ = load_sentencepiece(content)
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    return len(model), {k: v for k, v in ids.items() if v >= 0}


def load_sentencepiece(content: bytes) -> tuple[Any, Any]:
    """The ``SentencePieceProcessor`` and the ``ModelProto`` of the content of a model file.

    User-defined pieces with names such as ``<|im_start|>`` become control tokens: see
    :func:`tokenizer_json.with_controls`.

    Raises:
      ValueError: something else, or damaged.
    """
    import sentencepiece

    sentencepiece.set_min_log_level(3)  # errors are exceptions; the log repeats them
    if len(content) > _MAX_MODEL_BYTES:
        raise ValueError(f"it has more than {_MAX_MODEL_BYTES:,} bytes")
    proto = sentencepiece_json.parse(content)  # stricter than SentencePiece
    user_defined = [p for p in proto.pieces if p.type == sentencepiece_json.USER_DEFINED]
    controls = [p for p in user_defined if CONTROL_NAME.fullmatch(p.piece)]
    for piece in controls:
        piece.type = sentencepiece_json.CONTROL
    if controls:
        content = proto.SerializeToString()
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content), proto
    except Exception as e:  # RuntimeError, other exceptions in older releases
        raise ValueError(str(e)) from None


# Tokenizers beside weights -----------------------------------------------------------------------


def find(folder: Path) -> list[TokenizerFile]:
    """The ``tokenizer.model`` and ``tokenizer.json`` of a folder, those that exist.

    Tokens that were added to a ``tokenizer.model`` in other files, as transformers wrote them
    before ``tokenizer.json``, give a ``tokenizer.json`` with all of them.

    Raises:
      ValueError: one of them is damaged.
    """
    paths = [folder / name for name in (MODEL_FILE, JSON_FILE)]
    found = [recognize(p) for p in paths if os.path.lexists(p)]
    for file in found:
        _ = file.size  # raises for a damaged file
    if [file.kind for file in found] == ["sentencepiece"]:
        found += _with_added_tokens(folder, found[0])
    return found


def _with_added_tokens(folder: Path, model: TokenizerFile) -> list[TokenizerFile]:
    """A ``tokenizer.json`` with the tokens that other files add to a model; none if there are none.

    ``added_tokens.json`` has their ids, and ``added_tokens_decoder`` in ``tokenizer_config.json``
    (from 2023 on) their settings as well.
    """
    paths = [folder / name for name in ("added_tokens.json", "tokenizer_config.json")]
    ids, settings = (read_json(p, _MAX_EXTRA_BYTES) if p.is_file() else {} for p in paths)
    special = folder / "special_tokens_map.json"
    named = read_json(special, _MAX_EXTRA_BYTES) if special.is_file() else {}
    names = {*strings_of(named), *strings_of({k: settings.get(k) for k in _TOKEN_SETTINGS})}
    tokens = {}
    try:
        for name, i in ids.items():
            tokens[i] = tokenizer_json.added_token(i, name, special=name in names)
        for i, given in (settings.get("added_tokens_decoder") or {}).items():
            flags = {key: bool(given.get(key)) for key in ("special", "lstrip", "rstrip")}
            tokens[int(i)] = tokenizer_json.added_token(int(i), given["content"]) | flags
        added = [tokens[i] for i in sorted(tokens) if i >= model.size]
        if not added:
            return []
        path = paths[0] if added[0]["content"] in ids else paths[1]
        tree = sentencepiece_json.with_added(
            sentencepiece_json.to_json(model.content), added, prefix_after_controls(folder)
        )
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(
            f"the tokens that {folder} adds to {model.path.name} cannot be used: {e!s:.300}; write "
            "a tokenizer.json with transformers (save_pretrained)"
        ) from None
    return [TokenizerFile(path, JSON_FILE, json.dumps(tree, ensure_ascii=False).encode())]


def prefix_after_controls(folder: Path) -> bool:
    """Whether text after a control token gets the space that is added before a text, as the files
    beside a ``tokenizer.model`` say."""
    settings = folder / "tokenizer_config.json"
    given = read_json(settings, _MAX_EXTRA_BYTES) if settings.is_file() else {}
    return given.get("legacy") is not False


def find_in_parent(folder: Path, size: int) -> tuple[list[TokenizerFile], list[str]]:
    """The tokenizer in the parent of a folder called 7B, 13B and so on, as Meta published LLaMA 1.

    Args:
      folder: a folder of weights.
      size: tokens that the tokenizer must have.

    Returns:
      The tokenizer, if there is one that fits; and a warning that says what was used or not used.
    """
    folder = folder.resolve()
    path = folder.parent / MODEL_FILE
    if not re.search(r"(?i)\b\d+b\b", folder.name) or not path.is_file():
        return [], []
    try:
        found = recognize(path)
        found_size = found.size
    except ValueError as e:
        return [], [f"the tokenizer of the parent folder is not used: {e}"]
    if found_size != size:
        return [], [
            f"{path} is not used: it has {found_size} tokens, the embedding {size} rows; copy it "
            f"into {folder} if it belongs to these weights"
        ]
    return [found], [f"tokenizer: {path}, from the parent folder, as Meta published LLaMA 1"]


def extras(folder: Path) -> list[Path]:
    """The files of :data:`EXTRAS` in a folder.

    Raises:
      ValueError: one of them is damaged; names it.
    """
    found = [folder / name for name in EXTRAS if os.path.lexists(folder / name)]
    for path in found:
        if path.suffix == ".json":
            read_json(path, _MAX_EXTRA_BYTES)
            continue
        try:
            read_limited(path, _MAX_EXTRA_BYTES).decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is damaged: not UTF-8 text ({e})") from None
    return found


# Meta's tokenizers in Hugging Face's format ------------------------------------------------------


def hf_json(file: TokenizerFile, newer: bool) -> dict[str, Any]:
    """The ``tokenizer.json`` that gives the same ids as a SentencePiece model or tiktoken text.

    Args:
      file: the tokenizer.
      newer: Llama 3's special tokens get the names of Llama 3.1 and later.

    Raises:
      ValueError: no ``tokenizer.json`` gives the same ids; says why.
    """
    if file.kind == "sentencepiece":
        tree = sentencepiece_json.to_json(file.content)
        is_legacy = prefix_after_controls(file.path.parent)
        return tree if is_legacy else sentencepiece_json.with_added(tree, [], False)
    return tiktoken_text.to_json(tiktoken_text.ranks_of(file.content), newer)


def hf_settings(file: TokenizerFile, context: int, exact: bool) -> dict[str, Any]:
    """``tokenizer_config.json`` for a SentencePiece model or tiktoken text.

    Args:
      file: the tokenizer.
      context: the longest text, in tokens.
      exact: a ``tokenizer.json`` of :func:`hf_json` is beside it.
    """
    shared = {"clean_up_tokenization_spaces": False, "model_max_length": context}
    if file.kind == "sentencepiece":
        # transformers 5's LlamaTokenizer drops the first space of a text that starts with one.
        name = "PreTrainedTokenizerFast" if exact else "LlamaTokenizer"
        llama = {"add_bos_token": True, "add_eos_token": False, "legacy": True}
        names = sentencepiece_json.special_names(file.content)
        return {"tokenizer_class": name, **llama, **names, **shared}
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **names, **shared}
