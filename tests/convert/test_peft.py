"""Adapters in PEFT's format are read whole or refused by name, written back, and merged."""

import json
import shutil
from pathlib import Path

import convert_tools as tools
import gguf_tools
import jax
import numpy as np
import peft_tools
import pytest
from convert_tools import ANY, DTYPES, small
from peft_tools import adapter_tensors, make_peft, modules_of

from llama_jax.checkpoint.model_json import read_metadata
from llama_jax.convert import peft
from llama_jax.convert.__main__ import main
from llama_jax.convert.adapters import open_adapter
from llama_jax.convert.job import convert, open_folder
from llama_jax.convert.tensors import layer_tensors

CFG = small()


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """One model as a Hugging Face folder with a chat template, and in our format."""
    folder = tmp_path_factory.mktemp("bases")
    state = tools.meta_state(CFG, DTYPES["float32"], make=tools.random_values)
    hf = tools.make_hf(folder / "hf", state, CFG)
    (hf / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    convert(hf, folder / "ours", log=None)
    return {"hf": hf, "ours": folder / "ours"}


def command(*args) -> int:
    return main([*map(str, args), *ANY])


def add_to_metadata(folder: Path, **more) -> None:
    """Add keys to model.json, as training writes them."""
    tree = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(tree | more))
    (folder / "manifest.json").unlink()


def our_updates(folder: Path) -> dict[str, np.ndarray]:
    """What one of our adapters adds to each matrix, under transformers' names, [out, in]."""
    adapter = open_adapter(folder)
    out = {}
    for tensor in layer_tensors(adapter.cfg):
        target = tensor.spec.path.rpartition("/")[2]
        if target in adapter.pairs:
            a, b = (x[tensor.layer].astype(np.float64) for x in adapter.pairs[target])
            out[tensor.hf_name.removesuffix(".weight")] = adapter.scale * (a @ b).T
    return out


