"""Settings of other formats (RoPE schemas, params.json, tokenizers) are read or refused."""

import base64
import contextlib
import dataclasses
import json
import re
from pathlib import Path

import convert_tools as tools
import numpy as np
import pytest
import tiktoken_tools
import tokenizers
from convert_tools import DTYPES, small

from llama_jax.config import MODELS, RopeConfig
from llama_jax.convert import huggingface, meta
from llama_jax.convert.formats import ConvertError
from llama_jax.convert.job import convert, open_folder
from llama_jax.convert.tensors import layer_tensors
from llama_jax.data import sentencepiece_json, tiktoken_text, tokenizer_files, tokenizer_json
from llama_jax.model.rope import rope_of
from llama_jax.prepare.tokenizer import train_tokenizer

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(factor=4.0, original_max_position_embeddings=1024)
# The scaling table of config.json (context 4096), and our config for it.
ROPES = {
    "default": (dict(rope_type="default"), dict(type="default")),
    "linear": (dict(rope_type="linear", factor=2.0), dict(type="linear", factor=2.0)),
    "linear, old key": (dict(type="linear", factor=2), dict(type="linear", factor=2.0)),
    "dynamic": (dict(rope_type="dynamic", factor=4.0), dict(type="dynamic", factor=4.0)),
    "llama3": (
        dict(rope_type="llama3", original_max_position_embeddings=1024, **LLAMA3),
        dict(type="llama3", original_context=1024, **LLAMA3),
    ),
    "yarn": (dict(rope_type="yarn", **YARN), dict(type="yarn", factor=4.0, original_context=1024)),
    "yarn, all": (
        dict(rope_type="yarn", beta_fast=20, beta_slow=2, attention_factor=1.5, truncate=False,
             **YARN),
        dict(type="yarn", factor=4.0, original_context=1024, beta_fast=20.0, beta_slow=2.0,
             attention_factor=1.5, truncate=False),
    ),
    "yarn, mscale": (
        dict(rope_type="yarn", mscale=1.0, mscale_all_dim=0.7, **YARN),
        dict(type="yarn", factor=4.0, original_context=1024, mscale=1.0, mscale_all_dim=0.7),
    ),
}  # fmt: skip
BASE = small(context=4096, head_dim=16, dim=128)


def hf_config(schema: str, table: dict, theta=5e5) -> dict:
    """config.json in one of the two schemas."""
    config = tools.config_of(BASE)
    del config["rope_theta"]
    if schema == "v4":
        scaling = None if table == {"rope_type": "default"} else table
        return config | {"rope_theta": theta, "rope_scaling": scaling}
    return config | {"rope_parameters": {"rope_theta": theta, **table}}


@pytest.mark.parametrize("schema", ["v4", "v5"])
@pytest.mark.parametrize("name", ROPES)
def test_rope_schemas_of_both_versions(schema, name):
    table, expected = ROPES[name]
    cfg, _ = huggingface.parse_config(hf_config(schema, table), "config.json")
    assert cfg.rope == RopeConfig(theta=5e5, **expected)
    assert dataclasses.replace(cfg, rope=BASE.rope) == BASE


@pytest.mark.parametrize("schema", ["v4", "v5"])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(schema, name):
    """Our frequencies equal those of transformers for the given file and for the file we write."""
    pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    given = hf_config(schema, ROPES[name][0])
    cfg, _ = huggingface.parse_config(given, "config.json")
    written = huggingface.make_config(cfg, "float32", {})
    assert huggingface.parse_config(json.loads(json.dumps(written)), "back")[0] == cfg
    ours = rope_of(cfg, np.int32(100))
    for config in (given, written):
        theirs = llama.LlamaRotaryEmbedding(llama.LlamaConfig(**json.loads(json.dumps(config))))
        np.testing.assert_allclose(ours.inv_freq_H2, theirs.inv_freq.numpy(), rtol=1e-6)
        np.testing.assert_allclose(ours.scale, theirs.attention_scaling, rtol=1e-6)


