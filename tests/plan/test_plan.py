"""Plans: counts of FLOPs and bytes, memory, machines, costs, and error messages."""

import dataclasses
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.chips import CHIPS, can_compile, wraps
from llama_jax.config import MODELS, ConfigError, load_recipe
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.params import abstract_params
from llama_jax.model.quantize import weight_bytes
from llama_jax.plan import __main__ as plan
from llama_jax.plan import energy, hlo, inference, scaling_laws, search
from llama_jax.plan.compile import compile_step, peak_bytes
from llama_jax.plan.hlo_text import first_group
from llama_jax.plan.machines import PlanError, devices, parse_machine
from llama_jax.train import loop
from llama_jax.train.__main__ import main

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


# Counts from HLO ---------------------------------------------------------------------------------


def compiled_text(function, *shapes):
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return jax.jit(function).lower(*args).compile().as_text()


def test_flops_count_once_per_loop_iteration():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    def outer(x, w):
        return jax.lax.scan(lambda x, _: (inner(x, w) + 1, None), x, length=5)[0]

    cost = hlo.count(compiled_text(outer, (16, 32), (32, 32)))
    assert cost.flops == 5 * 7 * 2 * 16 * 32 * 32


UNROLLED = """
%cond (p: (s32[], f32[4,4])) -> pred[] {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%next, %y)
}
ENTRY %main (a: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %a = (s32[], f32[4,4]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[4,4]{1,0}) while(%a), condition=%cond, body=%body
}
"""


def test_a_loop_unrolled_by_two():
    """From 0 to 10 in steps of 2: five iterations."""
    assert hlo.count(UNROLLED).flops == 5 * 2 * 4 * 4 * 4


def test_flops_of_every_form_of_matmul():
    forms = [
        (lambda a, b: jnp.einsum("bmk,bkn->bmn", a, b), (5, 7, 11), (5, 11, 13), 5 * 7 * 11 * 13),
        (lambda a, b: jnp.einsum("mk,nk->nm", a, b), (7, 11), (13, 11), 7 * 11 * 13),
        (lambda a, b: jnp.einsum("mjk,jkn->mn", a, b), (7, 3, 11), (3, 11, 13), 7 * 33 * 13),
        (lambda a, b: jnp.einsum("abmk,abnk->abmn", a, b), (2, 3, 7, 5), (2, 3, 9, 5), 6 * 315),
    ]
    for function, left, right, products in forms:
        assert hlo.count(compiled_text(function, left, right)).flops == 2 * products


def test_a_matmul_that_the_tpu_compiler_writes_as_a_convolution():
    line = (
        "ENTRY %main (a: f32[4,8,16]) -> f32[4,8,32] {\n"
        "  %a = f32[4,8,16]{2,1,0:T(8,128)} parameter(0)\n"
        "  %b = f32[4,16,32]{2,1,0:T(8,128)} parameter(1)\n"
        "  ROOT %c = f32[4,8,32]{2,1,0:T(8,128)} convolution(%a, %b), window={size=4 stride=3 "
        'pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf, backend_config={"estimated_cycles":"77"}\n'
        "}\n"
    )
    cost = hlo.count(line)
    assert (cost.flops, cost.cycles, cost.matmul_cycles) == (2 * 4 * 8 * 16 * 32, 77, 77)


def test_collectives_count_the_bytes_of_whole_arrays():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))

        run = jax.shard_map(
            lambda x: jax.lax.scan(
                lambda x, _: (
                    x + jnp.sum(jax.lax.all_gather(x, "b", axis=1, tiled=True))
                    + jax.lax.psum(x, "a"),
                    None,
                ),
                x, length=3,
            )[0],
            out_specs=P("a", "b"), check_vma=False,
        )  # fmt: skip
        cost = hlo.count(jax.jit(run).lower(x).compile().as_text())
    found = {(c.kind, c.group): size for c, size in cost.collectives.items()}
    # Three iterations: each device has 4 x 16 of 8 x 64 values, a row of the mesh 4 x 64.
    assert found == {
        ("all-gather", (0, 1, 2, 3)): 3 * 4 * 64 * 4,
        ("all-reduce", (0, 4)): 3 * 4 * 16 * 4,
    }


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", tuple(range(8))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}", (0, 1)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", (0, 2)),
        ("source_target_pairs={{3,1},{1,3}}", (3, 1)),
        ("replica_groups={}", ()),
    ],
)
def test_device_groups_in_every_notation(text, group):
    assert first_group(f"%x = f32[8] all-reduce(%y), {text}, to_apply=%add") == group


