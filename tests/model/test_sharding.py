"""Every preset on eight simulated devices: the numbers of one device, the expected traffic."""

import ast
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import model_tools as tools
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import chips
from llama_jax.chips import peak_tflops
from llama_jax.config import ConfigError, MeshConfig, check_recipe, load_recipe
from llama_jax.data.batch import Batch, ShardBatch, abstract_batch, host_rows, local_slice
from llama_jax.model.llama import ComputeConfig, Llama
from llama_jax.model.sharding import (
    AXES,
    PRESETS,
    changed_settings,
    check_fits,
    make_mesh,
    mesh_for,
)  # fmt: skip
from llama_jax.plan.hlo_text import first_group
from llama_jax.plan.machines import devices as planned_devices
from llama_jax.plan.machines import parse_machine
from llama_jax.train.step import check_attention

ROOT = Path(__file__).parents[2]
CFG = tools.small(vocab_size=64, dim=32, num_heads=8, num_kv_heads=4, head_dim=4, ffn_dim=64)
TIED = dataclasses.replace(CFG, tie_embeddings=True)
B, T = 8, 16

MESHES = {
    "fsdp": [dict(), dict(data=8, fsdp=1), dict(data=2), dict(context=2), dict(data=2, context=4)],
    "fsdp_tensor": [dict(tensor=2), dict(tensor=4, data=2, fsdp=1), dict(tensor=2, context=2)],
    "tensor_sequence": [dict(tensor=4), dict(tensor=2, data=2), dict(tensor=2, context=2)],
}
CASES = [(preset, mesh) for preset, meshes in MESHES.items() for mesh in meshes]
REMATS = ["full", "matmuls", "none"]
CONTEXT = [("fsdp", "none"), ("fsdp_tensor", "full"), ("tensor_sequence", "none")]


def _name(case):
    preset, mesh = case
    return f"{preset}-{','.join(f'{k}{n}' for k, n in mesh.items())}"


def _batch(cfg):
    """Tokens, one-hot targets, and two documents per row with different boundaries."""
    cut = np.arange(B)[:, None] + 3
    at = np.arange(T)[None]
    segments = (at >= cut).astype(np.int32)
    positions = np.where(segments == 1, at - cut, at).astype(np.int32)
    targets = np.eye(cfg.vocab_size, dtype=np.float32)[tools.random_tokens(cfg, B, T, seed=1)]
    return tools.random_tokens(cfg, B, T), targets, segments, positions


def _loss(cfg, compute):
    build = tools.model_of(cfg, compute)

    def loss(params, tokens, targets, segments, positions):
        logits = build(params)(tokens, segment_ids_BT=segments, positions_BT=positions)
        total = jax.nn.logsumexp(logits, axis=-1)
        return jnp.mean(total - jnp.sum(logits * targets, axis=-1))

    return loss


def _specs(cfg, compute, mesh):
    """Sharding of each weight."""
    shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(Llama(cfg, compute, nnx.Rngs(0)))))
    return jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), shapes)


@functools.cache
def _one_device(cfg):
    step = jax.jit(jax.value_and_grad(_loss(cfg, tools.F32)))
    loss, grads = step(tools.tree_of(tools.random_weights(cfg)), *_batch(cfg))
    return float(loss), {k: np.asarray(v) for k, v in tools.flat_of(grads).items()}


