"""A converted model gives the logits of transformers and the golden text of the original."""

import dataclasses
import json
from pathlib import Path

import convert_tools as tools
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_tools import DTYPES, STORIES, small
from flax import nnx
from test_convert import needs_stories
from test_convert_settings import ROPES

from llama_jax import config as cf
from llama_jax.checkpoint.model_json import read_metadata
from llama_jax.checkpoint.weights import load_weights
from llama_jax.convert import logits as verify
from llama_jax.convert.job import convert, open_folder
from llama_jax.model.llama import ComputeConfig, Llama
from llama_jax.model.params import abstract_params, merge, structure

SHAPE = small(dim=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=80, context=4096)


def load(folder: Path) -> Llama:
    """Our model with the weights of a checkpoint."""
    cfg, _ = read_metadata(folder)
    compute = ComputeConfig(jnp.dtype(jnp.float32))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    abstract = jax.tree.map(place, abstract_params(cfg, compute))
    return merge(structure(cfg, compute), load_weights(folder, abstract))


def hf_folder(folder: Path, cfg: cf.ModelConfig, **config) -> Path:
    """A Hugging Face folder of random float32 weights, large enough for attention to matter."""
    make = lambda *args: tools.random_values(*args) * np.float32(3)
    state = tools.meta_state(cfg, DTYPES["float32"], make=make)
    tools.make_hf(folder, state, cfg)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


@pytest.mark.parametrize("name", ["llama3", "yarn, mscale", "linear", "dynamic"])
@pytest.mark.parametrize("schema", ["v4", "v5"])
def test_verify_compares_logits_past_2048(tmp_path, capsys, name, schema):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    table = ROPES[name][0]
    key = "rope_scaling" if schema == "v4" else "rope_parameters"
    source = hf_folder(tmp_path / "hf", SHAPE, **{key: table})
    convert(source, tmp_path / "out", verify=True)
    said = capsys.readouterr().out
    assert "verified: logits at 96 positions up to 4095, 2 layer(s): within" in said
    if schema == "v4" and name == "llama3":
        convert(tmp_path / "out", tmp_path / "back", to="hf", dtype="bfloat16", verify=True)
        assert "verified: logits at 96 positions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        dict(rope=cf.RopeConfig(theta=10100.0)),
        dict(rope=cf.RopeConfig(type="linear", factor=1.01)),
        dict(norm_eps=1e-3),
    ],
)
def test_verify_finds_wrong_settings(tmp_path, wrong):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = open_folder(hf_folder(tmp_path / "hf", SHAPE))
    assert "within" in verify.compare_logits(found, found, found.dtypes(), 2 << 30)
    other = dataclasses.replace(found, format="meta", cfg=dataclasses.replace(found.cfg, **wrong))
    with pytest.raises(ValueError, match="settings or the rotary layout are wrong"):
        verify.compare_logits(other, found, found.dtypes(), 2 << 30)