def assert_same_updates(folder: Path, expected: dict[str, np.ndarray], tolerance=0.0):
    for module, update in our_updates(folder).items():
        wanted = expected.get(module, np.zeros_like(update))
        np.testing.assert_allclose(update, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def test_peft_in_and_out_keeps_every_bit(tmp_path, bases, capsys):
    source = make_peft(tmp_path / "peft", CFG)
    assert command(source, tmp_path / "ours", "--base", bases["ours"], "--verify") == 0
    assert command(tmp_path / "ours", tmp_path / "back", "--base", bases["ours"], "--verify") == 0
    assert capsys.readouterr().out.count("verified: ") == 2
    cfg, metadata = read_metadata(tmp_path / "ours")
    assert cfg == CFG
    assert metadata["token_ids"]["eos"] == [2, 5]
    adapter = metadata["adapter"]
    assert adapter["rank"] == 4
    assert adapter["alpha"] == 6
    assert adapter["base"]["path"] == str(bases["ours"].resolve())
    assert len(adapter["base"]["sha256"]) == 64
    for folder in (source, tmp_path / "ours"):
        assert command("--inspect", folder, "--base", bases["ours"]) == 0
        assert "LoRA adapter, 3,712 parameters\n  rank 4, alpha 6, targets q, k" in (
            capsys.readouterr().out
        )
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (bases["hf"] / name).read_bytes()
    name = "adapter_model.safetensors"
    theirs, ours = (tools.formats.read_safetensors(p / name) for p in (source, tmp_path / "back"))
    assert theirs.keys() == ours.keys()
    read = lambda tensor: tools.formats.view(tensor, tools.formats.map_file(tensor.path))
    assert all(np.array_equal(read(theirs[n]), read(ours[n])) for n in theirs)
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    kept = ("peft_type", "task_type", "r", "lora_alpha", "bias")
    assert {k: config[k] for k in kept} == {k: peft_tools.CONFIG[k] for k in kept}
    assert set(config["target_modules"]) == set(peft_tools.NAMES)
    assert config["use_rslora"] is False
    assert config["base_model_name_or_path"] == str(bases["ours"])


def test_a_base_in_another_format_and_bfloat16_tensors(tmp_path, bases):
    tensors = adapter_tensors(CFG, dict.fromkeys(modules_of(CFG), 4), "bfloat16")
    source = make_peft(tmp_path / "peft", CFG, tensors, use_rslora=True)
    convert(source, tmp_path / "ours", base=bases["hf"], log=None)
    scale = 6 / np.sqrt(4)
    expected = {
        m: scale
        * tensors[f"base_model.model.{m}.lora_B.weight"].astype(np.float64)
        @ tensors[f"base_model.model.{m}.lora_A.weight"].astype(np.float64)
        for m in modules_of(CFG)
    }
    assert_same_updates(tmp_path / "ours", expected, 1e-14)
    assert read_metadata(tmp_path / "ours")[1]["adapter"]["base"]["sha256"] == ""
    assert command(tmp_path / "ours", tmp_path / "out", "--to", "peft") == 0
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["use_rslora"] is True


SELECTED = {
    "list of suffixes": (["q_proj", "mlp.up_proj"], {}, ["q_proj", "up_proj"], [0, 1]),
    "null is q and v": (None, {}, ["q_proj", "v_proj"], [0, 1]),
    "all-linear": ("all-linear", {}, list(peft_tools.NAMES), [0, 1]),
    "regular expression": (r".*\.1\.mlp\.(gate|down)_proj", {}, ["gate_proj", "down_proj"], [1]),
    "layers": (["k_proj"], dict(layers_to_transform=[1]), ["k_proj"], [1]),
    "layer": (["k_proj"], dict(layers_to_transform=0, layers_pattern="layers"), ["k_proj"], [0]),
    "exclude list": (["k_proj", "o_proj"], dict(exclude_modules=["o_proj"]), ["k_proj"], [0, 1]),
    "exclude pattern": (["o_proj"], dict(exclude_modules=r".*\.0\..*"), ["o_proj"], [1]),
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTED)
def test_modules_are_selected_as_by_peft(tmp_path, bases, name):
    targets, settings, names, layers = SELECTED[name]
    modules = [m for m in modules_of(CFG, names) if int(m.split(".")[2]) in layers]
    tensors = adapter_tensors(CFG, dict.fromkeys(modules, 4))
    source = make_peft(tmp_path / "peft", CFG, tensors, target_modules=targets, **settings)
    convert(source, tmp_path / "ours", base=bases["ours"], log=None)
    pytest.importorskip("safetensors")
    expected = peft_tools.updates(source)
    assert set(expected) == set(modules)
    assert_same_updates(tmp_path / "ours", expected, 1e-14)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_single_modules(tmp_path, bases, rslora):
    ranks = {m: 4 for m in modules_of(CFG, ["q_proj", "down_proj"])}
    ranks["model.layers.0.self_attn.q_proj"] = 8
    ranks["model.layers.1.mlp.down_proj"] = 3
    source = make_peft(
        tmp_path / "peft", CFG, adapter_tensors(CFG, ranks), use_rslora=rslora,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 8, "model.layers.1.mlp.down_proj": 3},
        alpha_pattern={"down_proj": 5.5},
    )  # fmt: skip
    convert(source, tmp_path / "ours", base=bases["ours"], log=None)
    assert open_adapter(tmp_path / "ours").lora.rank == 8
    pytest.importorskip("safetensors")
    # b is rounded once to float32 after the multiplication by its factor.
    assert_same_updates(tmp_path / "ours", peft_tools.updates(source), 1e-6)