@pytest.mark.parametrize(
    ("case", "remat", "unroll", "cfg"),
    [
        # Every mesh; remat, unroll and tied embeddings alternate.
        (case, REMATS[i % 3], i % 4 == 1, TIED if i % 2 else CFG)
        for i, case in enumerate(CASES)
    ]
    # Every remat of each preset is above; one more of each where the sequence is split.
    + [((p, MESHES[p][-1]), remat, False, CFG) for p, remat in CONTEXT],
    ids=lambda x: _name(x) if isinstance(x, tuple) else "",
)
def test_equals_one_device(case, remat, unroll, cfg, capfd):
    preset, sizes = case
    compute = ComputeConfig(jnp.dtype("float32"), PRESETS[preset], remat=remat, unroll=unroll)
    if remat != "full":  # the other way to sum gradients
        compute = dataclasses.replace(compute, reduce_float32=True)
    mesh = make_mesh(MeshConfig(preset=preset, **sizes))
    want, want_grads = _one_device(cfg)
    with jax.set_mesh(mesh):
        specs = _specs(cfg, compute, mesh)
        params = jax.device_put(tools.tree_of(tools.random_weights(cfg)), specs)
        batch = [jax.device_put(x, P(("data", "fsdp"))) for x in _batch(cfg)]
        loss, grads = jax.jit(jax.value_and_grad(_loss(cfg, compute)))(params, *batch)
    # The partitioner never falls back to copying a whole array to every device.
    assert "full rematerialization" not in capfd.readouterr().err
    assert float(loss) == pytest.approx(want, rel=1e-5)
    placed = tools.flat_of(specs)
    for name, grad in tools.flat_of(grads).items():
        assert tools.relative_l2(grad, want_grads[name]) < 1e-5, name
        assert grad.sharding.is_equivalent_to(placed[name], grad.ndim), name


# Communication between devices -------------------------------------------------------------------

# With these widths a weight is larger than the activations or norms of a layer.
WIDE = tools.small(
    vocab_size=128, dim=128, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=16, ffn_dim=256
)
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|"
    r"ragged-all-to-all|collective-broadcast)(?:-start)?\("
)
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s64": 8}


def traffic(text: str) -> Counter:
    """Bytes of the whole arrays of each kind of collective, from a compiled program's text.

    On TPU a reduce-scatter is a fusion, `all-reduce-scatter`, with an all-reduce inside. A loop's
    body counts once, a group of one device not at all.
    """
    total: Counter = Counter()
    computation = ""
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
            computation = start[1]
        if found := COLLECTIVE.search(line):
            kind = found[2]
            members = len(first_group(line))
            if members == 1:
                continue
            whole = members if kind == "reduce-scatter" else 1
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", found[1]):
                size = SIZES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
                total[kind] += whole * size
    return total


@functools.cache
def _compiled(preset, sizes, devices=None, dtype="float32", cfg=WIDE, reduce_float32=False):
    kind = jnp.dtype(dtype)
    compute = ComputeConfig(kind, PRESETS[preset], remat="full", reduce_float32=reduce_float32)
    mesh = make_mesh(MeshConfig(preset=preset, **dict(sizes)), devices)
    with jax.set_mesh(mesh):
        specs = _specs(cfg, compute, mesh)
        weights = tools.tree_of(tools.random_weights(cfg))
        place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        params = jax.tree.map(place, weights, specs)
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=rows)

        def loss(params, tokens):
            return jnp.sum(jnp.tanh(tools.model_of(cfg, compute)(params)(tokens)))

        return jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile().as_text()


def _weight_bytes(cfg, size):
    """(matrices of a layer, embedding or output matrix, all norms) in bytes."""
    word = lambda *words: size * sum(math.prod(cfg.shape(w)) for w in words)
    layer = word("DQ", "DE", "DE", "QD", "DF", "DF", "FD")
    return layer, word("VD"), 4 * (2 * cfg.num_layers + 1) * cfg.dim


def test_fsdp_traffic():
    """Weights gathered for each pass, gradients summed once, and nothing else.

    XLA for CPU has no reduce-scatter of a sum and a slice: there the sum is an all-reduce.
    """
    moved = traffic(_compiled("fsdp", ()))
    layer, embed, norms = _weight_bytes(WIDE, 4)
    # A layer's weights forward and again backward; the embedding and the output matrix once.
    assert moved.pop("all-gather") == 2 * layer + 2 * embed
    # The embedding's gradient is scattered by name, every other is summed.
    assert moved.pop("reduce-scatter") == embed
    assert layer + embed <= moved.pop("all-reduce") <= layer + embed + norms + 64
    assert not moved


