"""A checkpoint folder to a model that samples.

In: a run's folder, or converted weights. Out: an ``LLM``, its weights in the
dtype asked for, quantised or split over a mesh. What cannot be loaded says what it is, and the
command that makes it loadable.
"""

import functools
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from tqdm import tqdm

from llama_jax.checkpoint.model_json import read_metadata
from llama_jax.checkpoint.weights import check_weights, load_layers, load_weights
from llama_jax.config import ConfigError, ModelConfig
from llama_jax.convert.tensors import TABLE
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.generate.llm import LLM, check_eos, memory_of
from llama_jax.io import read_json, read_limited
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.params import abstract_params, fuse_projections, unstack_layers
from llama_jax.model.quantize import (
    KINDS,
    MATRICES,
    QuantizedWeight,
    from_stored,
    quantize_weight,
    weight_bytes,
)
from llama_jax.model.sharding import PRESETS, num_shards, use_mesh

DTYPES = ("float32", "bfloat16")
MAX_TEMPLATE_BYTES = 1 << 20
"""The largest chat template read; published ones have up to 20 kB."""


def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> LLM:
    """A model ready to sample from.

    Args:
      folder: a run of `python -m llama_jax.train`, or what `python -m llama_jax.convert` made.
      dtype: of weights and computation, "float32" or "bfloat16"; default: float32 on a CPU,
        bfloat16 elsewhere.
      quantize: "int8" or "int4": the layers' matrices in fewer bits; a checkpoint that
        `convert --quantize` made has them already.
      mesh: of ``make_mesh``; heads and widths are split over its ``tensor``.

    Raises:
      ConfigError: no checkpoint of ours there (says what it is), or a damaged one (names the
        files); a tokenizer with more tokens than the embedding has rows.
      ValueError: its tokenizer is missing or of another kind; an unknown dtype or quantisation, or
        another one than the checkpoint's; a mesh that does not divide the model.
      MemoryError: the weights are larger than the device's memory.
    """
    if quantize is not None and quantize not in KINDS:
        raise ValueError(f"quantize={quantize!r}: there are 'int8' and 'int4'")
    if dtype is not None and str(dtype) not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: there are 'float32' and 'bfloat16'")
    folder = Path(folder)
    cfg, metadata = _read_metadata(folder)
    check_weights(folder)
    stored = metadata.get("quantize")
    if stored is not None and quantize not in (None, stored):
        raise ValueError(
            f"quantize={quantize!r}, but {folder} holds {stored}: leave quantize out, or load the "
            "weights that it was made of"
        )
    quantize = quantize or stored
    if mesh is not None:
        _check_mesh(cfg, mesh)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, the embedding of "
            f"{folder} {cfg.vocab_size} rows only: it is another model's tokenizer"
        )
    eos_ids = _eos_of(folder, metadata, cfg)
    template, no_template = _template(folder)
    devices = list(mesh.devices.flat) if mesh is not None else jax.local_devices()[:1]
    cpu, tpu = (devices[0].platform == name for name in ("cpu", "tpu"))
    kind = jnp.dtype(dtype or ("float32" if cpu else "bfloat16"))
    compute = ComputeConfig(kind, PRESETS["fsdp_tensor"], unroll=not tpu)
    with use_mesh(mesh):
        abstract = abstract_params(cfg, compute)
        _check_memory(folder, abstract, quantize or kind.name, devices)
    _keep_compiled()

    def place(x: Any) -> jax.ShapeDtypeStruct:
        spec = NamedSharding(mesh, x.sharding.spec) if mesh else SingleDeviceSharding(devices[0])
        return jax.ShapeDtypeStruct(x.shape, kind, sharding=spec)

    like = jax.tree.map(place, abstract)
    with use_mesh(mesh):
        if quantize is not None:
            whole = functools.partial(_quantized_now, folder)
            read = whole if stored is None else functools.partial(_quantized_before, folder, cfg)
            params = _load_quantized(folder, like, quantize, compute.unroll, read)
        else:
            params = load_weights(folder, like)
            if compute.unroll:
                params = unstack_layers(params)
    return LLM(
        cfg, params, tokenizer, compute,
        eos_ids=eos_ids, mesh=mesh, chat_template=template, no_template=no_template,
    )  # fmt: skip