# Predicted memory --------------------------------------------------------------------------------


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


# Machines ----------------------------------------------------------------------------------------

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
    assert "across slices" in capfd.readouterr().err


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
        ("9999xv5p:8x8x8", "plans are for 16,384 chips at most"),
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


# Arithmetic --------------------------------------------------------------------------------------

TABLE_15 = {  # GPU-hours, MWh, tCO2eq as printed
    "OPT-175B": (809_472, 356, 137),
    "BLOOM-175B": (1_082_880, 475, 183),
    "LLaMA-7B": (82_432, 36, 14),
    "LLaMA-13B": (135_168, 59, 23),
    "LLaMA-33B": (530_432, 233, 90),
    "LLaMA-65B": (1_022_362, 449, 173),
}


def test_table_15_of_the_paper():
    """Within the paper's rounding: it truncates MWh (and prints 475 for BLOOM's 476.5)."""
    rows = {r["model"]: r for r in energy.paper_table()}
    assert rows.keys() == TABLE_15.keys()
    for name, (hours, mwh, carbon) in TABLE_15.items():
        assert rows[name]["gpu_hours"] == hours
        assert mwh <= rows[name]["mwh"] < mwh + (2 if name == "BLOOM-175B" else 1)
        assert abs(rows[name]["tco2eq"] - carbon) <= 0.5


def test_65b_at_the_papers_speed():
    assert energy.chip_hours(1.4e12, 380, 2048) == pytest.approx(1_022_362, rel=0.002)


@pytest.mark.parametrize("flop", [1e19, 1e22, 5.76e23])
def test_the_optimum_is_a_minimum(flop):
    N, D = scaling_laws.LAW.optimum(flop)
    assert pytest.approx(flop) == 6 * N * D
    least = scaling_laws.LAW.loss(N, D)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert scaling_laws.LAW.loss(N * factor, flop / 6 / N / factor) > least


def test_inference_tokens_make_the_best_model_smaller():
    optimal, same = scaling_laws.choices(1e22, 0)
    assert pytest.approx(optimal.N, rel=1e-3) == same.N
    sizes = [scaling_laws.choices(1e22, n)[1] for n in (1e10, 1e12, 1e14)]
    assert optimal.N > sizes[0].N > sizes[1].N > sizes[2].N
    for choice, n in zip(sizes, (1e10, 1e12, 1e14), strict=True):
        assert scaling_laws.LAW.loss(choice.N, choice.D) == pytest.approx(optimal.loss)
        assert choice.training + choice.inference <= optimal.training + 2 * optimal.N * n
    assert scaling_laws.LAW.tokens(1e6, optimal.loss) == math.inf


def test_minimum_cost_counts_two_flops_per_inference_token():
    optimal, cheap = scaling_laws.choices(1e22, 1e12)
    cost = lambda n: 6 * n * scaling_laws.LAW.tokens(n, optimal.loss) + 2 * n * 1e12
    assert cost(cheap.N) == pytest.approx(cheap.training + cheap.inference)
    assert cost(cheap.N * 0.97) > cost(cheap.N) < cost(cheap.N * 1.03)


def test_the_optimum_for_chinchillas_budget_is_near_chinchilla():
    """The paper's result: 70B parameters, 1.4T tokens, 20 tokens per parameter."""
    N, D = scaling_laws.LAW.optimum(6 * 70e9 * 1.4e12)
    assert 0.8 < N / 70e9 < 1.25
    assert 15 < D / N < 26