def test_data_parallel_traffic():
    """Copies of the model: no gather, one sum of the gradients."""
    moved = traffic(_compiled("fsdp", (("data", 8), ("fsdp", 1))))
    layer, embed, norms = _weight_bytes(WIDE, 4)
    assert layer + 2 * embed <= moved.pop("all-reduce") <= layer + 2 * embed + norms + 64
    assert not moved


def test_partitioner_does_warn(capfd):
    """The warning that the tests above look for exists: here an array is resharded from rows to
    columns in a way that the partitioner does not support."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    pin = lambda x, *spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))
    f = lambda x: pin(jnp.sin(pin(x, ("a", "b"), None, None)), None, "b", "a")
    jax.jit(f).lower(jax.ShapeDtypeStruct((8, 8, 8), jnp.float32)).compile()
    assert "full rematerialization" in capfd.readouterr().err


TPU = """
import sys, jax
from jax.experimental import topologies
import test_sharding as t
devices = tuple(topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x2").devices)
cfg = t.tools.small(vocab_size=1024, dim=1024, num_layers=3, num_heads=8, num_kv_heads=8,
                    head_dim=128, ffn_dim=2048)
for sizes in [(), (("data", 2),)]:
    program = t._compiled("fsdp", sizes, devices, "bfloat16", cfg)
    assert "rotary_attention_forward" in program
    assert "rotary_attention_backward" in program
    print(dict(t.traffic(program)))
print(dict(t.traffic(t._compiled("fsdp", (), devices, "bfloat16", cfg, reduce_float32=True))))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_tpu_gradients_are_reduce_scattered():
    """Compiled for eight TPU v5e with the rotary attention kernel.

    Gradients of layers are reduce-scattered; only shards are summed over `data`.
    """
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/model'}",
    }
    command = [sys.executable, "-c", TPU]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    fsdp, data_fsdp, float32 = map(ast.literal_eval, run.stdout.splitlines()[-3:])
    layer = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2048)
    embed, norms = 2 * 1024 * 1024, 4 * 7 * 1024
    assert layer <= fsdp["reduce-scatter"] <= 1.1 * (layer + 2 * embed)
    # The embedding's own, one matrix, is a sum and a slice there.
    assert fsdp.get("all-reduce", 0) <= embed + 2 * norms
    # Four shards: a quarter of each gradient is summed over the two copies.
    assert layer <= data_fsdp["reduce-scatter"] <= 1.1 * (layer + 2 * embed)
    assert data_fsdp["all-reduce"] <= (layer + 2 * embed) / 4 + embed + 2 * norms
    # train.reduce_dtype="float32": these sums, and nothing else, have twice the bytes.
    assert 2 * layer <= float32["reduce-scatter"] <= 2.2 * (layer + 2 * embed)
    assert float32["all-gather"] == fsdp["all-gather"]
    assert float32.get("all-reduce", 0) <= 2 * embed + 2 * norms


def test_presets():
    """Each kind of array and its mesh axes."""
    rows, both = ("data", "fsdp"), ("context", "tensor")
    table = {
        "fsdp": ("context", "context", None),
        "fsdp_tensor": ("context", "context", "tensor"),
        "tensor_sequence": (both, "context", "tensor"),
    }
    assert table.keys() == PRESETS.keys()
    for preset, (stream, positions, wide) in table.items():
        rules = PRESETS[preset]
        assert rules.activation("BTD") == P(rows, stream, None)
        assert rules.activation("BTNH") == P(rows, positions, wide, None)
        assert rules.activation("BTF") == rules.activation("BTV") == P(rows, positions, wide)
        assert rules.activation_without_tensor("BTD") == P(rows, "context", None)
        for word in ("DQ", "DE", "DF", "DV"):
            assert rules.weight(word) == P("fsdp", wide)
        for word in ("QD", "FD", "VD"):
            assert rules.weight(word) == P(wide, "fsdp")
        assert rules.weight("D") == rules.weight("LD") == P()