def _load_quantized(
    folder: Path,
    like: Any,
    kind: str,
    unstacked: bool,
    read: Callable[..., Iterator[QuantizedWeight]],
) -> dict[str, Any]:
    """The weights, matrices of the layers read one by one and quantised: what is held is what the
    model will be, and two matrices."""
    stacks = {room: like["blocks"][room] for room in MATRICES}
    norms = {name: x for name, x in like["blocks"].items() if name not in MATRICES}
    params = load_weights(folder, {**like, "blocks": norms}, partial=True)
    if unstacked:
        params = unstack_layers(params)
    blocks = params["blocks"]
    names = [(room, name) for room in MATRICES for name in stacks[room]]
    total = sum(stacks[room][name].shape[0] for room, name in names)
    with tqdm(total=total, desc=kind, unit="matrix", disable=None, delay=2) as bar:
        for room, name in names:
            x, made = stacks[room][name], []
            for w in read(f"blocks/{room}/{name}", x, kind):
                made.append(jax.block_until_ready(w))
                bar.update()
            if unstacked:
                for i, whole in enumerate(made):
                    blocks[i].setdefault(room, {})[name] = whole
            else:
                blocks.setdefault(room, {})[name] = jax.tree.map(lambda *x: jnp.stack(x), *made)
            del made, w
    if unstacked:
        for layer in blocks.values():
            fuse_projections(layer)
    return params


def _quantized_now(
    folder: Path, name: str, stack: jax.ShapeDtypeStruct, kind: str
) -> Iterator[QuantizedWeight]:
    """A matrix of each layer, of whole weights."""
    for w_IO in load_layers(folder, name, stack.shape):
        yield quantize_weight(_put(w_IO, stack, *_spec(stack)), kind)


def _quantized_before(
    folder: Path, cfg: ModelConfig, name: str, stack: jax.ShapeDtypeStruct, kind: str
) -> Iterator[QuantizedWeight]:
    """A matrix of each layer, as `convert --quantize` stored it."""
    row = next(row for row in TABLE if row.path == name)
    shapes = [(part.path, (cfg.num_layers, *part.shape(cfg))) for part in row.parts(kind)]
    scales, integers = (load_layers(folder, *of) for of in shapes)
    inputs, out = _spec(stack)
    grouped = kind == "int4"
    spec = (inputs, None, out) if grouped else (inputs, out)
    of_scale = spec if grouped else (None, out)
    parts = 1 if inputs is None else num_shards(inputs)
    for scale, q in zip(scales, integers, strict=True):
        q, scale = from_stored(q, scale, kind, stack.shape[1], parts)
        # Narrowed where it lies: an array of 4 bits from the host is laid out in another way.
        q_there = _put(q, stack, *spec).astype(kind)
        yield QuantizedWeight(q_there, _put(scale, stack, *of_scale), grouped)


def _spec(stack: jax.ShapeDtypeStruct) -> tuple:
    """How a layer of a stacked matrix is split."""
    sharding = stack.sharding
    return tuple(sharding.spec[1:]) if isinstance(sharding, NamedSharding) else (None, None)


def _put(x: Any, stack: jax.ShapeDtypeStruct, *spec: Any) -> jax.Array:
    """An array of one layer on the devices of its stack."""
    sharding = stack.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return jax.device_put(x, sharding)