# Inference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", inference.DTYPES)
@pytest.mark.parametrize("name", ["llama-7b", "llama3.1-70b", "stories260k"])
def test_weight_bytes_are_those_of_quantized_weights(name, kind):
    cfg = MODELS[name]
    abstract = abstract_params(cfg, ComputeConfig(jnp.bfloat16))
    assert inference.weight_bytes(cfg, kind) == weight_bytes(abstract, kind)


def test_the_largest_batch_and_context_just_fit():
    cfg, on = MODELS["llama-13b"], parse_machine("h100:2")
    for batch in (1, 40):
        f = inference.plan(cfg, on, "int8", 2048, batch)
        most = f["largest_batch"]
        assert inference.plan(cfg, on, "int8", 2048, most - 1)["fits"]
        assert not inference.plan(cfg, on, "int8", 2048, most + 1)["fits"]
    assert inference.plan(cfg, on, "int8", f["largest_context"], 40)["fits"]
    # Short sequences: the activations are as large as several of their caches.
    f = inference.plan(cfg, on, "int8", 16, 40)
    left = f["available"] - f["weights"] - f["activations"]
    assert f["largest_batch"] == int(left // (f["cache"] / 40))
    # One sequence: bound by reading weights and cache once, on two devices.
    one = inference.plan(cfg, on, "bfloat16", 2048, 1)
    moved = 2 * 13_015_864_320 + 2 * 2 * 40 * 40 * 128 * 2048
    assert one["tokens_per_second"] == pytest.approx(2 * 3352.32e9 / moved)
    assert one["bound_by"] == "memory"


def test_65b_inference_on_common_gpus(capsys):
    assert plan.main(["llama-65b", "--inference", "--on", "rtx4090:1", "--dtype", "int4"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert plan.main(["llama-65b", "--inference", "--on", "h100:1", "--dtype", "int8"]) == 0
    assert "FITS" in capsys.readouterr().out
    assert plan.main(["--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("llama-65b") for line in lines)
    assert max(map(len, lines)) <= 120


# The command -------------------------------------------------------------------------------------


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
        (["configs/tiny.toml", "--on", "h100:1", "--batch", "2"], "goes with --inference"),
        (["--paper", "--budget", "1e22"], "one of them"),
        (["--budget", "-1"], "is not a positive number"),
        (["--budget", "much"], "is not a positive number"),
        (["--budget", "inf"], "is not a positive number"),
        (["--inference-tokens", "1e12", "--paper"], "goes with --budget"),
        (["configs/tiny.toml"], "on which machine?"),
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
        (["--budget", "1e22", "--output", "x.toml"], "a picture is one of .png"),
        (["--budget", "1e-300"], "from 1e15 to 1e35"),
        (["--budget", "1e22", "--on", "h100:8"], "--on goes with"),
        (["--paper", "--price", "3"], "--price goes with a recipe"),
        (["--table", "--output", "x"], "--output goes with"),
        (["llama-7b", "--inference", "--on", "h100:1", "--power", "3"], "--power goes with"),
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
def test_a_search_writes_the_fastest_recipe_that_fits(recipe, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(search, "MAX_COMPILED", 2)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "plan.json"
    assert plan.main([str(recipe), "--on", "h100:2", "--search", "--output", str(out)]) == 0
    made = load_recipe(tmp_path / "recipe-h100-2.toml")
    found = json.loads(out.read_text())
    assert (found["gradient_accumulation"], found["remat"]) == (
        made.train.gradient_accumulation,
        made.train.remat,
    )
    assert made.train.batch_size == 16
    assert found["run"]["mwh"] > 0
    tried = [float(s) for s in re.findall(r": ([\d.e-]+) s per step", capfd.readouterr().err)]
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
        way = (c.recipe.mesh.tensor, c.recipe.train.gradient_accumulation)
        by_way.setdefault(way, {})[c.recipe.train.remat] = c
    for found in by_way.values():
        assert found["none"].memory > found["matmuls"].memory > found["full"].memory
    # Where compute dominates, the repeated forward pass costs time.
    assert any(f["full"].seconds > 1.1 * f["none"].seconds for f in by_way.values())