REFUSED = {
    "DoRA": (dict(use_dora=True), "use_dora=True"),
    "bias": (dict(bias="lora_only"), "bias='lora_only'"),
    "lora_bias": (dict(lora_bias=True), "lora_bias=True"),
    "modules_to_save": (dict(modules_to_save=["lm_head"]), "modules_to_save=['lm_head']"),
    "tokens": (dict(trainable_token_indices=[3]), "trainable_token_indices=[3]"),
    "fan": (dict(fan_in_fan_out=True), "fan_in_fan_out=True"),
    "IA3": (dict(peft_type="IA3"), "peft_type='IA3'"),
    "no type": (dict(peft_type=None), "peft_type=None"),
    "classifier": (dict(task_type="SEQ_CLS"), "task_type='SEQ_CLS'"),
    "PiSSA": (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    "LoftQ": (dict(init_lora_weights="loftq"), "init_lora_weights='loftq'"),
    "parameters": (dict(target_parameters=["mlp.w"]), "target_parameters=['mlp.w']"),
    "replication": (dict(layer_replication=[[0, 2], [0, 2]]), "layer_replication"),
    "aLoRA": (dict(alora_invocation_tokens=[1]), "alora_invocation_tokens=[1]"),
    "head": (dict(target_modules=["q_proj", "lm_head"]), "lm_head is not supported"),
    "embedding": (dict(target_modules=["embed_tokens"]), "model.embed_tokens is not supported"),
    "none selected": (dict(target_modules=["c_attn"]), "selects no matrix"),
    "targets": (dict(target_modules=3), "target_modules=3"),
    "rank 0": (dict(r=0), "rank 0"),
    "rank true": (dict(r=True), "rank True"),
    "no alpha": (dict(lora_alpha=None), "alpha None"),
    "pattern rank": (dict(rank_pattern={"q_proj": -1}), "rank -1"),
    "scale of a module": (dict(alpha_pattern={"q_proj": 1e-300}), "too far from that"),
    "pattern table": (dict(alpha_pattern=[1]), "alpha_pattern=[1] is not a table"),
    "rslora": (dict(use_rslora="yes"), "use_rslora='yes'"),
    "layers": (dict(layers_to_transform=["a"]), "layers_to_transform"),
    "layers, pattern": (dict(layers_to_transform=[0], layers_pattern="h"), "layers_pattern='h'"),
    "layers, regex": (dict(layers_to_transform=[0], target_modules="x"), "needs a list of names"),
    "not a regex": (dict(target_modules="(q_proj"), "not a regular expression"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_not_supported_are_named(tmp_path, bases, name, capsys):
    settings, message = REFUSED[name]
    tensors = adapter_tensors(CFG, dict.fromkeys(modules_of(CFG), 4))
    source = make_peft(tmp_path / "peft", CFG, tensors, **settings)
    assert command(source, tmp_path / "out", "--base", bases["ours"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "adapter_config.json" in error
    assert [p.name for p in tmp_path.iterdir()] == ["peft"]


def test_a_regular_expression_that_takes_forever(tmp_path, bases, monkeypatch):
    monkeypatch.setattr(peft, "_REGEX_SECONDS", 0.5)
    source = make_peft(tmp_path / "peft", CFG, {}, target_modules="(.*)*(.*)*(.*)*(.*)*X")
    with pytest.raises(ValueError, match="takes over"):
        convert(source, tmp_path / "out", base=bases["ours"], log=None)


def test_unknown_settings_are_named_in_a_note(tmp_path, bases, capsys):
    source = make_peft(tmp_path / "peft", CFG, some_new_setting=1)
    assert command(source, tmp_path / "out", "--base", bases["ours"]) == 0
    assert "ignored some_new_setting" in capsys.readouterr().out


PREFIX = "base_model.model.model.layers.1.mlp.up_proj"
TENSORS = {
    "missing": (lambda t: t.pop(f"{PREFIX}.lora_B.weight"), f"{PREFIX}.lora_B.weight is missing"),
    "DoRA": (
        lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": np.ones(48, np.float32)}),
        "lora_magnitude_vector is not a tensor of this model",
    ),
    "whole matrix": (
        lambda t: t.update({"base_model.model.lm_head.weight": np.ones((24, 32), np.float32)}),
        "lm_head.weight is not a tensor of this model",
    ),
    "rank": (
        lambda t: t.update({f"{PREFIX}.lora_A.weight": np.ones((3, 32), np.float32)}),
        "has shape [3, 32], adapter_config.json and the base make it [4, 32]",
    ),
    "dimensions": (
        lambda t: t.update({f"{PREFIX}.lora_A.weight": np.ones((4, 32, 1), np.float32)}),
        "has shape [4, 32, 1]",
    ),
    "not finite": (
        lambda t: t[f"{PREFIX}.lora_B.weight"].__setitem__((0, 0), np.nan), "are not finite"
    ),
    "integers": (
        lambda t: t.update({f"{PREFIX}.lora_A.weight": np.ones((4, 32), np.int32)}),
        "is int32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_named(tmp_path, bases, name, capsys):
    change, message = TENSORS[name]
    tensors = adapter_tensors(CFG, dict.fromkeys(modules_of(CFG), 4))
    change(tensors)
    source = make_peft(tmp_path / "peft", CFG, tensors)
    assert command(source, tmp_path / "out", "--base", bases["ours"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read(tmp_path, bases, capsys):
    source = make_peft(tmp_path / "peft", CFG)
    weights = source / "adapter_model.safetensors"
    content = weights.read_bytes()

    def error_of() -> str:
        assert command(source, tmp_path / "out", "--base", bases["ours"]) == 1
        return capsys.readouterr().err

    weights.write_bytes(content[:-4])
    assert "cut off" in error_of()
    weights.rename(source / "adapter_model.bin")
    assert "save it again" in error_of()
    (source / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors is missing" in error_of()
    weights.write_bytes(content)
    (source / "adapter_config.json").write_text("[]")
    assert "damaged" in error_of()
    (source / "adapter_config.json").unlink()
    assert "adapter_config.json is missing" in error_of()
    assert [p.name for p in tmp_path.iterdir()] == ["peft"]


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_of_another_base_names_the_sizes(tmp_path, bases, merge, capsys):
    other = small(dim=64, num_kv_heads=2, num_layers=3)
    tools.make_hf(tmp_path / "base", tools.meta_state(other, DTYPES["float32"]), other)
    source = make_peft(tmp_path / "peft", other)
    args = ["--merge"] if merge else []
    assert command(source, tmp_path / "out", "--base", bases["ours"], *args) == 1
    error = capsys.readouterr().err
    assert "dim is 64 in the adapter, 32 in the base" in error
    assert "num_kv_heads x head_dim is 8 in the adapter, 16 in the base" in error
    assert "num_layers is at least 3 in the adapter, 2 in the base" in error
    assert command(source, tmp_path / "ours", "--base", tmp_path / "base") == 0
    assert command(tmp_path / "ours", tmp_path / "out", "--merge", "--base", bases["ours"]) == 1
    error = capsys.readouterr().err
    assert "dim is 64 in the adapter, 32 in the base" in error
    assert "num_layers is 3 in the adapter, 2 in the base" in error


def test_the_base_is_needed_and_must_be_the_same(tmp_path, bases, capsys):
    source = make_peft(tmp_path / "peft", CFG)
    assert command(source, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "give --base BASE" in error
    assert "'org/base'" in error
    base = shutil.copytree(bases["ours"], tmp_path / "base")
    convert(source, tmp_path / "ours", base=base, log=None)
    shutil.rmtree(base)
    assert command(tmp_path / "ours", tmp_path / "out", "--merge") == 1
    assert "does not exist; give --base BASE" in capsys.readouterr().err
    state = tools.meta_state(CFG, DTYPES["float32"], seed=1, make=tools.random_values)
    convert(tools.make_hf(tmp_path / "hf", state, CFG), base, log=None)
    assert command(tmp_path / "ours", tmp_path / "out", "--merge") == 1
    assert "trained on other weights" in capsys.readouterr().err
    assert command(tmp_path / "ours", tmp_path / "out", "--merge", "--base", bases["ours"]) == 0


def test_options_that_do_not_fit_together(tmp_path, bases, capsys):
    source = make_peft(tmp_path / "peft", CFG)

    def error_of(*args) -> str:
        assert command(args[0], tmp_path / "out", *args[1:]) == 1
        return capsys.readouterr().err

    base = ["--base", bases["ours"]]
    assert "is not a LoRA adapter" in error_of(bases["ours"], "--merge")
    assert "is not a LoRA adapter" in error_of(bases["ours"], "--to", "peft")
    assert "add --merge" in error_of(source, "--to", "hf", *base)
    assert "cannot hold" in error_of(source, "--to", "peft", "--merge", *base)
    assert "--dtype: an adapter stays float32" in error_of(source, "--dtype", "bfloat16", *base)
    assert "does not exist" in error_of(tmp_path / "none", "--merge")
    convert(source, tmp_path / "ours", base=bases["ours"], log=None)
    assert "is a LoRA adapter" in error_of(source, "--base", tmp_path / "ours")
    assert "give a --max-memory" in _memory_error(tmp_path, bases)


def _memory_error(tmp_path, bases) -> str:
    with pytest.raises(ValueError, match="rank 4") as error:
        peft.open_peft(tmp_path / "peft", open_folder(bases["ours"]), max_memory=100)
    return str(error.value)


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_merge_adds_in_float32_and_rounds_once(tmp_path, bases, to, capsys):
    source = make_peft(tmp_path / "peft", CFG)
    convert(source, tmp_path / "ours", base=bases["ours"], log=None)
    add_to_metadata(tmp_path / "ours", lineage={"data": {"alpaca": "of training"}})
    args = ["--merge", "--to", to, "--dtype", "bfloat16"]
    assert command(tmp_path / "ours", tmp_path / "merged", *args) == 0
    said = capsys.readouterr().out
    base, result = open_folder(bases["ours"]), open_folder(tmp_path / "merged")
    assert result.format == to
    assert result.token_ids["eos"] == [2, 5]
    template = tmp_path / "merged/chat_template.jinja"
    assert template.read_bytes() == (bases["hf"] / template.name).read_bytes()
    adapter, lost, size = open_adapter(tmp_path / "ours"), 0.0, 0.0
    scale = np.float32(6 / 4)
    for tensor in layer_tensors(CFG):
        rows = tensor.shape(CFG)[0]
        w, out = (s.weights.read(tensor, 0, rows) for s in (base, result))
        assert out.dtype == DTYPES["bfloat16"]
        target = tensor.spec.path.rpartition("/")[2]
        if target not in adapter.pairs:
            assert np.array_equal(out, w.astype(out.dtype))
            continue
        a, b = (x[tensor.layer] for x in adapter.pairs[target])
        exact = w + scale * (a @ b)
        # One unit in the last place, where the order of the float32 sum changes a tie.
        assert np.mean(out == exact.astype(out.dtype)) > 0.999
        lost += np.sum((out.astype(np.float64) - exact) ** 2)
        size += np.sum((exact - w).astype(np.float64) ** 2)
    line = next(line for line in said.splitlines() if "rounding lost" in line)
    lineage = json.loads((tmp_path / "merged/manifest.json").read_text())["lineage"]
    assert lineage["base"]["path"] == str(bases["ours"].resolve())
    assert lineage["adapter"]["path"] == str((tmp_path / "ours").resolve())
    assert lineage["adapter"]["sha256"] == open_adapter(tmp_path / "ours").sha256
    assert lineage["adapter"]["rank"] == 4
    assert lineage["data"] == {"alpaca": "of training"}
    stated = float(line.split("rounding lost ")[1].split("%")[0]) / 100
    assert stated == pytest.approx(np.sqrt(lost / size), rel=0.01)
    assert "at most" in line


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_merge_writes_gguf(tmp_path, bases, kind):
    if kind == "q8_0":
        pytest.importorskip("gguf")
    cfg = small(dim=64, ffn_dim=96, head_dim=8)  # rows of whole blocks
    base = tools.make_hf(
        tmp_path / "base", tools.meta_state(cfg, DTYPES["float32"], make=tools.random_values), cfg
    )
    letters = gguf_tools.model(tmp_path / "letters.gguf", small())[0]
    convert(letters, tmp_path / "letters", log=None)
    (base / "tokenizer.model").write_bytes((tmp_path / "letters/tokenizer.model").read_bytes())
    source, lines = make_peft(tmp_path / "peft", cfg), []
    options = dict(base=base, merge=True, log=lines.append, verify=kind == "f16")
    one = convert(source, tmp_path / "one.gguf", to="gguf", type=kind, **options)
    assert any("rounding lost" in line for line in lines) == (kind == "f16")
    whole = convert(source, tmp_path / "whole", to="hf", dtype="float32", **options)
    other = convert(whole, tmp_path / "other.gguf", to="gguf", type=kind, log=None)
    one, other = (open_folder(path) for path in (one, other))
    assert one.cfg == other.cfg == cfg
    for tensor in layer_tensors(cfg):
        rows = tensor.shape(cfg)[0]
        assert np.array_equal(
            one.weights.read(tensor, 0, rows), other.weights.read(tensor, 0, rows)
        )


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_merge_with_a_quantized_base_uses_what_training_used(tmp_path, bases, kind, capsys):
    convert(bases["hf"], tmp_path / "quantized", quantize=kind, log=None)
    source = make_peft(tmp_path / "peft", CFG)
    assert command(source, tmp_path / "out", "--merge", "--base", tmp_path / "quantized") == 0
    assert f"merged with the base's matrices rounded to {kind}" in capsys.readouterr().out
    # The same from the base's original weights, which training quantized.
    convert(source, tmp_path / "ours", base=bases["ours"], log=None)
    adapter = read_metadata(tmp_path / "ours")[1]["adapter"]
    adapter["base"]["quantize"] = kind
    add_to_metadata(tmp_path / "ours", adapter=adapter)
    assert command(tmp_path / "ours", tmp_path / "again", "--merge") == 0
    from llama_jax.model.quantize import quantize_weight

    base, one, other = (
        open_folder(p) for p in (bases["ours"], tmp_path / "out", tmp_path / "again")
    )
    adapter = open_adapter(tmp_path / "ours")
    for tensor in layer_tensors(CFG):
        rows = tensor.shape(CFG)[0]
        w, x, y = (s.weights.read(tensor, 0, rows) for s in (base, one, other))
        assert np.array_equal(x, y)
        target = tensor.spec.path.rpartition("/")[2]
        if target in adapter.pairs:
            a, b = (v[tensor.layer] for v in adapter.pairs[target])
            rounded = np.asarray(quantize_weight(w, kind).astype(np.dtype("float32")))
            np.testing.assert_allclose(x, rounded + 1.5 * (a @ b), atol=1e-6)


def test_a_killed_merge_continues(tmp_path, bases, monkeypatch):
    source = make_peft(tmp_path / "peft", CFG)
    convert(source, tmp_path / "whole", base=bases["ours"], merge=True, to="hf", log=None)
    from llama_jax.convert import job

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "_write_small_files", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", base=bases["ours"], merge=True, to="hf", log=None)
    lines: list[str] = []
    convert(source, tmp_path / "out", base=bases["ours"], merge=True, to="hf", log=lines.append)
    assert any(line.startswith("continuing") for line in lines)
    names = ("model.safetensors", "manifest.json")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_our_adapters_are_checked_before_they_are_read(tmp_path, bases, capsys):
    source = make_peft(tmp_path / "peft", CFG)
    convert(source, tmp_path / "ours", base=bases["ours"], log=None)
    chunk = next((tmp_path / "ours").rglob("c/1/0/0"))
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1] + b"\1")
    assert command(tmp_path / "ours", tmp_path / "out") == 1
    assert "has changed since it was written" in capsys.readouterr().err
    chunk.write_bytes(content)
    (tmp_path / "ours/manifest.json").unlink()
    settings = json.loads((tmp_path / "ours/model.json").read_text())
    for change, message in [
        (dict(rank=8), "is [2,"), (dict(targets=["q"]), "is not a tensor of this model"),
        (dict(rank=0), "is damaged"), (dict(targets=["lm_head"]), "is damaged"),
        (dict(base={}), "is damaged"), (dict(alpha="1"), "is damaged"),
    ]:  # fmt: skip
        changed = settings | {"adapter": settings["adapter"] | change}
        (tmp_path / "ours/model.json").write_text(json.dumps(changed))
        assert command(tmp_path / "ours", tmp_path / "out") == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_orbax_restores_a_converted_adapter(tmp_path, bases):
    from llama_jax.checkpoint.weights import check_weights, load_weights

    source = make_peft(tmp_path / "peft", CFG, target_modules=["v_proj"])
    convert(source, tmp_path / "ours", base=bases["ours"], log=None)
    check_weights(tmp_path / "ours")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32, sharding=here)
    tree = {"blocks": {"attention": {"v": {"a": shape(2, 32, 4), "b": shape(2, 4, 16)}}}}
    loaded = load_weights(tmp_path / "ours", tree)["blocks"]["attention"]["v"]
    pair = open_adapter(tmp_path / "ours").pairs["v"]
    assert np.array_equal(loaded["a"], pair.a_LIr)
    assert np.array_equal(loaded["b"], pair.b_LrO)