def test_verify_finds_a_wrong_rotary_layout(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = open_folder(hf_folder(tmp_path / "hf", SHAPE))
    other = dataclasses.replace(found, format="meta")
    other.weights = type(found.weights)(found.cfg, found.weights.shards, interleaved=True)
    with pytest.raises(ValueError, match="settings or the rotary layout are wrong"):
        verify.compare_logits(other, found, found.dtypes(), 2 << 30)


def test_verify_reports_missing_memory_or_torch(tmp_path, monkeypatch):
    found = open_folder(hf_folder(tmp_path / "hf", SHAPE))
    if verify.importlib.util.find_spec("torch"):
        assert "more than --max-memory" in verify.compare_logits(found, found, found.dtypes(), 1000)
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in verify.compare_logits(found, found, found.dtypes(), 2 << 30)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("files", [1, 3])
def test_transformers_loads_what_we_write(tmp_path, tied, files):
    """From Meta's layout, at positions past 2,048, against Meta's own formulas."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg = dataclasses.replace(SHAPE, tie_embeddings=tied)
    make = lambda *args: tools.random_values(*args) * np.float32(3)
    state = tools.meta_state(cfg, DTYPES["float32"], make=make)
    source = tools.make_meta(tmp_path / "meta", state, cfg, 2)
    out = convert(source, tmp_path / "out", to="hf", shards=files, context=cfg.context)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 24))
    positions = np.linspace(0, 4000, 24).astype(np.int64)[None]
    with torch.no_grad():
        mask = torch.ones(tokens.shape, dtype=torch.long)
        theirs = model(
            torch.from_numpy(tokens), position_ids=torch.from_numpy(positions), attention_mask=mask
        ).logits.numpy()
    meta = meta_forward(state, cfg, tokens[0], positions[0])
    np.testing.assert_allclose(theirs[0], meta, atol=2e-4 * np.abs(meta).max())
    assert model.config.rope_parameters["rope_theta"] == cfg.rope.theta


def meta_forward(state: dict, cfg: cf.ModelConfig, tokens, positions) -> np.ndarray:
    """Meta's reference model in float64: complex rotation of neighboring pairs."""
    N, K, H = cfg.shape("NKH")
    w = {k: v.astype(np.float64) for k, v in state.items()}
    norm = lambda x, s: x / np.sqrt((x * x).mean(-1, keepdims=True) + cfg.norm_eps) * s
    turn = np.exp(1j * positions[:, None] * cfg.rope.theta ** (-np.arange(0, H, 2) / H))

    def rotate(x):
        pairs = np.ascontiguousarray(x).view(np.complex128) * turn[:, None]
        return pairs.view(np.float64)

    x = w["tok_embeddings.weight"][tokens]
    for i in range(cfg.num_layers):
        p = f"layers.{i}."
        y = norm(x, w[p + "attention_norm.weight"])
        q, k, v = (
            (y @ w[f"{p}attention.w{c}.weight"].T).reshape(len(x), heads, H)
            for c, heads in (("q", N), ("k", K), ("v", K))
        )
        q, k, v = rotate(q), np.repeat(rotate(k), N // K, 1), np.repeat(v, N // K, 1)
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = (
            x
            + np.einsum("nts,snh->tnh", scores, v).reshape(len(x), -1)
            @ w[p + "attention.wo.weight"].T
        )
        y = norm(x, w[p + "ffn_norm.weight"])
        gate = y @ w[p + "feed_forward.w1.weight"].T
        up = y @ w[p + "feed_forward.w3.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "feed_forward.w2.weight"].T
    output = w.get("output.weight", w["tok_embeddings.weight"])
    return norm(x, w["norm.weight"]) @ output.T


@needs_stories
@pytest.mark.parametrize("name", ["meta-mha", "meta-mha-mp2", "hf-mha"])
def test_real_model_generates_its_golden_text(tmp_path, name):
    import sentencepiece

    context = None if name.startswith("hf") else 512
    folder = convert(STORIES / name, tmp_path / "out", context=context)
    llama, golden = load(folder), np.load(STORIES / "golden_logits.npz")
    run = nnx.jit(lambda llama, ids: llama(ids))
    for case in ("greedy200", "prompt", "story2"):
        ids = golden[f"{case}/ids"]
        logits = np.asarray(run(llama, jnp.asarray(ids)[None]))[0]
        np.testing.assert_allclose(logits, golden[f"{case}/logits"], atol=1e-4, rtol=0)
    expected = json.loads((STORIES / "golden.json").read_text())
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert [1, *tokenizer.encode(expected["prompt"])] == expected["prompt_ids"]
    # Each id is the most likely one after those before it, as in greedy generation.
    ids = expected["greedy_ids_from_bos"]
    logits = run(llama, jnp.asarray(ids)[None])[0]
    assert [1, *np.argmax(logits[:200], axis=-1).tolist()] == ids
    assert tokenizer.decode(ids) == expected["greedy_text_200_steps"]
