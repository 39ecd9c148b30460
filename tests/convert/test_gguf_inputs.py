"""Damaged and unsupported GGUF files: one clear error each, without a large allocation."""

import contextlib
import struct

import convert_tools as tools
import gguf_tools
import numpy as np
import pytest
from convert_tools import DTYPES, small
from gguf_tools import ARRAY, BOOL, F32, I32, STRING, U32
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert import restore

from llama_jax.convert.job import convert, open_folder

CFG = small()
STATE = tools.meta_state(CFG, DTYPES["float32"], make=tools.random_values)
TENSORS = gguf_tools.tensors(STATE)
TOKENS = gguf_tools.metadata(CFG)["tokenizer.ggml.tokens"][1][1]


def changed(**metadata):
    """A file with other metadata."""
    return lambda path: gguf_tools.write(path, gguf_tools.metadata(CFG, **metadata), TENSORS)


def tensors(changes: dict, **metadata):
    """A file with other tensors; None: without it."""
    kept = {n: t for n, t in (TENSORS | changes).items() if t is not None}
    return lambda path: gguf_tools.write(path, gguf_tools.metadata(CFG, **metadata), kept)


def patched(old: bytes, new: bytes):
    """A file with other bytes."""

    def make(path):
        content = changed()(path).read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return make


def content(data: bytes):
    return lambda path: path.write_bytes(data)


def header(count: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, keys) + rest


def key(name: str, kind: int, value: bytes) -> bytes:
    return gguf_tools.text(name) + struct.pack("<I", kind) + value


