"""LoRA adapters in generation: the text of merged weights, several on one base, wrong bases."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_tools import merged, random_adapters
from model_tools import F32, random_weights, small, tree_of

import llama_jax
from llama_jax.checkpoint.checkpoints import Checkpoints
from llama_jax.checkpoint.file_hashes import record_files, weights_sha256
from llama_jax.checkpoint.model_json import make_metadata, write_metadata
from llama_jax.config import ConfigError, LoraConfig, MeshConfig
from llama_jax.convert.job import convert
from llama_jax.generate.__main__ import main
from llama_jax.generate.llm import LLM
from llama_jax.model.sharding import make_mesh
from llama_jax.prepare.tokenizer import train_tokenizer

CFG = small(vocab_size=300, context=400)
LORA = LoraConfig(rank=2, alpha=1.0)
PROMPTS = ["the cat", "some animals saw 12 cats"]
TEXT = ["the cat sat on a mat", "some animals saw 12 cats", "日本 and é", "def main(argv):"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([t for t in TEXT for _ in range(50)], 300, path)


def write(folder, tokenizer, arrays, token_ids=None, cfg=CFG, adapter=None, template=None):
    """A run folder with these arrays, or that of an adapter."""
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, jax.tree.map(jnp.asarray, arrays), {"count": jnp.zeros(())}, {"step": 1})
    checkpoints.close()
    write_metadata(folder, make_metadata(cfg, token_ids or {"eos": 2}, adapter=adapter))
    shutil.copy(tokenizer.path, folder / "tokenizer.model")
    names = ["model.json", "tokenizer.model"]
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
        names.append("chat_template.jinja")
    record_files(folder, *names)
    return folder


def settings_of(lora, base, **more):
    """The entry of model.json that describes an adapter."""
    sha256 = weights_sha256(base, 1)
    return {
        "rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets),
        "rslora": lora.rslora, "base": {"path": str(base), "sha256": sha256, **more},
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    """A base, two adapters, and the base with the first adapter merged into it."""
    root = tmp_path_factory.mktemp("runs")
    params = tree_of(random_weights(CFG))
    write(root / "base", tokenizer, params)
    first, second = random_adapters(CFG, LORA), random_adapters(CFG, LORA, seed=1)
    settings = settings_of(LORA, root / "base")
    ids = {"eos": [2, 5]}
    write(root / "first", tokenizer, first, ids, adapter=settings, template=TEMPLATE)
    write(root / "second", tokenizer, second, adapter=settings)
    write(root / "merged", tokenizer, merged(params, first, LORA), ids)
    return root


def generated(llm):
    """Ids and log-probabilities of a batch, greedy."""
    made = llm.generate(PROMPTS, max_new_tokens=24, logprobs=True)
    return [g.ids for g in made], np.concatenate([g.logprobs for g in made])


@pytest.fixture(scope="module")
def want(runs):
    return generated(llama_jax.load(runs / "merged"))


def assert_same(llm, want):
    ids, logprobs = generated(llm)
    assert ids == want[0]
    np.testing.assert_allclose(logprobs, want[1], atol=2e-4)


def test_equals_merged_weights(runs, want, capfd):
    """Alone and in a batch; the log-probabilities of decoding are those of reading the text."""
    llm = llama_jax.load(runs / "base", adapter=runs / "first")
    assert_same(llm, want)
    whole = llm.generate(PROMPTS[0], max_new_tokens=24, logprobs=True)
    assert whole.ids == want[0][0]
    prompt = llm.encode(PROMPTS[0])
    scores = llm.score([*prompt, *whole.ids])
    np.testing.assert_allclose(scores.logprobs[-len(whole.ids) :], whole.logprobs, atol=1e-4)
    assert str(runs / "first") in repr(llm)
    assert "warning" not in capfd.readouterr().err
    found = llama_jax.load(runs / "first")  # and its base
    jax.tree.map(np.testing.assert_array_equal, found.params, llm.params)


def test_a_mesh(runs, want):
    mesh = make_mesh(MeshConfig(preset="fsdp_tensor", fsdp=1, tensor=2), jax.devices()[:2])
    assert_same(llama_jax.load(runs / "first", mesh=mesh), want)


def test_stacked_layers(runs, want, tokenizer):
    """As on a TPU; the weights may come from memory."""
    params = jax.tree.map(jnp.asarray, tree_of(random_weights(CFG)))
    llm = LLM(CFG, params, tokenizer, F32).with_adapter(runs / "first")
    made = llm.generate(PROMPTS[0], max_new_tokens=8, logprobs=True)
    assert made.ids == want[0][0][:8]


def test_several_adapters_share_a_base(runs, want):
    """The arrays of the base and the compiled programs; files of the adapter replace its own."""
    base = llama_jax.load(runs / "base")
    before = generated(base)[0]
    first = base.with_adapter(runs / "first")
    second = first.with_adapter(str(runs / "second"))
    assert_same(first, want)
    programs = len(base._engine._compiled)
    other = generated(second)[0]
    assert len(second._engine._compiled) == programs
    assert before != want[0] != other != before
    assert generated(base)[0] == before
    arrays = [set(map(id, jax.tree.leaves(llm.params))) for llm in (base, first, second)]
    assert arrays[0] < arrays[1]
    assert arrays[1] & arrays[2] == arrays[0]
    assert (base.eos_ids, first.eos_ids, second.eos_ids) == ((2,), (2, 5), (2,))
    assert first.chat_template == TEMPLATE
    assert base.chat_template is None


def test_quantized_base(runs, tokenizer, tmp_path):
    """An adapter that was trained on a quantized base gets one."""
    settings = settings_of(LORA, runs / "base", quantize="int8")
    arrays = random_adapters(CFG, LORA)
    write(tmp_path / "adapter", tokenizer, arrays, {"eos": [2, 5]}, adapter=settings)
    llm = llama_jax.load(tmp_path / "adapter")
    assert "int8" in repr(llm)
    other = llama_jax.load(runs / "base", quantize="int8").with_adapter(runs / "first")
    jax.tree.map(np.testing.assert_array_equal, llm.params, other.params)
    int4 = llama_jax.load(tmp_path / "adapter", quantize="int4")
    assert "int4" in repr(int4)
    assert int4.generate("the", max_new_tokens=8)


def test_another_base(runs, tokenizer, tmp_path, capfd):
    """Other sizes are an error, other weights a warning."""
    wide = small(vocab_size=300, context=400, dim=40, num_layers=3)
    write(tmp_path / "wide", tokenizer, tree_of(random_weights(wide)), cfg=wide)
    message = (
        f"the adapter {runs / 'first'} is for another model than {tmp_path / 'wide'}: "
        "dim is 32 in the adapter, 40 here; num_layers is 2 in the adapter, 3 here"
    )
    with pytest.raises(ConfigError) as error:
        llama_jax.load(tmp_path / "wide", adapter=runs / "first")
    assert str(error.value) == message
    with pytest.raises(ConfigError, match="is for another model"):
        llama_jax.load(tmp_path / "wide").with_adapter(runs / "first")
    write(tmp_path / "other", tokenizer, tree_of(random_weights(CFG, seed=1)))
    capfd.readouterr()
    assert main([str(tmp_path / "other"), "the", "--adapter", str(runs / "first")]) == 0
    assert capfd.readouterr().err == (
        f"warning: the adapter {runs / 'first'} was trained on other weights, those of "
        f"{runs / 'base'}, than those of {tmp_path / 'other'}\n"
    )


def test_folders_without_an_adapter(runs, tokenizer, tmp_path, capfd):
    load = lambda adapter: llama_jax.load(runs / "base", adapter=adapter)
    with pytest.raises(ConfigError, match=r"base holds a whole model and no LoRA adapter"):
        load(runs / "base")
    with pytest.raises(ConfigError, match=r"first holds a LoRA adapter, not the weights"):
        llama_jax.load(runs / "first", adapter=runs / "second")
    with pytest.raises(ConfigError, match=r"no adapter \(neither model.json nor adapter_config"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere is not a folder"):
        load(tmp_path / "nowhere")
    lost = settings_of(LORA, runs / "base")
    lost["base"]["path"] = str(tmp_path / "lost")
    adapter = write(tmp_path / "adapter", tokenizer, random_adapters(CFG, LORA), adapter=lost)
    with pytest.raises(ConfigError, match=r"adapter of .*lost, which does not exist here: give"):
        llama_jax.load(adapter)
    assert main([str(adapter), "the"]) == 2
    assert f"llama-jax generate BASE --adapter {adapter}" in capfd.readouterr().err
    assert main([str(runs / "base"), "the", "--adapter", str(adapter), "--max-new-tokens=4"]) == 0
    item = adapter / "steps/1/model"
    next(p for p in item.rglob("*") if p.is_file() and p.stat().st_size > 100).write_bytes(b"x")
    with pytest.raises(ConfigError, match="has 1 bytes, not"):
        load(adapter)


def test_a_folder_in_the_format_of_peft(runs, want, tmp_path, monkeypatch, capfd):
    """It is converted once, to the user's cache; the base is given, or named by the folder."""
    pytest.importorskip("safetensors", reason="needs safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = convert(runs / "first", tmp_path / "peft", to="peft", log=None)
    capfd.readouterr()
    llm = llama_jax.load(runs / "base", adapter=folder)
    err = capfd.readouterr().err
    assert err.startswith(f"converting {folder} (PEFT) once, to {tmp_path}/cache/")
    assert err.count("\n") == 1
    found = llama_jax.load(folder)
    assert capfd.readouterr().err == ""
    reference = llama_jax.load(runs / "first")
    for other in (llm, found):
        jax.tree.map(np.testing.assert_array_equal, other.params, reference.params)
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"the adapter {folder} cannot be used: "):
        llama_jax.load(runs / "base", adapter=folder)
    with pytest.raises(ConfigError, match=f"the adapter {folder} cannot be used: "):
        llm.with_adapter(folder)