# Invalid meshes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=3, fsdp=2), "does not fit 8 devices: the product must be 8"),
        (dict(data=3), "does not fit 8 devices"),
        (dict(data=16), "does not fit 8 devices"),
        (dict(data=0), "sizes must be positive"),
        (dict(tensor=-2), "sizes must be positive"),
        (dict(data=-1), "one may be -1"),
        (dict(tensor=2), 'no effect with mesh.preset="fsdp"'),
    ],
)
def test_mesh_errors(sizes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_mesh(MeshConfig(**sizes))


def test_minus_one_is_all_remaining_devices():
    mesh = make_mesh(MeshConfig(preset="fsdp_tensor", tensor=2))
    assert dict(mesh.shape) == dict(data=1, fsdp=4, tensor=2, context=1)
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == dict.fromkeys(AXES, 1)


class Proxy:
    """The attributes of an absent device that a mesh reads."""

    def __init__(self, number, host, slice_index, platform="gpu", kind="NVIDIA H100 80GB HBM3"):
        self.id, self.process_index, self.slice_index = number, host, slice_index
        self.platform, self.device_kind = platform, kind
        self.client = self


@pytest.mark.parametrize(
    ("sizes", "slices"),
    [
        # (preset, sizes) and how many slices lie along data and fsdp: data first, then fsdp.
        (dict(data=2), (2, 1)),
        (dict(), (1, 2)),
        (dict(data=8, fsdp=2), (2, 1)),
        (dict(preset="fsdp_tensor", tensor=8), (1, 2)),
        (dict(preset="tensor_sequence", data=2, tensor=4, context=2, fsdp=1), (2, 1)),
    ],
)
@pytest.mark.parametrize("host_is_slice", [False, True])
def test_several_gpu_hosts(sizes, slices, host_is_slice):
    """16 H100 in two hosts, each a slice, by `slice_index` or by host."""
    devices = [Proxy(i, i // 8, 0 if host_is_slice else i // 8) for i in range(16)]
    mesh = make_mesh(MeshConfig(**sizes), devices, host_is_slice)
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,) * len(AXES)
    assert sorted(d.id for d in mesh.devices.flat) == list(range(16))
    ids = np.vectorize(lambda d: d.process_index)(mesh.devices)
    for axis, along in zip((0, 1), slices, strict=True):
        assert len(np.unique(np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)[:, 0])) == along
    # tensor and context stay in one slice.
    assert (ids.min(axis=(2, 3)) == ids.max(axis=(2, 3))).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(preset="fsdp_tensor", tensor=16), "mesh.tensor=16 x mesh.context=1 would cross"),
        (dict(context=16, fsdp=1), "there are 2 slices of 8 devices"),
    ],
)
def test_tensor_and_context_across_slices(sizes, message):
    devices = [Proxy(i, i // 8, i // 8) for i in range(16)]
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_mesh(MeshConfig(**sizes), devices)
    uneven = [Proxy(i, i // 12, i // 12) for i in range(16)]
    with pytest.raises(ConfigError, match="different numbers of devices"):
        make_mesh(MeshConfig(), uneven)


# Rows of a host ----------------------------------------------------------------------------------


def check_rows(mesh, rows):
    """A host reads exactly the rows of its devices, and hands each device the right ones; of many
    hosts 16 are checked."""
    spec = PRESETS["fsdp"].activation_without_tensor("BT")
    hosts = sorted({d.process_index for d in mesh.devices.flat})
    held = {p: host_rows(mesh, spec, rows, p) for p in hosts[:: max(1, len(hosts) // 16)]}
    used = {p: set() for p in held}
    places = NamedSharding(mesh, P(spec[0])).devices_indices_map((rows,))
    for device, (index,) in places.items():
        if device.process_index in held:
            mine = held[device.process_index]
            got = mine[local_slice(mine, index, rows)].tolist()
            assert got == list(range(rows))[index]
            used[device.process_index].update(got)
    assert all(sorted(used[p]) == mine.tolist() for p, mine in held.items())
    return held


TOPOLOGIES = ["v5p:2x2x2", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x8"] + [
    f"{kind}:{grid}" for kind in ("v5e", "v6e") for grid in ("4x4", "4x8", "8x8", "8x16", "16x16")
]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["2xv5e:4x4", "tpu7x:2x2x2", *TOPOLOGIES])
def test_every_mesh_on_every_topology(name):
    """Every factorisation of the devices is a mesh, and every host reads the right rows."""
    devices = planned_devices(parse_machine(name))
    power = len(devices).bit_length() - 1
    interleaved = 0
    for a, b, c in itertools.product(range(power + 1), repeat=3):
        if a + b + c > power:
            continue
        data, fsdp, tensor, context = 2**a, 2**b, 2**c, 2 ** (power - a - b - c)
        preset = ("fsdp_tensor", "tensor_sequence")[a % 2] if c else "fsdp"
        recipe = _recipe(
            preset,
            dict(data=data, fsdp=fsdp, tensor=tensor, context=context),
            batch=len(devices), seq_len=2048, dim=1024, num_heads=1024, num_kv_heads=1024,
            ffn_dim=1024, vocab_size=1024, context=2048,
        )  # fmt: skip
        if name.startswith("2x") and data * fsdp == 1:
            with pytest.raises(ConfigError, match="would cross slices"):
                make_mesh(recipe.mesh, devices)
            continue
        mesh = make_mesh(recipe.mesh, devices)
        assert tuple(mesh.shape.values()) == (data, fsdp, tensor, context)
        assert len(set(mesh.devices.flat)) == len(devices)
        check_fits(recipe, mesh)
        held = check_rows(mesh, len(devices))
        interleaved += any(np.ptp(rows) >= len(rows) for rows in held.values())
    # On a torus a host's rows are not contiguous, so no (index, count) describes them. JAX 0.11
    # orders the devices of the smallest slice so that they are.
    contiguous = name == "v5p:2x2x2" and jax.__version_info__ >= (0, 11)
    assert interleaved or contiguous or not name.startswith("v5p")


@pytest.mark.parametrize("order", [[0, 2, 4, 6, 1, 3, 5, 7], [7, 3, 5, 1, 0, 6, 2, 4]])
def test_batches_are_placed_whatever_the_order_of_devices(order):
    recipe = _recipe(
        "fsdp_tensor", dict(data=2, fsdp=2, tensor=2), batch=12, gradient_accumulation=3
    )
    mesh = make_mesh(recipe.mesh, [jax.devices()[i] for i in order])
    spec = PRESETS["fsdp_tensor"].activation_without_tensor("BT")
    shard_batch = ShardBatch(recipe, mesh, spec)
    assert shard_batch.batch_rows.tolist() == list(range(12))
    batch = np.arange(12 * 16, dtype=np.int32).reshape(12, 16)
    placed = shard_batch(Batch(batch, batch + 1))
    np.testing.assert_array_equal(placed.inputs_BT, batch.reshape(3, 4, 16))
    np.testing.assert_array_equal(placed.targets_BT, batch.reshape(3, 4, 16) + 1)
    described = lambda x: (x.shape, x.dtype, x.sharding)
    abstract = jax.tree.map(described, abstract_batch(recipe, mesh, spec))
    assert jax.tree.map(described, placed) == abstract
    hosts = [Proxy(i, i % 2, 0, "cpu") for i in range(8)]
    mesh = make_mesh(MeshConfig(), hosts)
    assert host_rows(mesh, P("fsdp"), 16, 1).tolist() == [2, 3, 6, 7, 10, 11, 14, 15]


def _recipe(preset="fsdp", mesh=(), batch=8, gradient_accumulation=1, seq_len=16, **model):
    sizes = dict(
        name="tiny", vocab_size=64, dim=64, head_dim=64, num_heads=8, num_kv_heads=4, ffn_dim=64
    )
    return check_recipe(
        {
            "model": sizes | model,
            "data": {"sources": {"a": {"path": "x"}}, "seq_len": seq_len},
            "mesh": {"preset": preset, **dict(mesh)},
            "train": {
                "steps": 1,
                "batch_size": batch,
                "gradient_accumulation": gradient_accumulation,
            },
            "checkpoint": {"dir": "x"},
        },
        where="test",
    )


def test_check_fits_accepts_what_runs():
    for preset, sizes in CASES:
        recipe = _recipe(preset, sizes)
        check_fits(recipe, make_mesh(recipe.mesh))


@pytest.mark.parametrize(
    ("recipe", "messages"),
    [
        (
            _recipe(batch=12),
            ["train.batch_size / train.gradient_accumulation=12 is not a multiple of 8"],
        ),
        (
            _recipe(batch=8, gradient_accumulation=2),
            ["train.batch_size / train.gradient_accumulation=4"],
        ),
        (_recipe(dim=60), ["model.dim=60 is not a multiple of 8"]),
        (_recipe(mesh=dict(context=8, fsdp=1), seq_len=12), ["data.seq_len=12", "of 8 (context"]),
        (
            _recipe("fsdp_tensor", dict(tensor=8, fsdp=1), ffn_dim=60, vocab_size=63),
            ["num_kv_heads=4 is not a multiple of 8 (tensor", "ffn_dim=60", "vocab_size=63"],
        ),
    ],
)
def test_check_fits_names_every_problem(recipe, messages):
    with pytest.raises(ConfigError) as error:
        check_fits(recipe, make_mesh(recipe.mesh))
    for message in messages:
        assert message in str(error.value)


def hosts(count, **kwargs):
    """Devices of hosts with 8 GPUs, or one CPU."""
    return [Proxy(i, i // 8, i // 8, **kwargs) for i in range(count)]


RECIPES = sorted(ROOT.glob("configs/llama-*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_start_on_every_size_of_machine(path):
    """mesh.data and train.gradient_accumulation adapt to the machine, the batch does not change.

    On odd sizes, the error names settings that work.
    """
    assert len(RECIPES) == 8
    recipe = load_recipe(path)
    for count in (8, 64, 256, 512, 1024, 2048):
        fitted, mesh = mesh_for(recipe, hosts(count))
        assert mesh.size == count
        check_fits(fitted, mesh)
        assert changed_settings(recipe, fitted).keys() <= {
            "mesh.data",
            "train.gradient_accumulation",
        }
        rows = recipe.train.batch_size // fitted.train.gradient_accumulation // count
        assert (
            1
            <= rows
            <= max(1, recipe.train.batch_size // recipe.train.gradient_accumulation // count)
        )
        assert mesh.shape["data"] == max(1, count // math.gcd(count, recipe.model.dim))
        # The recipe that is recorded starts on the other sizes too.
        assert mesh_for(fitted, hosts(count // 2))[1].size == count // 2
    with pytest.raises(ConfigError, match=r"no mesh of 24 device\(s\) divides this"):
        mesh_for(recipe, hosts(24))
    more = hosts(4096)  # more than there are sequences in a batch
    given = [f"mesh.fsdp={n}" for n in (-1, 4096)]
    for override in given:
        with pytest.raises(ConfigError, match=r"these settings fit 4096 device\(s\): ") as error:
            mesh_for(load_recipe(path, [override]), more)
        hint = str(error.value).rpartition(": ")[2].split()
        other = load_recipe(path, [override, *hint])
        fitted, mesh = mesh_for(other, more)
        assert (fitted, mesh.size) == (other, 4096)


def test_what_a_recipe_fixes_is_not_adapted():
    """A size that the recipe sets is kept, or is an error that names sizes that fit."""
    fixed = _recipe(mesh=dict(fsdp=8), dim=60)
    for recipe, hint in [
        (fixed, "mesh.data=2 mesh.fsdp=4"),
        (_recipe(mesh=dict(data=3), dim=60), "mesh.data=2"),
        (_recipe(mesh=dict(data=1, fsdp=-1), batch=4), "mesh.context=2"),
        (_recipe("fsdp", dict(tensor=2)), "mesh.preset=tensor_sequence"),
        (_recipe("fsdp_tensor", dict(tensor=8), vocab_size=63), "mesh.tensor=1"),
    ]:
        with pytest.raises(ConfigError) as error:
            mesh_for(recipe)
        assert str(error.value).endswith(f"these settings fit 8 device(s): {hint}")
    adapted, mesh = mesh_for(_recipe(dim=60, batch=16, gradient_accumulation=16))
    assert changed_settings(fixed, adapted) == {
        "mesh.data": 2, "mesh.fsdp": -1, "train.gradient_accumulation": 2
    }  # fmt: skip
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (2, 4)


def test_sizes_that_jax_cannot_split():
    """A 4 x 4 x 20 topology: JAX before 0.11 loses a factor of 10 when it splits an axis."""
    chips = [Proxy(i, i // 4, 0, "tpu", "TPU v5") for i in range(4 * 4 * 20)]
    for chip, place in zip(chips, itertools.product(range(20), range(4), range(4)), strict=True):
        chip.coords, chip.core_on_chip = place[::-1], 0
    assert make_mesh(MeshConfig(preset="fsdp_tensor", tensor=20), chips).size == 320
    bad = dict(tensor=10), "JAX cannot place a mesh of mesh.data=1, mesh.fsdp=32, mesh.tensor=10"
    if jax.__version_info__ >= (0, 11):
        assert make_mesh(MeshConfig(preset="fsdp_tensor", **bad[0]), chips).size == 320
        return
    with pytest.raises(ConfigError, match=bad[1]):
        make_mesh(MeshConfig(preset="fsdp_tensor", **bad[0]), chips)
    model = dict(dim=640, num_heads=20, num_kv_heads=20, ffn_dim=640, vocab_size=640)
    recipe = _recipe("fsdp_tensor", bad[0], batch=320, **model)
    with pytest.raises(ConfigError, match=r"these settings fit 320 device\(s\): mesh.tensor=1$"):
        mesh_for(recipe, chips)


# Chips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459),
        ("TPU v6 lite", 918), ("TPU7x", 1153.5), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA H20", 148), ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        # Not in the table, though a part of the name is.
        ("NVIDIA RTX A1000", None), ("NVIDIA RTX A1000 Laptop GPU", None), ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("TPU v5x", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peak_rates_of_chips(kind, rate):
    assert peak_tflops(kind) == rate


def test_an_unknown_accelerator_is_measured_in_bfloat16(monkeypatch):
    class Unknown:
        platform, device_kind = "gpu", "NVIDIA RTX A1000"

    sizes = []

    def ones(shape, dtype):
        sizes.append((*shape, dtype))
        return np.ones((8, 8), np.float32)

    monkeypatch.setattr(jnp, "ones", ones)
    monkeypatch.setattr(jax, "device_put", lambda x, device: x)
    rate, source = chips.peak_flops(Unknown())
    assert rate > 0
    assert sizes == [(8192, 8192, "bfloat16")]
    assert source == "measured, bfloat16 matmul of 8192 x 8192"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", "no implementation 'flash'; there are tpu, cudnn, gpu, mosaic, xla"),
        ("cudnn", "cuDNN runs on NVIDIA GPUs, not on cpu"),
        ("gpu", "head_dim 48: the GPU kernels support 32, 64 and 128"),
        ("tpu", "head_dim 48: the TPU kernels support 64 and 128"),
        ("xla", ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize("packing", ["concat", "segments"])
def test_an_implementation_of_attention_that_cannot_run(name, message, packing):
    recipe = _recipe("fsdp_tensor", dict(tensor=2, context=2), head_dim=48)
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, packing=packing),
        train=dataclasses.replace(recipe.train, attention=name),
    )
    mesh = make_mesh(recipe.mesh)
    if not message:
        return check_attention(recipe, mesh)
    with pytest.raises(ConfigError, match=f"^train.attention='{name}' cannot be used here: ") as e:
        check_attention(recipe, mesh)
    assert message in str(e.value)
    return None


def test_mesh_axes_are_named_in_one_file():
    """Only sharding.py has the strings "tensor" and "context" ("data" has other meanings)."""
    named = {}
    for path in [*ROOT.glob("llama_jax/**/*.py"), *ROOT.glob("pallas_kernels/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if name in ("P", "PartitionSpec", "axis_index", "psum", "all_gather"):
                    words = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                    if set(words) & set(AXES):
                        named.setdefault(path.name, []).append(node.lineno)
    assert set(named) <= {"sharding.py"}, named