@pytest.mark.parametrize("name", ROPES)
def test_our_config_works_for_transformers_4_and_5(name):
    cfg, _ = huggingface.parse_config(hf_config("v5", ROPES[name][0]), "config.json")
    written = huggingface.make_config(cfg, "bfloat16", {"bos": 1, "eos": [2, 3]})
    four = {k: v for k, v in written.items() if k not in ("rope_parameters", "dtype")}
    five = {
        k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    assert huggingface.parse_config(four, "4")[0] == huggingface.parse_config(five, "5")[0] == cfg
    assert four["torch_dtype"] == five["dtype"] == "bfloat16"
    assert four["eos_token_id"] == [2, 3]


def test_original_context_as_transformers_takes_it():
    read = lambda config: huggingface.parse_config(config, "c")[0].rope.original_context
    table = ROPES["llama3"][0]
    assert read(hf_config("v5", table) | {"original_max_position_embeddings": 512}) == 512
    without = {k: v for k, v in table.items() if not k.startswith("original")}
    assert read(hf_config("v5", without)) == 4096
    cfg, warnings = huggingface.parse_config(
        hf_config("v5", ROPES["dynamic"][0] | {"original_max_position_embeddings": 9}), "c"
    )
    assert cfg.rope.original_context is None
    assert "dynamic does not use original_max_position_embeddings" in warnings[0]
    cfg, warnings = huggingface.parse_config(
        hf_config("v5", ROPES["yarn"][0] | {"factor": 2.0}), "c"
    )
    assert cfg.rope.factor == 2.0
    assert "is not max_position_embeddings / original" in warnings[0]
    zeros = ROPES["yarn"][0] | {"beta_fast": 0, "mscale": 0}
    assert huggingface.parse_config(hf_config("v5", zeros), "c")[0].rope.beta_fast is None
    cfg, _ = huggingface.parse_config(hf_config("v5", ROPES["yarn"][0] | {"factor": None}), "c")
    assert cfg.rope.factor == 4.0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(mlp_bias=True), "mlp_bias=True"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(quantization_config={"bits": 4}), "quantization_config={'bits': 4}"),
        (dict(sliding_window=4096), "sliding_window=4096"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(model_type="mistral"), "model_type='mistral'"),
        (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(rms_norm_eps=None), "rms_norm_eps is missing"),
        (dict(num_key_value_heads=3), "num_heads=8 must be a multiple of num_kv_heads=3"),
        (dict(head_dim=7), "head_dim=7 must be even"),
        (dict(vocab_size="many"), "vocab_size='many'"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=2)), "rope type 'longrope'"),
        (dict(rope_scaling=dict(type="su", factor=2)), "rope type 'su'"),
        (dict(rope_scaling=dict(rope_type="linear")), "rope.type='linear' needs factor"),
        (dict(rope_scaling=dict(rope_type="linear", factor=0.5)), "rope.factor"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8)), "needs low_freq_factor"),
        (dict(rope_scaling=dict(rope_type="linear", factor=2, secret=1)), "secret is not"),
        (dict(rope_scaling=dict(rope_type="default", factor=2)), "'default' does not use factor"),
        (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "one flat table"),
        (dict(rope_parameters={"rope_theta": 7.0, "rope_type": "default"}), "disagree"),
        (dict(rope_parameters=dict(rope_type="linear", factor=2.0), rope_scaling=None), "disagree"),
        (dict(rope_theta="much"), "rope_theta='much' is not a number"),
    ],
)  # fmt: skip
def test_unsupported_features_are_refused_by_name(tmp_path, change, expected):
    cfg = small()
    source = tools.make_hf(tmp_path / "hf", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json") as caught:
        convert(source, tmp_path / "out")
    assert expected in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_every_reason_at_once_and_unknown_keys_named():
    config = tools.config_of(BASE) | dict(mlp_bias=True, hidden_act="relu")
    with pytest.raises(ValueError, match=r"hidden_act='relu'(.|\n)*mlp_bias=True"):
        huggingface.parse_config(config, "config.json")
    _, warnings = huggingface.parse_config(tools.config_of(BASE) | {"my_flag": 1}, "config.json")
    assert warnings == ["config.json: ignored my_flag"]


def test_settings_without_counterpart_in_transformers_are_refused(tmp_path):
    rope = RopeConfig(type="dynamic", factor=2.0, original_context=32)
    with pytest.raises(ValueError, match="scales from max_position_embeddings"):
        huggingface.make_config(small(rope=rope), "float32", {})


WEIRD = [None, "x", [], {}, [1], -1, 0, 1.5, True, 10**30, float("nan"), float("inf"), {"type": 1}]


@pytest.mark.parametrize("weird", WEIRD, ids=repr)
def test_weird_values_raise_convert_errors(weird):
    """Any JSON value gives a config or a ConvertError."""
    base = hf_config("v5", ROPES["yarn, all"][0])
    table = base["rope_parameters"]
    trees = [base | {k: weird} for k in [*base, "rope_scaling", "rope_theta", "torch_dtype"]]
    trees += [base | {"rope_parameters": table | {k: weird}} for k in table]
    for tree in trees:
        with contextlib.suppress(ConvertError):
            huggingface.parse_config(tree, "config.json")
    params, *more = published("llama3.2-1b")
    for key in [*params, "n_kv_heads", "rope_scaling_factor", "rope_high_freq_factor"]:
        with contextlib.suppress(ConvertError):
            meta.parse_params(params | {key: weird}, *more, "params.json")


# Meta

# As published: dim, layers, heads, kv heads, multiple_of, multiplier, eps, theta, scaled; then the
# embedding's rows, whether the output matrix is absent, whether the weights are float16.
_ = None
PUBLISHED = {
    "llama-7b":      (4096, 32, 32, _, 256, _, 1e-6, _, _, 32000, False, True),
    "llama-13b":     (5120, 40, 40, _, 256, _, 1e-6, _, _, 32000, False, True),
    "llama-33b":     (6656, 60, 52, _, 256, _, 1e-6, _, _, 32000, False, True),
    "llama-65b":     (8192, 80, 64, _, 256, _, 1e-5, _, _, 32000, False, True),
    "llama2-7b":     (4096, 32, 32, _, 256, _, 1e-5, _, _, 32000, False, False),
    "llama2-13b":    (5120, 40, 40, _, 256, _, 1e-5, _, _, 32000, False, False),
    "llama2-70b":    (8192, 80, 64, 8, 4096, 1.3, 1e-5, _, _, 32000, False, False),
    "llama3-8b":     (4096, 32, 32, 8, 1024, 1.3, 1e-5, 5e5, _, 128256, False, False),
    "llama3-70b":    (8192, 80, 64, 8, 4096, 1.3, 1e-5, 5e5, _, 128256, False, False),
    "llama3.1-8b":   (4096, 32, 32, 8, 1024, 1.3, 1e-5, 5e5, True, 128256, False, False),
    "llama3.1-405b": (16384, 126, 128, 8, 4096, 1.2, 1e-5, 5e5, True, 128256, False, False),
    "llama3.2-1b":   (2048, 16, 32, 8, 256, 1.5, 1e-5, 5e5, True, 128256, True, False),
    "llama3.2-3b":   (3072, 28, 24, 8, 256, 1.0, 1e-5, 5e5, True, 128256, True, False),
}  # fmt: skip
KEYS = (
    "dim n_layers n_heads n_kv_heads multiple_of ffn_dim_multiplier norm_eps rope_theta "
    "use_scaled_rope"
)


def published(name: str) -> tuple[dict, int, bool, bool]:
    """params.json, rows, tied, float16."""
    *values, rows, tied, half = PUBLISHED[name]
    params = {k: v for k, v in zip(KEYS.split(), values, strict=True) if v is not None}
    return params | {"vocab_size": -1 if rows == 32000 else rows}, rows, tied, half


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params_are_the_published_models(name):
    params, rows, tied, half = published(name)
    cfg, warnings = meta.parse_params(params, rows, tied, half, "params.json")
    assert cfg == MODELS[name]
    assert any("context" in r for r in warnings)
    assert any("32: the size is that of Llama 3.2" in r for r in warnings) == name.startswith(
        "llama3.2"
    )


@pytest.mark.parametrize("name", [n for n in MODELS if n != "mini"])
def test_params_written_read_back(name):
    cfg = MODELS[name]
    params = meta.make_params(cfg)
    back, _ = meta.parse_params(params, cfg.vocab_size, cfg.tie_embeddings, False, "params.json")
    assert dataclasses.replace(back, context=cfg.context) == cfg
    if name in PUBLISHED:
        assert (
            meta.ffn_width(cfg.dim, params["multiple_of"], params.get("ffn_dim_multiplier"))
            == cfg.ffn_dim
        )


@pytest.mark.parametrize("width", [1, 97, 171, 172, 1000, 12289])
def test_any_width_has_settings(width):
    params = meta.make_params(small(ffn_dim=width))
    back, _ = meta.parse_params(params, 24, False, False, "params.json")
    assert back.ffn_dim == width


def test_warnings_about_params():
    params = published("llama2-7b")[0]
    read = lambda changes, half=False: meta.parse_params(
        params | changes, 32000, False, half, "params.json"
    )
    cfg, warnings = read({"norm_eps": 1e-6})
    assert (cfg.norm_eps, cfg.context) == (1e-6, 4096)
    assert any("early Llama-2-7B-chat" in r for r in warnings)
    assert any("ignored my_key" in r for r in read({"my_key": 1})[1])
    assert read({"rope_theta": 1e6})[0].context == 16384
    rope = read(
        {"use_scaled_rope": True, "rope_scaling_factor": 16.0, "rope_high_freq_factor": 3.0}
    )[0].rope
    assert (rope.factor, rope.high_freq_factor) == (16.0, 3.0)


def test_settings_without_counterpart_in_params_are_refused():
    llama3 = MODELS["llama3.1-8b"].rope
    for cfg, expected in [
        (small(rope=RopeConfig(type="linear", factor=2.0)), "'linear' has no counterpart"),
        (small(rope=RopeConfig(type="yarn", factor=2.0)), "'yarn' has no counterpart"),
        (
            small(rope=dataclasses.replace(llama3, low_freq_factor=2.0)),
            "cannot express low_freq_factor=2.0",
        ),
        (small(rope=dataclasses.replace(llama3, original_context=4096)), "original_context=4096"),
        (small(head_dim=8), "8 * 8 is not 32"),
    ]:
        with pytest.raises(ValueError, match="cannot write Meta's layout") as caught:
            meta.make_params(cfg)
        assert expected in str(caught.value)
    params = meta.make_params(small(rope=dataclasses.replace(llama3, factor=16.0)))
    assert (params["use_scaled_rope"], params["rope_scaling_factor"]) == (True, 16.0)


def test_the_factor_of_a_model_as_deep_and_wide_as_llama_32_is_kept():
    """Reader and writer omit and assume the same factor, whatever the number of heads."""
    cfg = dataclasses.replace(MODELS["llama3.2-1b"], num_heads=16, head_dim=128)
    back, _ = meta.parse_params(meta.make_params(cfg), cfg.vocab_size, True, False, "params.json")
    assert back == cfg


@pytest.mark.parametrize("equal", [True, False])
def test_llama_32_ties_what_is_equal(tmp_path, monkeypatch, equal):
    """Its Meta files may repeat the embedding as output.weight."""
    monkeypatch.setattr(meta, "_is_llama_32", lambda *sizes: True)
    cfg = small()
    state = tools.meta_state(cfg, DTYPES["bfloat16"])
    if equal:
        state["output.weight"] = state["tok_embeddings.weight"]
    found = open_folder(tools.make_meta(tmp_path / "meta", state, cfg, 2))
    assert found.cfg.tie_embeddings == equal
    assert any(("equals" if equal else "differs") in r for r in found.warnings)


def test_a_manifest_that_contradicts_params_is_ignored(tmp_path):
    cfg = small(context=77)
    state = tools.meta_state(cfg, DTYPES["bfloat16"])
    made = convert(tools.make_hf(tmp_path / "hf", state, cfg), tmp_path / "made", to="meta")
    assert open_folder(made).cfg.context == 77
    assert open_folder(made, context=99).cfg.context == 99
    params = json.loads((made / "params.json").read_text())
    (made / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-6}))
    found = open_folder(made)
    assert (found.cfg.context, found.cfg.norm_eps) == (4096, 1e-6)  # estimated


