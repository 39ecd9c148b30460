"""The tokenizer and chat template in the metadata of a GGUF file.

A SentencePiece model is stored as pieces, scores and types; a byte-level BPE as tokens, merges and
the name of its pre-tokenizer, the rule by which llama.cpp splits text before it merges.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert import sources
from llama_jax.convert.formats import ConvertError, short
from llama_jax.convert.gguf_file import Metadata
from llama_jax.convert.gguf_pre_tokenizer import (
    ADDS_BOS,
    ALIASES,
    IGNORES_MERGES,
    name_of,
    pre_tokenizer,
)
from llama_jax.convert.sources import Report, SourceCheckpoint
from llama_jax.data import sentencepiece_json, tiktoken_text, tokenizer_json
from llama_jax.data.chat_template import default_template, either_template
from llama_jax.data.tokenizer_files import JSON_FILE, TokenizerFile

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_STOP_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<|end_of_text|>",
    "<|endoftext|>", "<EOT>",
)  # fmt: skip
"""control tokens at which llama.cpp stops, whether or not the metadata names them"""
_TEMPLATE = "tokenizer.chat_template"


# Reading ------------------------------------------------------------------------------------------


def read(
    metadata: Metadata, rows: int, path: Path
) -> tuple[dict[str, Any], list[TokenizerFile], dict[str, bytes], list[str]]:
    """The tokenizer of a file.

    Args:
      metadata: of the file.
      rows: rows of the embedding.
      path: the file, for messages.

    Returns:
      Ids of bos, eos and pad; tokenizer files; other small files by name; warnings.

    Raises:
      ConvertError: it is damaged or of a kind that cannot be reproduced; says which.
    """
    kind = metadata.get(f"{_KEY}model")
    if not isinstance(kind, str) or kind not in ("llama", "gpt2"):
        raise ConvertError(
            f"{path}: {_KEY}model={short(kind)} is not supported, only 'llama' (SentencePiece) and "
            "'gpt2' (byte-level BPE)"
        )
    tokens, types = _tokens(metadata, rows, path)
    for name, i in (("bos", 1), ("eos", 2)):
        if kind == "llama" and types[i : i + 1] == [_CONTROL]:  # as llama.cpp, if it is not given
            metadata = {f"{_KEY}{name}_token_id": i} | metadata
    report = Report(str(path))
    ids = _token_ids(metadata, tokens, types, report)
    read_files = _sentencepiece if kind == "llama" else _byte_level
    files = read_files(metadata, tokens, types, ids, path)
    if kind == "gpt2" and f"{_KEY}pre" not in metadata:
        report.warn(f"{_KEY}pre is missing: text is split by the rule 'default', as llama.cpp does")
    settings = {
        f"{name}_token": tokens[ids[name]]
        for name in ("bos", "pad") if name in ids
    }  # fmt: skip
    if "eos" in ids:
        settings["eos_token"] = tokens[_first(ids["eos"])]
    generated = {}
    if any(file.kind == JSON_FILE for file in files):
        more = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        generated["tokenizer_config.json"] = json.dumps(more | settings, indent=1).encode()
    elif "bos" in ids and metadata.get(f"{_KEY}add_bos_token") is False:
        # tokenizer.model has no BOS then, which a template may write all the same.
        more = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": True}
        generated["tokenizer_config.json"] = json.dumps(more | settings, indent=1).encode()
    template, tool_use = metadata.get(_TEMPLATE), metadata.get(f"{_TEMPLATE}.tool_use")
    for key, value in ((_TEMPLATE, template), (f"{_TEMPLATE}.tool_use", tool_use)):
        if not isinstance(value, str | None):
            raise ConvertError(f"{path}: {key}={short(value)} is not text")
    if template is not None:
        text = template if tool_use is None else either_template(template, tool_use)
        generated["chat_template.jinja"] = text.encode()
    return ids, files, generated, report.warnings


def _first(ids: Any) -> int:
    return ids[0] if isinstance(ids, list) else ids


def _tokens(metadata: Metadata, rows: int, path: Path) -> tuple[list[str], list[int]]:
    """Tokens and their types, without the padding that gives each row of the embedding a token."""
    tokens = metadata.get(f"{_KEY}tokens")
    if not isinstance(tokens, list):
        raise ConvertError(f"{path}: {_KEY}tokens is missing or not a list of texts")
    if len(tokens) != rows:
        raise ConvertError(
            f"{path}: {_KEY}tokens has {len(tokens)} tokens, token_embd.weight {rows} rows: the "
            "tokenizer is another model's; convert the file again from the original weights"
        )
    kinds = metadata.get(f"{_KEY}token_type", np.full(len(tokens), _NORMAL))
    whole = isinstance(kinds, np.ndarray) and kinds.dtype.kind in "iu"
    if not whole or len(kinds) != len(tokens):
        raise ConvertError(f"{path}: {_KEY}token_type is not one number for each token")
    types = [_corrected(*each) for each in zip(tokens, kinds.tolist(), strict=True)]
    size = len(tokens)
    while size and types[size - 1] == _UNUSED and tokens[size - 1] == _padding(size - 1):
        size -= 1
    return tokens[:size], types[:size]


def _corrected(token: str, kind: int) -> int:
    """The type of a token: older converters call control tokens of chat models user-defined."""
    is_control = token in _STOP_NAMES or (
        kind == _USER_DEFINED and tokenizer_json.CONTROL_NAME.fullmatch(token)
    )
    return _CONTROL if is_control and kind in (_NORMAL, _USER_DEFINED) else kind


def _padding(token: int) -> str:
    """The token that llama.cpp's converters write for a row of the embedding without one."""
    return f"[PAD{token}]"


