"""Plans of training: memory, machines, search, the command and its error messages."""

import dataclasses
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.chips import CHIPS, GIB, can_compile, wraps
from llama_jax.config import ConfigError, load_recipe
from llama_jax.plan import __main__ as plan
from llama_jax.plan import search
from llama_jax.plan.command import prepare_jax
from llama_jax.plan.compile import compile_step
from llama_jax.plan.machines import PlanError, devices, parse_machine
from llama_jax.plan.report import recomputed_flops, step_flops
from llama_jax.train import loop
from llama_jax.train.__main__ import main
from llama_jax.train.remat import peak_bytes
from llama_jax.train.step import flops_per_token

ROOT = Path(__file__).parents[2]
RECIPE = """
[model]
vocab_size = 512
dim = 256
num_layers = 3
num_heads = 2
num_kv_heads = 2
head_dim = 128
ffn_dim = 512
norm_eps = 1e-5
context = 256
tie_embeddings = false
rope = {{ theta = 10000.0 }}
[data]
seq_len = {seq_len}
val_fraction = 0.1
sources = {{ words = {{ path = "{folder}/text" }} }}
prepared = "{folder}/data"
[train]
steps = 1
batch_size = 16
remat = "full"
eval_batches = 1
[checkpoint]
dir = "{folder}/run"
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path, seq_len=128))
    return tmp_path / "recipe.toml"


# Predicted memory ---------------------------------------------------------------------------------


def test_planned_memory_is_that_of_the_run(recipe, monkeypatch):
    rng = random.Random(0)
    folder = recipe.parent / "text"
    folder.mkdir()
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "some", "animals", "in", "1984"]
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(240)))
    small = ["model.vocab_size=288", "mesh.data=2", "train.gradient_accumulation=2", "model.dim=32"]
    small += ["model.head_dim=16", "model.ffn_dim=64", "model.num_layers=2", "data.seq_len=32"]
    seen = []
    compile_ = loop.Trainer._compile
    keep = lambda self: seen.append(compile_(self)) or seen[-1]
    monkeypatch.setattr(loop.Trainer, "_compile", keep)
    assert main([str(recipe), *small]) == 0
    planned = compile_step(load_recipe(recipe, small), parse_machine("cpu:8"))
    assert planned.memory.peak == peak_bytes(seen[0].memory_analysis(), "cpu")
    state = planned.memory.weights + planned.memory.optimizer
    assert 0 < state < planned.memory.peak


# Machines -----------------------------------------------------------------------------------------


ENV = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
# Plans use no network: any connection fails.
CODE = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise RuntimeError(f"network access: {event} {args}")
sys.addaudithook(hook)
from llama_jax.plan import __main__ as plan
for name in sys.argv[2:]:
    code = plan.main([sys.argv[1], "--on", name, "--output", f"{name.replace(':', '-')}.json"])
    assert code == 0, code
"""