def _read_metadata(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    if (folder / "model.json").is_file() or not folder.exists():
        if not folder.exists():
            raise ConfigError(
                f"{folder} does not exist; `python -m llama_jax.train` makes checkpoints/tiny, "
                "`python -m llama_jax.convert SOURCE DESTINATION` takes published weights"
            )
        return read_metadata(folder)
    from llama_jax.convert.layouts import open_folder

    try:
        found = open_folder(folder)
    except (ValueError, OSError) as e:
        raise ConfigError(f"{folder} is not a checkpoint of llama_jax: {e}") from None
    if found.kind == "orbax":
        root = next(p for p in folder.resolve().parents if (p / "model.json").is_file())
        raise ConfigError(f"{folder} is one step of a checkpoint: load {root}, its newest")
    names = {"meta": "weights as Meta gives them", "hf": "Hugging Face weights"}
    command = shlex.join([str(folder), f"checkpoints/{folder.resolve().name}"])
    raise ConfigError(
        f"{folder} holds {names[found.kind]}; convert them first:\n"
        f"  python -m llama_jax.convert {command}"
    )


def _check_mesh(cfg: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    wide = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1 and axis != "tensor"]
    if wide:
        raise ValueError(
            f"the mesh has {', '.join(wide)}: sampling splits a model over tensor alone; "
            "make_mesh(MeshConfig(preset='fsdp_tensor', fsdp=1, tensor=-1)) takes every device"
        )
    num_shards = mesh.shape["tensor"]
    sizes = dict(num_kv_heads=cfg.num_kv_heads, ffn_dim=cfg.ffn_dim, vocab_size=cfg.vocab_size)
    if bad := [f"{name}={size}" for name, size in sizes.items() if size % num_shards]:
        raise ValueError(
            f"the mesh's tensor={num_shards} does not divide {', '.join(bad)} of this model"
        )


def _check_memory(folder: Path, abstract: Any, kind: str, devices: list[jax.Device]) -> None:
    """Raise before reading a byte when the weights alone are larger than the memory."""
    need = weight_bytes(abstract, kind) / len(devices)
    have = memory_of(devices[0], len(devices))
    if have is not None and need > have:
        smaller = weight_bytes(abstract, "int8") / len(devices)
        raise MemoryError(
            f"the weights of {folder} take {need / 1e9:.1f} GB a device in {kind}, and "
            f'{devices[0].device_kind} has {have / 1e9:.1f} GB: load with quantize="int8" '
            f'({smaller / 1e9:.1f} GB) or "int4", or with a mesh over more devices'
        )


def _keep_compiled() -> None:
    """Compiled steps outlive the process, in the user's cache folder."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "llama_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _eos_of(folder: Path, metadata: dict[str, Any], cfg: ModelConfig) -> tuple[int, ...] | None:
    """The ids that end a text, if ``model.json`` says them."""
    ids = metadata.get("token_ids") or {}
    try:
        if not isinstance(ids, dict):
            raise ValueError(f"token_ids must be an object, not {ids!r:.60}")
        return None if ids.get("eos") is None else check_eos(ids["eos"], cfg)
    except ValueError as e:
        raise ConfigError(f"{folder / 'model.json'}: {e}") from None


def _template(folder: Path) -> tuple[str | None, str | None]:
    """The chat template that came with a model, as Hugging Face keeps it; or why there is none."""
    own, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if own.is_file():
            return read_limited(own, MAX_TEMPLATE_BYTES).decode("utf-8"), None
        template = read_json(settings).get("chat_template") if settings.is_file() else None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{own} is not UTF-8 text (byte {e.start}: {e.reason})") from None
    except ValueError as e:
        raise ConfigError(str(e)) from None
    if isinstance(template, list):  # several, by name
        named = [t for t in template if isinstance(t, dict)]
        template = {t.get("name"): t.get("template") for t in named}
    if isinstance(template, dict):
        if "default" not in template:
            return None, (
                f"{settings} has chat templates named {', '.join(map(repr, template))}, and none "
                f"named 'default': write the one to use to {own}"
            )
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{settings}: chat_template must be text, not {template!r:.60}")
    return template, None