def _token_ids(
    metadata: Metadata, tokens: list[str], types: list[int], report: Report
) -> dict[str, Any]:
    """Checked ids of bos, eos and pad; all stop ids are under eos."""
    names = {"bos": "bos", "pad": "padding", "eos": "eos", "eot": "eot", "eom": "eom"}
    given = {ours: metadata.get(f"{_KEY}{theirs}_token_id") for ours, theirs in names.items()}
    for name, value in given.items():
        if value is not None and (type(value) is not int or value < 0):
            report.problem(f"{_KEY}{names[name]}_token_id={short(value)} is not an id")
    report.raise_problems()
    stops = [given.pop(name) for name in ("eos", "eot", "eom")]
    ids_of = {token: i for i, token in enumerate(tokens)}
    named = [ids_of[n] for n in _STOP_NAMES if n in ids_of and types[ids_of[n]] == _CONTROL]
    eos = list(dict.fromkeys(i for i in (*stops, *named) if i is not None))
    return sources.check_token_ids(
        given | {"eos": eos[0] if len(eos) == 1 else eos or None}, len(tokens), report
    )


def _sentencepiece(
    metadata: Metadata,
    tokens: list[str],
    types: list[int],
    ids: dict[str, Any],
    path: Path,
) -> list[TokenizerFile]:
    """``tokenizer.model``; and ``tokenizer.json``, if tokens were added to the model's."""
    scores = metadata.get(f"{_KEY}scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) < len(tokens):
        raise ConvertError(f"{path}: {_KEY}scores is missing or not one number for each token")
    special = {ids.get("bos"), ids.get("pad"), metadata.get(f"{_KEY}eos_token_id")}
    size = len(tokens)
    while size and types[size - 1] in (_CONTROL, _USER_DEFINED) and size - 1 not in special:
        size -= 1
    if size == len(tokens):
        # GGUF has spaces in user-defined pieces; SentencePiece has "▁" in all.
        pieces = [
            t.replace(" ", "▁") if k == _USER_DEFINED else t
            for t, k in zip(tokens, types, strict=True)
        ]
        return [_checked(path, "sentencepiece", _model_proto(metadata, pieces, scores, types, ids))]
    # As in llama.cpp, text is split at user-defined tokens; SentencePiece itself does not do that.
    split = [_CONTROL if t == _USER_DEFINED else t for t in types]
    try:
        tree = sentencepiece_json.to_json(_model_proto(metadata, tokens, scores, split, ids))
    except ValueError as e:
        raise ConvertError(
            f"{path}: no tokenizer.json gives the ids of its tokenizer: {e}"
        ) from None
    for token in tree["added_tokens"]:
        token["special"] = types[token["id"]] != _USER_DEFINED
    base = _model_proto(metadata, tokens[:size], scores, types, ids)
    return [
        _checked(path, "sentencepiece", base),
        _checked(path, JSON_FILE, json.dumps(tree, ensure_ascii=False).encode()),
    ]


def _model_proto(
    metadata: Metadata,
    tokens: list[str],
    scores: np.ndarray,
    types: list[int],
    ids: dict[str, Any],
) -> bytes:
    """A SentencePiece model with these pieces, of the same settings as LLaMA's."""
    from sentencepiece import sentencepiece_model_pb2 as files

    proto = files.ModelProto()  # type: ignore[attr-defined]
    for token, score, kind in zip(tokens, scores.tolist(), types, strict=False):
        proto.pieces.add(piece=token, score=score, type=kind if 1 <= kind <= _BYTE else _NORMAL)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size = sentencepiece_json.BPE, len(tokens)
    trainer.byte_fallback = _BYTE in types
    places = ids | {"eos": metadata.get(f"{_KEY}eos_token_id")}
    if metadata.get(f"{_KEY}add_bos_token") is False:
        # No text begins with it. SentencePiece finds it by its name, not by its id.
        places["bos"], trainer.bos_piece = None, "<no BOS>"
    places["unk"] = types.index(_UNKNOWN) if _UNKNOWN in types else None
    for name in ("unk", "bos", "eos", "pad"):
        place = places.get(name)
        if place is None or place >= len(tokens):
            setattr(trainer, f"{name}_id", -1)
            continue
        setattr(trainer, f"{name}_id", place)
        setattr(trainer, f"{name}_piece", tokens[place])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = metadata.get(f"{_KEY}add_space_prefix", True) is True
    normalizer.remove_extra_whitespaces = (
        metadata.get(f"{_KEY}remove_extra_whitespaces", False) is True
    )
    normalizer.escape_whitespaces = True
    return proto.SerializeToString()


def _byte_level(
    metadata: Metadata,
    tokens: list[str],
    types: list[int],
    ids: dict[str, Any],
    path: Path,
) -> list[TokenizerFile]:
    """``tokenizer.json`` of a byte-level BPE."""
    given = metadata.get(f"{_KEY}pre", "default")
    names = ALIASES.items() if isinstance(given, str) else ()
    name = next((n for n, aliases in names if given in aliases), None)
    if name is None:
        known = ", ".join(alias for aliases in ALIASES.values() for alias in aliases)
        raise ConvertError(
            f"{path}: {_KEY}pre={short(given)}, the rule that splits text, is not supported; known "
            f"are {known}. Convert the original weights instead"
        )
    merges = metadata.get(f"{_KEY}merges")
    pairs = [m.split(" ") for m in merges] if isinstance(merges, list) else []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ConvertError(f"{path}: {_KEY}merges is missing or not a list of pairs of tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ConvertError(f"{path}: {_KEY}tokens has a token twice: damaged")
    if unknown := next((p for p in pairs if not {*p, "".join(p)} <= vocab.keys()), None):
        raise ConvertError(
            f"{path}: {_KEY}merges has {short(' '.join(unknown))}, not of its tokens"
        )
    added = [
        tokenizer_json.added_token(i, token, special=types[i] != _USER_DEFINED)
        for i, token in enumerate(tokens)
        if types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    model = {
        "unk_token": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": name in IGNORES_MERGES, "vocab": vocab, "merges": pairs,
    }  # fmt: skip
    bos, adds = ids.get("bos"), metadata.get(f"{_KEY}add_bos_token", name in ADDS_BOS)
    if type(adds) is not bool:
        raise ConvertError(f"{path}: {_KEY}add_bos_token={short(adds)} is not true or false")
    if not adds:
        bos = None
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tree = tokenizer_json.make(
        model, added, None if bos is None else tokenizer_json.bos_template(bos, tokens[bos]),
        normalizer=None, pre_tokenizer=pre_tokenizer(name), decoder=decoder | {"use_regex": True},
    )  # fmt: skip
    return [_checked(path, JSON_FILE, json.dumps(tree, ensure_ascii=False).encode())]


def _checked(path: Path, kind: str, content: bytes) -> TokenizerFile:
    """The tokenizer file, after a check that it can be read."""
    file = TokenizerFile(path, kind, content)
    try:
        _ = file.size
    except ValueError as e:
        raise ConvertError(f"{path}: its tokenizer cannot be used: {e}") from None
    return file


# Writing ------------------------------------------------------------------------------------------


def make(source: SourceCheckpoint) -> Metadata:
    """Metadata of the tokenizer and chat template of a source.

    Raises:
      ConvertError: GGUF has no counterpart of the tokenizer; says why.
    """
    files = {file.kind: file for file in source.tokenizers}
    if not files:
        raise ConvertError(
            f"{source.path} has no tokenizer, which a GGUF file needs: copy tokenizer.model or "
            "tokenizer.json into it"
        )
    if "sentencepiece" in files:
        out = _make_sentencepiece(files["sentencepiece"], files.get(JSON_FILE))
    elif JSON_FILE in files:
        out = _make_byte_level(_json_tree(files[JSON_FILE]), files[JSON_FILE].path)
    else:
        ranks = tiktoken_text.ranks_of(files["tiktoken"].content)
        tree = tiktoken_text.to_json(ranks, source.cfg.rope.type == "llama3")
        out = _make_byte_level(tree, files["tiktoken"].path)
    tokens, types = out[f"{_KEY}tokens"], out[f"{_KEY}token_type"]
    rows = source.cfg.vocab_size
    spare = [_padding(i) for i in range(len(tokens), rows)]
    out[f"{_KEY}tokens"] = tokens + spare
    out[f"{_KEY}token_type"] = np.append(types, [_UNUSED] * len(spare)).astype(np.int32)
    if f"{_KEY}scores" in out:
        out[f"{_KEY}scores"] = np.append(out[f"{_KEY}scores"], [-1e4] * len(spare)).astype(
            np.float32
        )
    out |= _make_ids(source, tokens)
    if (template := _template(source)) is not None:
        out[_TEMPLATE] = template
    return out


def _json_tree(file: TokenizerFile) -> dict[str, Any]:
    return json.loads(tokenizer_json.with_controls(file.content.decode(errors="replace")))


def _make_ids(source: SourceCheckpoint, tokens: list[str]) -> Metadata:
    """Ids of special tokens. Of several stop ids, the first is EOS and another one end of turn."""
    ids = source.token_ids
    out: Metadata = {}
    for ours, theirs in (("bos", "bos"), ("pad", "padding")):
        if ours in ids:
            out[f"{_KEY}{theirs}_token_id"] = ids[ours]
    given = ids.get("eos")
    stops = given if isinstance(given, list) else [] if given is None else [given]
    if stops:
        out[f"{_KEY}eos_token_id"] = stops[0]
    for name, kind in zip(("eot", "eom"), stops[1:], strict=False):
        out[f"{_KEY}{name}_token_id"] = kind
    if lost := [i for i in stops[3:] if i >= len(tokens) or tokens[i] not in _STOP_NAMES]:
        raise ConvertError(
            f"{source.path} has the stop ids {short(stops)}; a GGUF file holds three, and cannot "
            f"name {short(lost)}"
        )
    return out


def _template(source: SourceCheckpoint) -> str | None:
    """The chat template of a source."""
    files = source.generated | {path.name: path.read_bytes() for path in source.extras}
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template, _ = default_template(json.loads(files.get("tokenizer_config.json", b"{}")))
    return template if isinstance(template, str) else None


def _make_sentencepiece(file: TokenizerFile, other: TokenizerFile | None) -> Metadata:
    """Metadata of a SentencePiece model, and of the tokens that a ``tokenizer.json`` adds."""
    proto = sentencepiece_json.parse(file.content)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problem = None
    if trainer.model_type != sentencepiece_json.BPE:
        problem = "it is not a BPE model"
    elif normalizer.precompiled_charsmap:
        problem = f"it changes text before splitting it (rule {normalizer.name!r})"
    elif trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        problem = "it does not write a space as the start of a piece"
    if problem is not None:
        raise ConvertError(f"{file.path} has no counterpart in GGUF: {problem}")
    spaces = lambda p: p.piece.replace("▁", " ") if p.type == _USER_DEFINED else p.piece
    tokens = [spaces(p) for p in proto.pieces]
    types, scores = [p.type for p in proto.pieces], [p.score for p in proto.pieces]
    added = _json_tree(other).get("added_tokens") or [] if other else []
    for token in sorted(added, key=lambda t: t["id"]):
        if token["id"] >= len(tokens):
            spare = [_padding(i) for i in range(len(tokens), token["id"])]
            tokens += [*spare, token["content"]]
            types += [_UNUSED] * len(spare)
            types.append(_CONTROL if token["special"] else _USER_DEFINED)
            scores += [-1e4] * (len(spare) + 1)
    return {
        f"{_KEY}model": "llama", f"{_KEY}pre": "default", f"{_KEY}tokens": tokens,
        f"{_KEY}scores": np.array(scores, np.float32), f"{_KEY}token_type": np.array(types),
        f"{_KEY}add_bos_token": trainer.bos_id >= 0, f"{_KEY}add_eos_token": False,
        f"{_KEY}add_space_prefix": bool(normalizer.add_dummy_prefix),
        f"{_KEY}remove_extra_whitespaces": bool(normalizer.remove_extra_whitespaces),
    } | ({f"{_KEY}unknown_token_id": trainer.unk_id} if trainer.unk_id >= 0 else {})  # fmt: skip


def _make_byte_level(tree: dict[str, Any], path: Path) -> Metadata:
    """Metadata of a ``tokenizer.json`` with a byte-level BPE."""
    model = tree["model"]
    name = name_of(tree.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    problem = None
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        problem = "it is not a byte-level BPE; add its tokenizer.model, which has scores"
    elif tree.get("normalizer") is not None:
        problem = "it changes text before splitting it"
    elif name is None:
        problem = f"its pre-tokenizer {short(tree.get('pre_tokenizer'))} has no name there"
    elif model.get("ignore_merges") and name not in IGNORES_MERGES:
        problem = f"ignore_merges=true does not go with the pre-tokenizer {name}"
    if problem is not None:
        raise ConvertError(f"{path} has no counterpart in GGUF: {problem}")
    added = {t["id"]: t for t in tree.get("added_tokens") or []}
    names = {i: token for token, i in model["vocab"].items()}
    names |= {i: t["content"] for i, t in added.items()}
    size = 1 + max(names)
    types = np.full(size, _NORMAL, np.int32)
    for i in range(size):
        if i not in names:
            types[i] = _UNUSED
        elif i in added:
            types[i] = _CONTROL if added[i]["special"] else _USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        f"{_KEY}model": "gpt2", f"{_KEY}pre": name or "",
        f"{_KEY}tokens": [names.get(i, _padding(i)) for i in range(size)],
        f"{_KEY}token_type": types, f"{_KEY}merges": merges,
        f"{_KEY}add_bos_token": _adds_bos(tree), f"{_KEY}add_space_prefix": False,
    }  # fmt: skip


def _adds_bos(tree: dict[str, Any]) -> bool:
    """Whether the post-processor puts a control token before each text."""
    import tokenizers

    return bool(tokenizers.Tokenizer.from_str(json.dumps(tree)).encode("").ids)