def plans(recipe, *names):
    command = [sys.executable, "-c", CODE, str(recipe), *names]
    env = ENV | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=recipe.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def check(recipe, process, names):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    own = load_recipe(recipe).model.flops_per_token(128) * 16 * 128
    for name in names:
        f = json.loads((recipe.parent / f"{name.replace(':', '-')}.json").read_text())
        assert f["fits"]
        devices = parse_machine(name).devices
        # remat "full" repeats the forward pass of the layers.
        assert 1.1 * own < f["step"]["flops"] * devices < 1.6 * own
        counted = f["step"]["model_flops"] + f["step"]["recomputed_flops"]
        if f["step"]["kernels_without_flops"]:  # Triton's, counted by their shapes
            assert f["step"]["flops"] == pytest.approx(counted, rel=0.01)
        assert f["memory"]["weights"] < f["memory"]["peak"] < 2**30
        assert {r["kind"] for r in f["step"]["collectives"]} >= {"all-gather"}
        assert sum(r["calls"] for r in f["step"]["collectives"]) > 10
        assert f["time"]["step"] == max(f["time"]["terms"].values()) > 0
        assert 0 < f["time"]["mfu"] < 1
        assert name.split(":")[0] not in ("h200", "a100") or f["run"]["mwh"] > 0
    return out, err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_every_tpu_family_and_two_plans_at_once(recipe):
    names = ["v5e:2x2", "v5p:2x2x1"], ["v6e:2x2", "tpu7x:2x2x1"]
    running = [plans(recipe, *pair) for pair in names]
    for process, pair in zip(running, names, strict=True):
        out, err = check(recipe, process, pair)
        assert out.count("FITS") == 2
        # The library's own messages are hidden.
        assert set(err.split("\n")) == {f"compiling {recipe} for {n} ..." for n in pair} | {""}
    cycles = json.loads((recipe.parent / "v5p-2x2x1.json").read_text())["step"]["compiler_cycles"]
    assert cycles > 0


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax's CUDA plugin"
)
def test_gpus_and_two_hosts(recipe):
    """The search tests below compile for the H100."""
    names = ["a100:8", "h200:16"]
    out, _ = check(recipe, plans(recipe, *names), names)
    step = json.loads((recipe.parent / "h200-16.json").read_text())["step"]
    # 3 layers; remat "full" runs the forward kernel again.
    attention = {"forward": 6, "d_q": 3, "d_kv": 3}
    assert step["kernels"] == {f"rotary_attention_{k}": n for k, n in attention.items()}
    assert "6 calls of kernel rotary_attention_forward" in out
    assert max(map(len, out.splitlines())) <= 120
    rows = step["collectives"]
    assert any(r["between_slices"] for r in rows)
    for r in rows:  # gathers over both hosts: half of the bytes cross, split among 8 devices
        assert (r["dcn_bytes"] > 0) == r["between_slices"]
        if r["kind"] == "all-gather" and r["devices"] == 16:
            assert r["dcn_bytes"] == pytest.approx(r["bytes"] / 2 / 8)
            assert r["dcn_bytes"] + r["interconnect_bytes"] == pytest.approx(r["bytes"] * 15 / 16)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_two_tpu_slices(recipe, tmp_path, capfd):
    """One replica of the model per slice: only gradients cross between slices."""
    out = tmp_path / "plan.json"
    args = ["--on", "2xv5e:4x4", "mesh.data=2", "train.batch_size=32", "--output", str(out)]
    assert plan.main([str(recipe), *args]) == 0
    assert "3.125 GB/s to other slices" in capfd.readouterr().out
    f = json.loads(out.read_text())
    assert f["mesh"] == dict(data=2, fsdp=16, tensor=1, context=1)
    assert f["chips"] == 32
    far = [r for r in f["step"]["collectives"] if r["between_slices"]]
    near = [r for r in f["step"]["collectives"] if not r["between_slices"]]
    assert {(r["kind"], r["devices"]) for r in far} == {("all-reduce", 2)}
    assert {r["devices"] for r in near} == {16}
    assert all(r["interconnect_bytes"] == 0 for r in far)
    assert all(r["dcn_bytes"] == 0 for r in near)
    # Each device reduces a sixteenth of every gradient (at most 4 bytes per value) across slices.
    moved, params = sum(r["dcn_bytes"] for r in far), f["parameters"]
    assert 2 * params / 16 < moved < 1.2 * 4 * params / 16
    assert f["time"]["terms"]["dcn"] == pytest.approx(moved / 3.125e9)
    assert plan.main([str(recipe), "--on", "2xv5e:4x4", "mesh.context=32", "mesh.fsdp=1"]) == 2
    assert "would cross slices" in capfd.readouterr().err


@pytest.mark.parametrize("missing", ["libtpu", "jax_cuda13_plugin"])
def test_a_missing_compiler_is_named(recipe, missing, capsys, monkeypatch):
    find = importlib.util.find_spec
    gone = lambda name, *a: None if name == missing else find(name, *a)
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    monkeypatch.setattr("llama_jax.plan.machines.gpu_topology", no_gpus)
    on = "v5p:2x2x1" if missing == "libtpu" else "h100:8"
    assert plan.main([str(recipe), "--on", on]) == 2
    extra = "llama_jax[tpu]" if missing == "libtpu" else "llama_jax[cuda]"
    assert extra in capsys.readouterr().err


