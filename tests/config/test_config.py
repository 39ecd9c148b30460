"""Recipes: settings, defaults, overrides and error messages."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from llama_jax.config import (
    MODELS,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    DpoConfig,
    EvaluateConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    RopeConfig,
    SourceConfig,
    TrainConfig,
    check_model,
    check_recipe,
    load_recipe,
    load_saved_recipe,
    settings,
    to_dict,
    to_toml,
)

ROOT = Path(__file__).parents[2]
OTHERS = ("llama", "corpus-small")
RECIPES = sorted(path for path in ROOT.glob("configs/*.toml") if path.stem not in OTHERS)
MINIMAL = """
[model]
name = "tiny"
[data]
seq_len = 64
[data.sources.a]
path = "text"
[train]
steps = 10
batch_size = 8
[checkpoint]
dir = "out"
"""


EQUAL_FACTORS = ["rope.low_freq_factor=4", "rope.high_freq_factor=4"]


@pytest.fixture
def load(tmp_path):
    """load(overrides...) of the minimal recipe, or of another text."""

    def run(*overrides, text=MINIMAL):
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return run


def test_there_are_recipes():
    assert len(RECIPES) >= 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_round_trips(path, tmp_path):
    recipe = load_recipe(path)
    copy = tmp_path / "copy.toml"
    copy.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize("name", MODELS)
def test_every_model_round_trips(name):
    cfg = MODELS[name]
    assert check_model(json.loads(json.dumps(to_dict(cfg))), "model.json") == cfg


def test_round_trip_of_awkward_values(load):
    text = (
        MINIMAL.replace('path = "text"', 'path = "a \\"b\\" \\\\ ü 雪 🦙 \\u007f"')
        + '[data.sources."with space.and dot"]\npath = "x"\nweight = 0.1\n'
    )
    recipe = load("train.profile_steps=[3, 5]", 'train.sample_prompts=["a", "b\\n"]', text=text)
    assert recipe.data.sources["a"].path == 'a "b" \\ ü 雪 🦙 \x7f'
    assert recipe.data.sources["with space.and dot"].weight == 0.1
    assert recipe.train.profile_steps == (3, 5)
    assert load(text=to_toml(recipe)) == recipe


def test_defaults_are_those_of_the_paper(load):
    optim = load().optim
    assert (optim.b1, optim.b2, optim.weight_decay, optim.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (optim.warmup_steps, optim.final_fraction) == (2000, 0.1)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.steps=7", lambda r: r.train.steps, 7),
        (" train.steps = 7 ", lambda r: r.train.steps, 7),
        ("optim.peak_lr=1e-3", lambda r: r.optim.peak_lr, 1e-3),
        ("optim.peak_lr=1", lambda r: r.optim.peak_lr, 1.0),
        ("train.unroll=true", lambda r: r.train.unroll, True),
        ("checkpoint.dir=a/b c", lambda r: r.checkpoint.dir, "a/b c"),
        ("checkpoint.dir=a=b", lambda r: r.checkpoint.dir, "a=b"),
        ('checkpoint.dir="7"', lambda r: r.checkpoint.dir, "7"),
        ("train.profile_steps=[2, 4]", lambda r: r.train.profile_steps, (2, 4)),
        ("data.sources.b.path=x", lambda r: "b" in r.data.sources, True),
        ("model.num_layers=2", lambda r: r.model.num_layers, 2),
        ("model.name=stories260k", lambda r: r.model, MODELS["stories260k"]),
        ("rope.theta=5e5", lambda r: r.model.rope.theta, 5e5),
        ("model.rope.theta=5e5", lambda r: r.model.rope.theta, 5e5),
    ],
)
def test_overrides(load, override, read, value):
    assert read(load(override)) == value
    assert read(load()) != value


def test_the_last_override_wins(load):
    assert load("train.steps=7", "train.steps=9").train.steps == 9


def test_a_model_field_replaces_one_of_the_table(load):
    cfg = load("model.num_layers=3").model
    assert cfg == dataclasses.replace(MODELS["tiny"], num_layers=3)


def test_another_rope_type_keeps_theta_only(load):
    changes = ("model.name=llama3.1-8b", "rope.type=linear", "rope.factor=2")
    assert load(*changes).model.rope == RopeConfig(theta=5e5, type="linear", factor=2.0)
    same = load("model.name=llama3.1-8b", "rope.factor=16").model.rope
    assert same == dataclasses.replace(MODELS["llama3.1-8b"].rope, factor=16.0)


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=1"], "unknown setting train.stepz; did you mean train.steps?"),
        (["optim.lr=1.0"], "unknown setting optim.lr"),
        (["train.peak_lr=1.0"], "did you mean optim.peak_lr?"),
        (["trian.steps=1"], "unknown setting trian"),
        (["rope.thta=1.0"], "did you mean model.rope.theta?"),
        (["mesh.pressed=fsdp"], "did you mean mesh.preset?"),
        (["data.sources.a.wieght=2"], "unknown setting data.sources.a.wieght"),
        (["model.name=lama-7b"], "is not a known model; did you mean llama-7b?"),
        (["train.steps=many"], "train.steps='many'"),
        (["train.steps=1.5"], "train.steps=1.5"),
        (["train.steps=true"], "train.steps=True"),
        (["train.steps=0"], "train.steps=0: input should be greater than 0"),
        (["train.unroll=1"], "train.unroll=1"),
        (["checkpoint.dir=7"], "checkpoint.dir=7"),
        (["optim.peak_lr=nan"], "optim.peak_lr"),
        (["optim.b1=1.5"], "optim.b1=1.5"),
        (["optim.b1=1.0"], "optim.b1=1.0: input should be less than 1"),
        (["optim.b2=1.0"], "optim.b2=1.0"),
        ([f"train.seed={2**70}"], "train.seed=1180591620717411303424: input should be less than"),
        ([f"data.seed={2**32}"], "data.seed=4294967296"),
        (['checkpoint.dir="a\\u0000b"'], "cannot contain a NUL character"),
        (['checkpoint.dir=""'], "checkpoint.dir='': it is empty"),
        (
            ["checkpoint.dir=http://b/run"],
            "checkpoint.dir='http://b/run': http:// is not supported",
        ),
        (["checkpoint.dir=s3:///run"], "checkpoint.dir='s3:///run': it is not of the form s3://"),
        (["train.init_from=s3://b/../x"], "train.init_from='s3://b/../x': it is not of the form"),
        (["data.tokenizer=https://x/t"], "data.tokenizer='https://x/t': https:// is not supported"),
        (["data.prepared=hf://b/x"], "data.prepared='hf://b/x': hf:// is not supported"),
        (["data.sources.a.path=gs://"], "data.sources.a.path='gs://': it is not of the form gs://"),
        (['data.sources.a.path=""'], "data.sources.a.path='': it is empty"),
        (["data.sources={}"], "data.sources is empty; give at least one text source"),
        (
            ["data.sources.b.path=./text"],
            "data.sources.b.path='./text' is the text of data.sources.a too",
        ),
        (["train.batch_size=1000000000"], "64,000,000,000 tokens per step; at most"),
        (["train.batch_size=1e9"], "train.batch_size=1000000000.0"),
        (["model.vocab_size=10000000000"], "model.vocab_size=10000000000: input should be less"),
        (["model.vocab_size=1e10"], "model.vocab_size=10000000000.0"),
        (["model.vocab_size=0"], "model.vocab_size=0: input should be greater than 0"),
        (["model.num_layers=100000000"], "model.num_layers=100000000"),
        (["train.profile_steps=[5, 2]"], "train.profile_steps=[5, 2]: give [first, last]"),
        (["train.profile_steps=[0, 2]"], "train.profile_steps=[0, 2]"),
        (["data.skip_batches=[[5, 2]]"], "give [first, last]"),
        (["data.skip_batches=[5, 2]"], "data.skip_batches.0=5"),
        (["data.skip_batches=[[1, 1000000000]]"], "leaves out 1,000,000,000 batches, more than"),
        (["checkpoint.dir=a\udcff"], "is not valid Unicode"),
        (["train.sample_prompts=" + "[" * 50_000], "train.sample_prompts="),
        (["a." * 5000 + "b=1"], "nested too deeply"),
        (["train.remat=some"], "train.remat='some'"),
        (["train.remat=3"], "train.remat=3: give none, matmuls, full, auto, or a list"),
        (["train.remat=[1]"], "train.remat=[1]: give none, matmuls, full, auto, or a list"),
        (["mesh.preset=ddp"], "'fsdp', 'fsdp_tensor' or 'tensor_sequence'"),
        (["train.profile_steps=[1]"], "train.profile_steps"),
        (["data.val_fraction=0.5"], "data.val_fraction=0.5"),
        (["steps"], "override 'steps' is not of the form section.key=value"),
        (["train.steps.more=1"], "steps is a setting, not a section"),
        (["model.rope=3"], "[model.rope]"),
        (["train=3"], "train"),
        (["model.num_kv_heads=2"], "num_heads=3 must be a multiple of num_kv_heads=2"),
        (["model.head_dim=63"], "head_dim=63 must be even"),
        (
            ["train.gradient_accumulation=3"],
            "train.batch_size=8 must be a multiple of train.gradient_accumulation=3",
        ),
        (["data.seq_len=512"], "data.seq_len=512 is longer than model.context=256"),
        (["rope.factor=2"], "rope.type='default' does not use factor; it takes theta only"),
        (["rope.type=linear"], "rope.type='linear' needs factor"),
        (["rope.type=dynamic"], "rope.type='dynamic' needs factor"),
        (["rope.type=yarn"], "rope.type='yarn' needs factor"),
        (["rope.type=llama3", "rope.factor=8"], "needs low_freq_factor, high_freq_factor"),
        (["rope.type=linear", "rope.factor=2", "rope.mscale=1"], "does not use mscale"),
        (["rope.type=linear", "rope.factor=0.5"], "greater than or equal to 1"),
        (["rope.type=longrope"], "rope.type='longrope'"),
        (
            ["rope.type=llama3", "rope.factor=8", *EQUAL_FACTORS],
            "rope.high_freq_factor=4.0 must be greater than low_freq_factor=4.0",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_settings(load, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(*overrides)


def test_every_problem_at_once(load):
    with pytest.raises(ConfigError) as error:
        load("train.stepz=1", "optim.b1=2.0", "mesh.preset=x")
    for name in ("train.stepz", "optim.b1", "mesh.preset"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("steps = 10\n", "setting train.steps is missing"),
        ('dir = "out"\n', "setting checkpoint.dir is missing"),
        ("seq_len = 64\n", "setting data.seq_len is missing"),
        ('path = "text"\n', "setting data.sources.a.path is missing"),
        ('name = "tiny"\n', 'or give model.name, for example "tiny"'),
    ],
)
def test_missing_settings(load, gone, message):
    assert gone in MINIMAL
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(text=MINIMAL.replace(gone, ""))


def test_unreadable_recipes(load, tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml does not exist\nshipped recipes: .*tiny"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"does not exist; did you mean llama-7b-tpu\?"):
        load_recipe("llama-7b-tpus")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(text="[train\nsteps=1")
    with pytest.raises(ConfigError, match="nested too deeply"):
        load(text="a = " + "[" * 50_000)
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_recipe(tmp_path / "pipe.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "binary.toml")


def test_errors_name_the_recipe_file(tmp_path):
    with pytest.raises(ConfigError, match=r"^somewhere: "):
        check_recipe({}, "somewhere")
    with pytest.raises(ConfigError, match=r"^model\.json: "):
        check_model({"vocab_size": 1}, "model.json")


# The list of settings ----------------------------------------------------------------------------


def test_settings_list_every_field():
    sections = {
        "model.": ModelConfig,
        "model.rope.": RopeConfig,
        "train.evaluate.": EvaluateConfig,
        "data.": DataConfig,
        "data.sources.NAME.": SourceConfig,
        "mesh.": MeshConfig,
        "optim.": OptimConfig,
        "train.": TrainConfig,
        "lora.": LoraConfig,
        "dpo.": DpoConfig,
        "checkpoint.": CheckpointConfig,
    }
    want = {"model.name"}
    for prefix, cls in sections.items():
        want |= {prefix + field.name for field in dataclasses.fields(cls)}
    listed = settings()
    names = [setting.name for setting in listed]
    assert len(names) == len(set(names))
    assert set(names) == want - {"model.rope", "data.sources", "train.evaluate"}
    top = {field.name for field in dataclasses.fields(Recipe)}
    assert {name.split(".")[0] for name in names} == top
    for setting in listed:
        assert setting.meaning, setting.name
        assert "\n" not in setting.meaning
        assert setting.type, setting.name
        assert setting.default, setting.name


def test_configs_do_not_change(load):
    recipe = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.train.steps = 3


# Sizes -------------------------------------------------------------------------------------------


def test_shapes_by_letter():
    cfg = MODELS["llama3-8b"]
    assert cfg.shape("LDNH") == (32, 4096, 32, 128)
    assert cfg.shape("QE") == (4096, 1024)
    assert cfg.shape("KGFV") == (8, 4, 14336, 128256)


def test_flops_per_token():
    """7B at 2,048 tokens: 6 FLOPs per matmul weight, and causal attention at half."""
    cfg = MODELS["llama-7b"]
    products = cfg.num_params - 32000 * 4096
    attention = 12 * 32 * 32 * 128 * 2048 / 2
    assert cfg.flops_per_token(2048) == 6 * products + attention
    tied = MODELS["stories15m"]
    assert tied.flops_per_token(1) == 6 * tied.num_params + 6 * 6 * 288


def test_a_former_name_of_a_setting_is_refused_with_the_new_one():
    from llama_jax.config.loading import RENAMED

    path = ROOT / "configs" / "tiny.toml"
    for old, new in RENAMED.items():
        with pytest.raises(ConfigError, match=f"unknown setting {old}: it is now called {new}"):
            load_recipe(path, [f"{old}=1"])


def test_the_saved_recipe_of_an_older_version_is_read(tmp_path):
    text = (ROOT / "configs" / "tiny.toml").read_text()
    text = text.replace("save_every = 100", "every = 7") + '\n[mesh]\npreset = "fsdp"\n'
    text = text.replace("[optim]", "[optim]\nclip = 0.5")
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"checkpoint\.save_every"):
        load_recipe(path)
    recipe = load_saved_recipe(path)
    assert (recipe.checkpoint.save_every, recipe.optim.max_grad_norm) == (7, 0.5)
