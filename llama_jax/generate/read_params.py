"""Weights of a checkpoint on the devices: as stored, in another dtype, or quantized."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from tqdm import tqdm

from llama_jax.checkpoint.weights import load_layers, load_weights
from llama_jax.config import ModelConfig
from llama_jax.convert.tensors import TABLE
from llama_jax.model.params import fuse_projections, unstack_layers
from llama_jax.model.quantize import MATRICES, QuantizedWeight, from_stored, quantize_weight
from llama_jax.model.sharding import num_shards


def read_params(
    folder: Path,
    cfg: ModelConfig,
    like: Any,
    kind: str | None = None,
    stored: str | None = None,
    unstacked: bool = False,
) -> dict[str, Any]:
    """The newest weights of a checkpoint, as stored or with quantized matrices.

    Matrices are quantized one by one, so that peak memory is the quantized model and two matrices.

    Args:
      folder: a run, or converted weights.
      cfg: the model.
      like: `jax.ShapeDtypeStruct` of each weight, stacked: dtype of weights that are not quantized,
        and shardings.
      kind: "int8" or "int4" for the matrices of the layers.
      stored: the quantization in the checkpoint; None, or ``kind``.
      unstacked: a dict for each layer, as :func:`llama_jax.model.params.unstack_layers` makes.

    Raises:
      ConfigError: the weights are missing, damaged, or of other shapes.
    """
    read: Callable[..., Iterator[QuantizedWeight]] = functools.partial(_quantize_stored, folder)
    if stored is not None:
        read = functools.partial(_read_quantized, folder, cfg)
    modules = MATRICES if kind else ()
    stacks = {module: like["blocks"][module] for module in modules}
    others = {name: x for name, x in like["blocks"].items() if name not in modules}
    params = load_weights(folder, {**like, "blocks": others}, partial=bool(kind))
    if unstacked:
        params = unstack_layers(params)
    if not kind:
        return params
    blocks = params["blocks"]
    names = [(module, name) for module in MATRICES for name in stacks[module]]
    total = sum(stacks[module][name].shape[0] for module, name in names)
    with tqdm(total=total, desc=kind, unit="matrix", disable=None, delay=2) as bar:
        for module, name in names:
            x, layers = stacks[module][name], []
            for w in read(f"blocks/{module}/{name}", x, kind):
                layers.append(jax.block_until_ready(w))
                bar.update()
            if unstacked:
                for i, whole in enumerate(layers):
                    blocks[i].setdefault(module, {})[name] = whole
            else:
                blocks.setdefault(module, {})[name] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
            del layers, w
    if unstacked:
        for layer in blocks.values():
            fuse_projections(layer)
    return params


def on_devices(
    abstract: Any, dtype: Any, mesh: jax.sharding.Mesh | None, device: jax.Device | None = None
) -> Any:
    """Abstract arrays with this dtype (None: their own) and a sharding on devices.

    Args:
      abstract: a tree with shapes, dtypes and partition specs.
      dtype: of all arrays.
      mesh: devices over which the arrays are sharded.
      device: of all arrays, if there is no mesh.
    """

    def place(x: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, x.sharding.spec) if mesh else SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    return jax.tree.map(place, abstract)


def _quantize_stored(
    folder: Path, name: str, stack: jax.ShapeDtypeStruct, kind: str
) -> Iterator[QuantizedWeight]:
    """A matrix of each layer, quantized from stored floating-point weights."""
    for w_IO in load_layers(folder, name, stack.shape):
        yield quantize_weight(_put(w_IO, stack, *_spec(stack)), kind)


def _read_quantized(
    folder: Path, cfg: ModelConfig, name: str, stack: jax.ShapeDtypeStruct, kind: str
) -> Iterator[QuantizedWeight]:
    """A matrix of each layer, stored quantized by `convert --quantize`."""
    matrix = next(spec for spec in TABLE if spec.path == name)
    shapes = [(part.path, (cfg.num_layers, *part.shape(cfg))) for part in matrix.stored(kind, cfg)]
    scales, integers = (load_layers(folder, *of) for of in shapes)
    inputs, out = _spec(stack)
    parts = 1 if inputs is None else num_shards(inputs)
    for scale, q in zip(scales, integers, strict=True):
        q, scale = from_stored(q, scale, kind, stack.shape[1], parts)
        groups = None if kind == "int8" else inputs
        yield QuantizedWeight(_put(q, stack, inputs, out), _put(scale, stack, groups, out))


def _spec(stack: jax.ShapeDtypeStruct) -> tuple:
    """Partition spec of one layer of a stacked matrix."""
    sharding = stack.sharding
    return tuple(sharding.spec[1:]) if isinstance(sharding, NamedSharding) else (None, None)


def _put(x: Any, stack: jax.ShapeDtypeStruct, *spec: Any) -> jax.Array:
    """Put an array of one layer on the devices of the stacked array."""
    sharding = stack.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return jax.device_put(x, sharding)