def no_gpus(name, count):
    raise RuntimeError("to compile for a GPU, install jax's CUDA plugin")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "no chip 'v9'; known: v5e, v5p, v6e, tpu7x, a100, h100, h200, cpu"),
        ("v5p", "give the number of chips or their topology"),
        ("h100:8x8", "give the number of chips"),
        ("h100:0", "give the number of chips"),
        ("v5p:64", "topologies of v5p have 3 axes"),
        ("v5e:2x2x2", "topologies of v5e have 2 axes"),
        ("v6e:32x16", "the largest slice of v6e has 256 chips"),
        ("v5p:", "give the number of chips"),
        ("0xv5e:4x4", "no chip '0xv5e'"),
        ("2xh100:8", "only TPUs have slices; give all chips, as in h100:16"),
        ("2xv5e:32x32", "the largest slice of v5e has 256 chips"),
        ("cpu:99999", "the largest machine of cpu has 256 chips"),
        ("h100:99999", "the largest machine of h100 has 16,384 chips"),
        ("h100:" + "9" * 5000, "give the number of chips"),
        ("9999xv5p:8x8x8", "a plan has at most 16,384 chips"),
    ],
)
def test_invalid_machines(name, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        parse_machine(name)


def test_which_tpu_slices_have_wraparound_links():
    """Google's pages: slices of 4 x 4 x 4 cubes, and axes as long as a pod, 16."""
    grids = [(2, 2, 1), (2, 4, 4), (4, 4, 4), (8, 8, 16), (8, 16), (16, 16), (4, 4)]
    t, f = True, False
    assert [wraps(g)[: len(g)] for g in grids] == [
        (f, f, f), (f, f, f), (t, t, t), (t, t, t), (f, t), (t, t), (f, f)
    ]  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", [f"{k}:1" for k, c in CHIPS.items() if c.topologies])
def test_one_chip_alone(name):
    assert len(devices(parse_machine(name))) == CHIPS[name[:-2]].devices


def test_machines():
    assert parse_machine("v5p:8x8x8").devices == 512
    assert parse_machine("tpu7x:2x2x1").devices == 2 * parse_machine("tpu7x:2x2x1").chips == 8
    assert parse_machine("h100:64").chips == 64
    assert (parse_machine("h100:64").slices, parse_machine("h100:8").slices) == (8, 1)
    two = parse_machine("2xv5e:4x4")
    assert (two.name, two.chips, two.slices) == ("2xv5e:4x4", 32, 2)
    assert all(c.tflops > 0 for k, c in CHIPS.items() if k != "cpu")
    assert all(c.memory for k, c in CHIPS.items() if can_compile(k))


def test_a_mesh_that_does_not_match_says_both(recipe, capsys):
    assert plan.main([str(recipe), "--on", "cpu:8", "mesh.fsdp=3"]) == 2
    error = capsys.readouterr().err
    assert "mesh.fsdp=3" in error
    assert "8 devices" in error
    with pytest.raises(ConfigError, match="not a multiple of 8"):
        compile_step(load_recipe(recipe, ["train.batch_size=12"]), parse_machine("cpu:8"))


# The command --------------------------------------------------------------------------------------


def test_the_papers_table_and_a_budget_on_the_terminal(capsys, tmp_path):
    assert plan.main(["--paper"]) == 0
    assert "1,022,362" in capsys.readouterr().out
    picture = tmp_path / "b.png"
    args = ["--budget", "1e22", "--inference-tokens", "1e12", "--output", str(picture)]
    assert plan.main(args) == 0
    assert "less than the first size" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_plan_on_the_terminal(recipe, capsys, tmp_path):
    out = tmp_path / "plan.json"
    assert plan.main([str(recipe), "--on", "cpu:8", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    for word in ("weights", "optimizer", "activations", "temporary", "all-gather", "TFLOP"):
        assert word in said
    assert all(len(line) <= 120 for line in said.splitlines() if str(tmp_path) not in line)
    saved = json.loads(out.read_text())
    assert saved["step"]["tokens"] == 16 * 128
    parts = ("weights", "optimizer", "gradients", "activations", "temporary")
    total = sum(saved["memory"][k] for k in parts)
    assert total >= saved["memory"]["peak"]


@pytest.mark.parametrize(
    "args",
    [
        ["configs/tiny.toml", "--on", "cpu:8"],
        ["llama-7b", "--inference", "--on", "h100:1"],
        ["--budget", "1e22"],
    ],
)
def test_files_are_written_only_on_request(args, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    if args[0].startswith("configs"):
        args = [str(ROOT / args[0]), *args[1:], "train.steps=1", "model.num_layers=1"]
    assert plan.main(args) == 0
    assert list(tmp_path.iterdir()) == []
    assert "saved" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--out", "--sample", "--served-tokens"])
def test_former_flags_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        plan.main(["--budget", "1e22", flag, "1"])
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give RECIPE --on MACHINE"),
        (["llama-7b", "--on", "h100:8"], "llama-7b is a model"),
        (["llama-9b", "--inference", "--on", "h100:1"], "no model 'llama-9b'; known: llama-7b"),
        (["llama-7b", "--inference", "--on", "abacus:1"], "no chip 'abacus'; known: v5e"),
        (["llama-7b", "--inference", "--on", "h100:3"], "do not divide the model's 32 heads"),
        (["llama-7b", "--inference", "--on", "h100:1", "--context", "4096"], "own, 2048"),
        (["llama-7b", "--inference", "--on", "h100:1", "--batch", "0"], "positive whole number"),
        (["configs/tiny.toml", "--on", "h100:1", "--batch", "2"], "requires --inference"),
        (["--paper", "--budget", "1e22"], "one of them"),
        (["--budget", "-1"], "is not a positive number"),
        (["--budget", "much"], "is not a positive number"),
        (["--budget", "inf"], "is not a positive number"),
        (["--inference-tokens", "1e12", "--paper"], "requires --budget"),
        (["configs/tiny.toml"], "no machine given; add --on"),
        (["nothing.toml", "--on", "v5e:2x2"], "nothing.toml does not exist"),
        (["configs/tiny.toml", "--on", "v9:2"], "no chip 'v9'"),
        (["tiny", "--on", "v9:2"], "no chip 'v9'"),  # the recipe, not the model
        (["configs/tiny.toml", "--on", "cpu:8", "train.batch=3"], "train.batch"),
        (["configs/tiny.toml", "--on", "cpu:8", "--price", "0"], "is not a positive number"),
        (["configs/tiny.toml", "--on", "cpu:8", "train.attention=flash"], "no implementation 'fl"),
        (["configs/tiny.toml", "--on", "cpu:8", "train.attention=cudnn"], "runs on NVIDIA GPUs"),
        (["configs/tiny.toml", "--on", "cpu:1", "mesh.fsdp=3"], "these settings fit 1 device(s)"),
        (["configs/tiny.toml", "--on", "cpu:1", "--output", ""], "'' is not the name of a file"),
        (["configs/tiny.toml", "--on", "cpu:1", "--output", "a\0b"], "is not the name of a file"),
        (["configs/tiny.toml", "--on", "cpu:1", "--output", "tests"], "tests is a folder"),
        (["configs/tiny.toml", "--on", "cpu:1", "--output", "no/x.json"], "there is no folder no"),
        (["--budget", "1e22", "--output", "x.toml"], "the extension of a picture must be .png"),
        (["--budget", "1e-300"], "from 1e15 to 1e35"),
        (["--budget", "1e22", "--on", "h100:8"], "--on requires"),
        (["--paper", "--price", "3"], "--price requires a recipe"),
        (["--table", "--output", "x"], "--output requires"),
        (["llama-7b", "--inference", "--on", "h100:1", "--power", "3"], "--power requires"),
        (["llama-7b", "--inference", "--on", "h100:1", "--batch", "9" * 400], "is too large"),
    ],
)
def test_wrong_arguments_say_what_to_do(args, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        code = plan.main(args)
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax's CUDA plugin"
)
def test_a_search_finds_the_fastest_recipe_that_fits(recipe, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(search, "MAX_COMPILED", 2)
    monkeypatch.chdir(tmp_path)
    plans = []
    train = plan.plan_training
    monkeypatch.setattr(plan, "plan_training", lambda *a: plans.append(train(*a)) or plans[-1])
    out = tmp_path / "best.toml"
    assert plan.main([str(recipe), "--on", "h100:2", "--search", "--output", str(out)]) == 0
    made, found = load_recipe(out), plans[0][0]
    output = capfd.readouterr()
    settings = re.search(r"found by the search: (.*)", output.out)
    assert settings is not None
    assert load_recipe(recipe, settings[1].split()) == made  # the settings reproduce the recipe
    assert set(tmp_path.iterdir()) == {recipe, out}
    assert found["gradient_accumulation"] == made.train.gradient_accumulation
    assert tuple(found["remat"]) == made.train.remat
    assert made.train.batch_size == 16
    assert found["run"]["mwh"] > 0
    tried = [float(s) for s in re.findall(r": ([\d.e-]+) s per step", output.err)]
    assert len(tried) == 2
    assert found["time"]["step"] == pytest.approx(min(tried), rel=0.01)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax's CUDA plugin"
)
def test_a_search_where_nothing_fits_says_by_how_much(recipe, capsys, monkeypatch, tmp_path):
    every = search.candidates
    monkeypatch.setattr(search, "candidates", lambda *a: every(*a)[:1])
    monkeypatch.chdir(tmp_path)
    small = dataclasses.replace(CHIPS["h100"], memory=1e-4)
    monkeypatch.setitem(CHIPS, "h100", small)
    assert plan.main([str(recipe), "--on", "h100:2", "--search"]) == 1
    said = capsys.readouterr().out
    assert "nothing fits on h100:2" in said
    assert "DOES NOT FIT" in said
    assert "more than the 0.00 available" in said


def test_search_candidates_divide_mesh_and_batch():
    recipe = load_recipe(ROOT / "configs/llama-33b-gpu.toml")
    found = search.candidates(recipe, parse_machine("h100:64"))
    assert {c.recipe.mesh.tensor for c in found} == {1, 2, 4}  # 52 heads
    for c in found:
        rows = recipe.train.batch_size // c.recipe.train.gradient_accumulation
        assert rows % c.recipe.mesh.fsdp == 0
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)


def test_remat_costs_time_and_saves_memory():
    recipe = load_recipe(ROOT / "configs/llama-33b-gpu.toml")
    by_way: dict = {}
    for c in search.candidates(recipe, parse_machine("h100:64")):
        by_way.setdefault(c.way, []).append(c)
    for found in by_way.values():
        found.sort(key=lambda c: len(c.recipe.train.remat))
        assert [len(c.recipe.train.remat) for c in found] == list(range(8))
        memory = [c.memory for c in found]
        assert memory == sorted(memory)
        assert memory[0] < memory[-1]
    # Where compute dominates, the repeated forward pass costs time.
    assert any(found[0].seconds > 1.1 * found[-1].seconds for found in by_way.values())


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_kept_and_offloaded_activations_on_a_tpu(recipe):
    """Without attention's output, its forward kernel runs twice per layer (3 layers). The second
    plan chooses among the activations that are left, within 94 % of the memory."""
    prepare_jax(1)
    machine = parse_machine("v5e:1")
    settings = ['train.remat=["attention"]', 'train.offload=["gate","up"]']
    kept = compile_step(load_recipe(recipe, settings), machine)
    assert kept.cost is not None
    assert kept.cost.kernels == {"rotary_attention_forward": 3, "rotary_attention_backward": 3}
    assert "S(5)" in kept.program.as_text()  # arrays in the host's memory
    memory = 0.999 * kept.memory.peak / 0.94
    chip = dataclasses.replace(machine.chip, memory=memory / 2**30)
    small = dataclasses.replace(machine, chip=chip)
    auto = compile_step(load_recipe(recipe, ["train.remat=auto"]), small)
    assert auto.memory.peak <= 0.94 * memory
    assert set(auto.recipe.train.remat) < {"gate", "up", "q", "k", "v", "o", "attention"}
    assert "S(5)" not in auto.program.as_text()
    forward = 3 if "attention" in auto.recipe.train.remat else 6
    assert auto.cost is not None
    assert auto.cost.kernels["rotary_attention_forward"] == forward
    counted = flops_per_token(auto.recipe) + recomputed_flops(auto.recipe)
    assert auto.cost.flops == pytest.approx(counted * 16 * 128, rel=0.02)


# LoRA ---------------------------------------------------------------------------------------------


LORA = """
[lora]
rank = 4
base = "int4"
"""


def test_plan_of_adapters(recipe, capsys):
    """Gradients and optimizer state of the adapters alone; the base in its number format."""
    recipe.write_text(recipe.read_text() + LORA)
    arguments = [
        str(recipe),
        "--on",
        "cpu:1",
        "train.init_from=x",
        "train.batch_size=2",
        "--output",
    ]
    assert plan.main([*arguments, str(recipe.parent / "plan.json")]) == 0
    f = json.loads((recipe.parent / "plan.json").read_text())
    adapters = 4 * 3 * (4 * (256 + 256) + 3 * (256 + 512))
    assert f["adapter_parameters"] == adapters
    memory = f["memory"]
    matrices, others = 3 * (4 * 256 * 256 + 3 * 256 * 512), 2 * 512 * 256 + 7 * 256
    scales = matrices / 64
    base = matrices / 2 + 4 * scales + 4 * others
    assert memory["weights"] == base + 4 * adapters
    assert memory["gradients"] == 4 * adapters
    assert memory["optimizer"] == pytest.approx(8 * adapters, abs=16)
    own = load_recipe(recipe, ["train.init_from=x"]).model.flops_per_token(128)
    per_token = f["step"]["model_flops"] / 256
    lookup = 512 * 256
    assert per_token == own - 2 * (matrices + others - lookup) + 6 * adapters
    out = capsys.readouterr().out
    assert "2.23M parameters and 0.0522M of adapters" in out
    assert "those that are not trained in int4, the adapters in float32" in out


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax's CUDA plugin"
)
def test_no_copy_of_a_quantized_base(recipe):
    """Outside of the base and the state, a step needs the memory of a few matrices: no second copy
    of the base, and no gradient of a matrix."""
    changes = [
        "model.dim=1024", "model.ffn_dim=2816", "model.num_layers=32", "model.num_heads=8",
        "model.num_kv_heads=8", "train.batch_size=1", "train.loss_chunk=128", "mesh.fsdp=1",
        "lora.base=int4", "lora.rank=16", "train.init_from=x",
    ]  # fmt: skip
    compiled = compile_step(load_recipe(recipe, changes), parse_machine("h100:1"))
    memory = compiled.memory
    assert memory.weights > 200e6
    assert memory.activations + memory.temporary < 60e6
    assert compiled.cost.kernels["quantized_matmul"] == 2 * 7 * 32 - 32
    counted = flops_per_token(compiled.recipe) + recomputed_flops(compiled.recipe)
    assert step_flops(compiled) == pytest.approx(128 * counted, rel=0.1)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax's CUDA plugin"
)
def test_all_weights_of_7b_are_tuned_on_one_gpu_of_80_gb():
    """The recipe alpaca-7b-80gb as it is; the compilation takes 17 s."""
    compiled = compile_step(load_recipe("alpaca-7b-80gb"), parse_machine("h100:1"))
    matrices = 6.738e9 * 2  # bytes, in bfloat16
    assert compiled.fits
    assert compiled.memory.peak < 70 * GIB
    assert compiled.memory.weights == pytest.approx(matrices, rel=0.01)
    assert compiled.memory.optimizer == pytest.approx(2 * matrices, rel=0.01)