# Tokenizers


def tiktoken_file(count: int) -> bytes:
    return b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(count))


def sentencepiece_file(path, size=40) -> bytes:
    import sentencepiece

    text = ["the quick brown fox jumps over the lazy dog " * 3, "pack my box with jugs"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(path), vocab_size=size, model_type="bpe",
        pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return path.with_name(path.name + ".model").read_bytes()


HF_TOKENIZER = json.dumps(
    {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
        "added_tokens": [{"id": 5, "content": "<s>"}],
    }
).encode()


def test_tokenizers_are_known_by_content(tmp_path):
    sentencepiece = sentencepiece_file(tmp_path / "sp")
    cases = {
        "sentencepiece": (sentencepiece, 40, {"bos": 1, "eos": 2}),
        "tiktoken": (tiktoken_file(100), 356, {"bos": 100, "eos": [101, 108, 109]}),
        "tokenizer.json": (HF_TOKENIZER, 6, {}),
    }
    for kind, (data, size, ids) in cases.items():
        for name in ("tokenizer.model", "tokenizer.json"):
            (tmp_path / name).write_bytes(data)
            found = tokenizer_files.recognize(tmp_path / name)
            assert (found.kind, found.size, found.ids) == (kind, size, ids)
    for data in (
        b"",
        b"\0\1\2",
        b"{}",
        b"[1]",
        b"abc def\n",
        tiktoken_file(9)[:-9],
        sentencepiece[:50],
    ):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(ValueError, match="is damaged"):
            _ = tokenizer_files.recognize(tmp_path / "tokenizer.model").size


def test_tokenizer_files_are_copied(tmp_path):
    cfg = small(vocab_size=40)
    state = tools.meta_state(cfg, DTYPES["float16"])
    folder = tools.make_meta(tmp_path / "LLaMA-7B", state, cfg, 2)
    data = sentencepiece_file(tmp_path / "sp")
    (tmp_path / "tokenizer.model").write_bytes(data)  # beside, as in Meta's download
    one = convert(folder, tmp_path / "one")
    assert json.loads((one / "model.json").read_text())["token_ids"] == {"bos": 1, "eos": 2}
    (tmp_path / "tokenizer.model").unlink()
    two = convert(one, tmp_path / "two", to="hf")
    assert json.loads((two / "config.json").read_text())["eos_token_id"] == 2
    assert json.loads((two / "generation_config.json").read_text())["bos_token_id"] == 1
    assert (
        json.loads((two / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "LlamaTokenizer"
    )
    (two / "chat_template.jinja").write_text("{{ hello }}")
    generation = {"eos_token_id": [2, 7], "temperature": 0.5}
    (two / "generation_config.json").write_text(json.dumps(generation))
    four = convert(convert(two, tmp_path / "three"), tmp_path / "four", to="hf")
    assert (four / "chat_template.jinja").read_text() == "{{ hello }}"
    assert json.loads((four / "generation_config.json").read_text()) == generation
    assert json.loads((four / "config.json").read_text())["eos_token_id"] == [2, 7]
    assert (four / "tokenizer.model").read_bytes() == data


def test_llama_3s_tokenizer_works_in_transformers(tmp_path):
    """tokenizer.json made from tiktoken text gives tiktoken's ids and the special tokens."""
    transformers = pytest.importorskip("transformers")
    ranks, ids = tiktoken_tools.ranks(), tiktoken_tools.ids()
    cfg = small(vocab_size=len(ranks) + 256)
    source = tools.make_meta(tmp_path / "meta", tools.meta_state(cfg, DTYPES["bfloat16"]), cfg)
    (source / "tokenizer.model").write_bytes(tiktoken_tools.content())
    out = convert(source, tmp_path / "out", to="hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    n = len(ranks)
    assert tokenizer(tiktoken_tools.TEXT).input_ids == [n, *ids]
    assert tokenizer.decode(ids) == tiktoken_tools.TEXT
    assert tokenizer("<|eot_id|>", add_special_tokens=False).input_ids == [n + 9]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (n, n + 1)
    assert len(tokenizer) == cfg.vocab_size


def test_special_tokens_of_llama_3_and_later():
    old, new = tiktoken_text.special_tokens(False), tiktoken_text.special_tokens(True)
    assert old[:5] == [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *(f"<|reserved_special_token_{i}|>" for i in range(3)),
    ]
    assert (old[8], old[9], old[255]) == (
        "<|reserved_special_token_4|>",
        "<|eot_id|>",
        "<|reserved_special_token_250|>",
    )
    assert new[2:6] == [
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
    ]
    assert (new[8], new[10], new[255]) == (
        "<|eom_id|>",
        "<|python_tag|>",
        "<|reserved_special_token_247|>",
    )


def test_more_tokens_than_rows_are_refused_and_fewer_named(tmp_path):
    cfg = small(vocab_size=24)
    folder = tools.make_meta(tmp_path / "meta", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    assert "no tokenizer" in open_folder(folder).warnings[-1]
    (folder / "tokenizer.json").write_bytes(HF_TOKENIZER)
    assert "24 rows, tokenizer.json 6 tokens" in open_folder(folder).warnings[-1]
    (folder / "tokenizer.model").write_bytes(tiktoken_file(50))
    with pytest.raises(ValueError, match="has 306 tokens, the embedding only 24 rows"):
        open_folder(folder)


def test_a_tokenizer_json_with_a_padding_token_that_has_no_row(tmp_path):
    """As in a widely used copy of Llama 2: transformers reads it, and never needs the token."""
    model = train_tokenizer(["the cat sat on a mat"] * 20, 280, tmp_path / "t.model")
    cfg = small(vocab_size=280)
    folder = tools.make_hf(tmp_path / "hf", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    content = model.path.read_bytes()
    (folder / "tokenizer.model").write_bytes(content)
    tree = sentencepiece_json.to_json(content)
    tree["added_tokens"].append(tokenizer_json.added_token(280, "<pad>"))
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    source = open_folder(folder)
    assert [t.kind for t in source.tokenizers] == ["sentencepiece"]
    assert "has 281 tokens, the embedding only 280 rows: not used" in source.warnings[-1]
    assert source.token_ids == {"bos": 1, "eos": 2}
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="has 281 tokens, the embedding only 280 rows"):
        open_folder(folder)


def test_llama_3_embedding_is_split_along_the_vocabulary(tmp_path):
    cfg = small(vocab_size=300)
    state = tools.meta_state(cfg, DTYPES["bfloat16"])
    source = tools.make_hf(tmp_path / "hf", state, cfg)
    (source / "tokenizer.model").write_bytes(tiktoken_file(44))
    out = convert(source, tmp_path / "out", to="meta", shards=4, verify=False)
    found = open_folder(out)
    assert found.weights.shards["embed"][1].slice.shape == (75, 32)
    assert found.tokenizers[0].kind == "tiktoken"
    assert (
        found.weights.read(layer_tensors(cfg)[0], 0, 300).tobytes()
        == state["tok_embeddings.weight"].tobytes()
    )


def llama_tokenizer(tmp_path) -> bytes:
    """The published tokenizer if it is present, otherwise one of the same kind."""
    published = tools.DATA / "llama_tokenizer/tokenizer.model"
    if published.exists():
        return published.read_bytes()
    path = tmp_path / "small.model"
    train_tokenizer([Path(__file__).read_text()], 700, path)
    return path.read_bytes()


def test_tokenizer_json_gives_the_ids_of_sentencepiece(tmp_path):
    """For Python code, other scripts, runs of spaces and texts that start with a space."""
    import sentencepiece

    data = llama_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    cfg = small(vocab_size=len(theirs))
    source = tools.make_meta(tmp_path / "meta", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    (source / "tokenizer.model").write_bytes(data)
    out = convert(source, tmp_path / "out", to="hf")
    texts = [p.read_text() for p in sorted(Path(__file__).parent.glob("test_convert*.py"))]
    texts += ["Ünïcødé, Привет мир, 你好世界, مرحبا, नमस्ते, \U0001f600\u200d\U0001f525", " ▁a  ", ""]
    texts += [f"{' ' * n}x{' ' * (70 - n)}y\n\t{' ' * n}" for n in range(70)]
    texts = [re.sub("</?s>|<unk>", "", text) for text in texts]  # control ids in transformers
    ours = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text).ids == [1, *ids]
        assert ours.decode(ids) == theirs.decode(ids)
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert all(tokenizer(text).input_ids == [1, *theirs.encode(text)] for text in texts)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert len(tokenizer) == len(theirs)


def test_a_tokenizer_without_equivalent_json_is_reported(tmp_path, capsys):
    cfg = small(vocab_size=40)
    source = tools.make_meta(tmp_path / "meta", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    (source / "tokenizer.model").write_bytes(sentencepiece_file(tmp_path / "sp"))
    out = convert(source, tmp_path / "out", to="hf")
    assert "it changes text before splitting it (rule 'nmt_nfkc')" in capsys.readouterr().out
    assert not (out / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("name", "size", "taken"), [("7B", 40, True), ("weights", 40, False), ("LLaMA-13B", 48, False)]
)
def test_a_tokenizer_of_the_parent_folder_must_fit(tmp_path, name, size, taken):
    """As Meta published LLaMA 1: one tokenizer next to the folders 7B, 13B and so on."""
    cfg = small(vocab_size=size)
    folder = tools.make_meta(tmp_path / name, tools.meta_state(cfg, DTYPES["float16"]), cfg)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(tmp_path / "sp"))
    found = open_folder(folder)
    assert [t.path for t in found.tokenizers] == [tmp_path / "tokenizer.model"] * taken
    assert any("parent folder" in r or "is not used" in r for r in found.warnings) == (
        name != "weights"
    )
    hf = tools.make_hf(tmp_path / "8B", tools.meta_state(cfg, DTYPES["float16"]), cfg)
    assert open_folder(hf).tokenizers == []