HUGE = struct.pack("<Q", 1 << 62)
W = "blk.0.attn_q.weight"
CASES = {
    "empty": (content(b""), "is empty"),
    "something else": (content(b"PK\3\4" * 20), "is not a GGUF file"),
    "version 1": (content(b"GGUF" + struct.pack("<III", 1, 0, 0)), "version 1"),
    "big-endian": (content(b"GGUF" + struct.pack(">IQQ", 3, 0, 0)), "big-endian"),
    "header cut off": (content(header(1, 1)), "is cut off"),
    "many keys": (content(header(1, 1 << 60)), "the number of metadata keys"),
    "many tensors": (content(header(1 << 60, 1)), "the number of tensors"),
    "long key": (content(header(0, 1, HUGE)), "the length of metadata key 0"),
    "long text": (content(header(0, 1, key("a", STRING, HUGE))), "the length of a"),
    "long array": (content(header(0, 1, key("a", ARRAY, struct.pack("<I", 4) + HUGE))), "of a"),
    "array of arrays": (
        content(header(0, 1, key("a", ARRAY, struct.pack("<IQ", 9, 1)))), "an array of arrays"
    ),
    "unknown type of a value": (content(header(0, 1, key("a", 77, b""))), "unknown type 77"),
    "key is not UTF-8": (
        content(header(0, 1, gguf_tools.text(b"\xff\xfe") + bytes(8))), "is not UTF-8"
    ),
    "key twice": (content(header(0, 2, key("a", BOOL, b"\1") * 2)), "key 'a' twice"),
    "neither true nor false": (content(header(0, 1, key("a", BOOL, b"\7"))), "true nor false"),
    "file cut off": (
        lambda path: path.write_bytes(changed()(path).read_bytes()[:-3000]), "is cut off"
    ),
    "rank": (
        patched(gguf_tools.text(W) + struct.pack("<I", 2),
                gguf_tools.text(W) + struct.pack("<I", 1 << 30)), "dimensions"
    ),
    "huge shape": (
        patched(gguf_tools.text(W) + struct.pack("<IQ", 2, 32),
                gguf_tools.text(W) + struct.pack("<IQ", 2, 1 << 50)), "has the shape"
    ),
    "overlap": (
        lambda path: path.write_bytes(changed()(path).read_bytes().replace(
            struct.pack("<IQ", 0, 3072), struct.pack("<IQ", 0, 2048), 1)), "overlaps"
    ),
    "alignment of a tensor": (
        lambda path: path.write_bytes(changed()(path).read_bytes().replace(
            struct.pack("<IQ", 0, 3072), struct.pack("<IQ", 0, 3073), 1)), "not aligned"
    ),
    "alignment": (changed(**{"general.alignment": (U32, 48)}), "is not a power of two"),
    "another architecture": (
        changed(**{"general.architecture": (STRING, "qwen2")}), "'qwen2' is not supported"
    ),
    "architecture is a number": (changed(**{"general.architecture": (U32, 1)}), "not supported"),
    "no architecture": (changed(**{"general.architecture": None}), "None is not supported"),
    "experts": (
        tensors({"blk.0.ffn_gate_exps.weight": np.zeros((2, 4, 4), np.float32)}),
        "blk.0.ffn_gate_exps.weight belongs to a mixture of experts",
    ),
    "expert count": (changed(**{"llama.expert_count": (U32, 8)}), "llama.expert_count=8"),
    "window": (changed(**{"llama.attention.sliding_window": (U32, 9)}), "sliding_window=9"),
    "no context": (changed(**{"llama.context_length": None}), "llama.context_length is missing"),
    "text for a number": (changed(**{"llama.block_count": (STRING, "2")}), "block_count='2'"),
    "negative": (changed(**{"llama.block_count": (I32, -2)}), "block_count=-2"),
    "not a number": (
        changed(**{"llama.attention.layer_norm_rms_epsilon": (F32, float("nan"))}), "epsilon=nan"
    ),
    "heads differ": (
        changed(**{"llama.attention.head_count_kv": (ARRAY, (U32, [4, 2]))}), "between layers"
    ),
    "partial rotation": (changed(**{"llama.rope.dimension_count": (U32, 2)}), "dimension_count=2"),
    "longrope": (changed(**{"llama.rope.scaling.type": (STRING, "longrope")}), "'longrope'"),
    "missing tensor": (tensors({"output_norm.weight": None}), "output_norm.weight is missing"),
    "no embedding": (tensors({"token_embd.weight": None}), "token_embd.weight is missing"),
    "bias": (
        tensors({"blk.0.attn_q.bias": np.zeros(32, np.float32)}), "blk.0.attn_q.bias is not a"
    ),
    "shape": (tensors({W: np.zeros((32, 16), np.float32)}), "has shape [32, 16]"),
    "vocab size": (changed(**{"llama.vocab_size": (U32, 25)}), "llama.vocab_size=25"),
    "fewer tokens": (
        changed(**{"tokenizer.ggml.tokens": (ARRAY, (STRING, TOKENS[:20]))}),
        "has 20 tokens, token_embd.weight 24 rows",
    ),
    "no tokens": (changed(**{"tokenizer.ggml.tokens": None}), "tokens is missing"),
    "types": (changed(**{"tokenizer.ggml.token_type": (ARRAY, (I32, [1]))}), "token_type is not"),
    "scores": (changed(**{"tokenizer.ggml.scores": None}), "scores is missing"),
    "kind of tokenizer": (changed(**{"tokenizer.ggml.model": (STRING, "t5")}), "model='t5'"),
    "pre-tokenizer": (
        changed(**{"tokenizer.ggml.model": (STRING, "gpt2"),
                   "tokenizer.ggml.pre": (STRING, "tekken")}), "pre='tekken'"
    ),
    "rule of splitting is a list": (
        changed(**{"tokenizer.ggml.model": (STRING, "gpt2"),
                   "tokenizer.ggml.pre": (ARRAY, (U32, [1, 2]))}), "the rule that splits text"
    ),
    "add_bos_token is a list": (
        changed(**{"tokenizer.ggml.model": (STRING, "gpt2"),
                   "tokenizer.ggml.pre": (STRING, "llama-bpe"),
                   "tokenizer.ggml.tokens": (ARRAY, (STRING, [*TOKENS[:-1], "ab"])),
                   "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b"])),
                   "tokenizer.ggml.add_bos_token": (ARRAY, (U32, [1, 2]))}), "not true or false"
    ),
    "number of files is a list": (
        changed(**{"split.count": (ARRAY, (U32, [1, 2]))}), "is not a whole number"
    ),
    "merges": (
        changed(**{"tokenizer.ggml.model": (STRING, "gpt2"),
                   "tokenizer.ggml.merges": (ARRAY, (STRING, ["a x y"]))}), "list of pairs"
    ),
    "merge of unknown tokens": (
        changed(**{"tokenizer.ggml.model": (STRING, "gpt2"),
                   "tokenizer.ggml.merges": (ARRAY, (STRING, ["a zz"]))}), "not of its tokens"
    ),
    "id of a token": (changed(**{"tokenizer.ggml.eos_token_id": (U32, 99)}), "eos token id is 99"),
    "template": (changed(**{"tokenizer.chat_template": (U32, 1)}), "is not text"),
    "token twice": (
        changed(**{"tokenizer.ggml.tokens": (ARRAY, (STRING, [*TOKENS[:-1], "a"]))}),
        "its tokenizer cannot be used",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_files_that_cannot_be_used(tmp_path, name):
    make, message = CASES[name]
    make(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"m\.gguf") as caught:
        convert(tmp_path / "m.gguf", tmp_path / "out", log=None)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_type_of_tensor_that_nobody_knows(tmp_path):
    pytest.importorskip("gguf")
    tensors({W: ((32, 32), 99, bytes(1024))})(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="has type 99"):
        open_folder(tmp_path / "m.gguf")
    tensors({W: ((32, 32), 26, bytes(4096))})(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="is I32, which cannot be read"):
        open_folder(tmp_path / "m.gguf")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_changed_bytes_give_an_error_or_a_model(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    whole = bytearray(changed()(path).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(ValueError):
        open_folder(path)


# Split models -------------------------------------------------------------------------------------


def split(folder, count: int = 3):
    """The model in several files, as llama-gguf-split writes them."""
    names = list(TENSORS)
    paths = []
    for i in range(count):
        about = gguf_tools.metadata(CFG) if i == 0 else {}
        about |= {"split.no": (2, i), "split.count": (2, count)}
        about |= {"split.tensors.count": (I32, len(names))}
        part = {n: TENSORS[n] for n in names[i::count]}
        path = folder / f"m-{i + 1:05d}-of-{count:05d}.gguf"
        paths.append(gguf_tools.write(path, about, part))
    return paths


def test_a_split_model_is_one_model(tmp_path):
    paths = split(tmp_path)
    whole = gguf_tools.write(tmp_path / "w.gguf", gguf_tools.metadata(CFG), TENSORS)
    results = [convert(p, tmp_path / p.stem, log=None) for p in (paths[0], whole)]
    assert tools.same(*map(restore, results))


def test_split_models_that_are_not_whole(tmp_path):
    paths = split(tmp_path)
    with pytest.raises(ValueError, match=r"is part 2 of 3: give the first, .*m-00001-of-00003"):
        open_folder(paths[1])
    paths[1].rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf is missing"):
        open_folder(paths[0])
    paths[2].rename(paths[1])
    (tmp_path / "kept").rename(paths[2])
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf: says it is part 2"):
        open_folder(paths[0])
    paths = split(tmp_path)
    gguf_tools.write(
        paths[2], {"split.no": (2, 2), "split.count": (2, 3)}, {"output.weight": TENSORS[W]}
    )
    with pytest.raises(ValueError, match=r"do not belong together|is in .* as well"):
        open_folder(paths[0])
    renamed = paths[0].rename(tmp_path / "first.gguf")
    with pytest.raises(ValueError, match="rename them"):
        open_folder(renamed)
