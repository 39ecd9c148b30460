"""Load a model: a run of training, converted weights, or weights of Hugging Face or Meta."""

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.checkpoint.model_json import read_metadata
from llama_jax.checkpoint.steps import loaded_step_note
from llama_jax.checkpoint.weights import check_weights
from llama_jax.config import ConfigError, ModelConfig
from llama_jax.data.chat_template import folder_template
from llama_jax.generate.adapters import attach, base_of, check_base, open_adapter
from llama_jax.generate.decode import device_memory
from llama_jax.generate.llm import LLM
from llama_jax.generate.model_files import read_eos_ids, read_tokenizer
from llama_jax.generate.read_params import on_devices, read_params
from llama_jax.generate.user_cache import converted
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.params import abstract_params
from llama_jax.model.quantize import KINDS, weight_bytes
from llama_jax.model.sharding import PRESETS, use_mesh
from llama_jax.storage.copies import cache_folder, local_folder
from llama_jax.storage.paths import as_path, check_access, is_remote

DTYPES = ("float32", "bfloat16")


def load(
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    cache: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> LLM:
    """Load a model that is ready to generate.

    Weights of Hugging Face, Meta or GGUF are converted once, into ``~/.cache/llama_jax/converted``
    (or ``$XDG_CACHE_HOME/llama_jax/converted``), and read from there until their files change. That
    folder can be deleted at any time.

    Args:
      folder: a run of `python -m llama_jax.train`, a result of `python -m llama_jax.convert`, or a
        folder with weights and tokenizer in the layout of Hugging Face or Meta; or a GGUF file.
        It may be in a bucket (gs://, s3://): runs and our own weights are read from there, other
        formats are copied to the user's cache first.
        The folder of a LoRA adapter stands for the base that it names, with the adapter.
      adapter: a LoRA adapter to use with these weights: a run with a section [lora], or a folder in
        PEFT's format. Its tokenizer, EOS ids and chat template are used, if it has them.
      dtype: of weights and computation, "float32" or "bfloat16"; default: float32 on a CPU,
        bfloat16 elsewhere.
      quantize: "int8" or "int4" for the matrices of the layers; weights made by
        `convert --quantize` are already quantized. Default: as the adapter was trained.
      cache: "int8" for keys and values in 8 bits, with a scale per head and position; default:
        as ``dtype``. A TPU has no kernel for int8: XLA computes the attention.
      mesh: from ``make_mesh``; heads and widths are sharded over its ``tensor`` axis.

    Returns:
      The model.

    Raises:
      ConfigError: the folder holds no weights, or damaged ones (the message names the files), or a
        tokenizer with more tokens than the embedding has rows; the adapter is for other sizes.
      ValueError: the tokenizer is missing or of an unknown kind; an unknown dtype, quantization
        or cache; another quantization than that of the checkpoint; a mesh that does not divide the
        model.
      MemoryError: the weights are larger than the memory of the device.
    """
    if quantize is not None and quantize not in KINDS:
        raise ValueError(f"quantize={quantize!r} must be 'int8' or 'int4'")
    if cache not in (None, "int8"):
        raise ValueError(f"cache={cache!r} must be 'int8'")
    if dtype is not None and str(dtype) not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
    devices = list(mesh.devices.flat) if mesh is not None else jax.local_devices()[:1]
    platform = devices[0].platform
    weight_dtype = jnp.dtype(dtype or ("float32" if platform == "cpu" else "bfloat16"))
    compute = ComputeConfig(
        weight_dtype,
        PRESETS["fsdp_tensor"],
        unroll=platform != "tpu",
        cache_dtype=jnp.dtype(cache) if cache else None,
    )
    if adapter is None and (base := base_of(as_path(folder))) is not None:
        folder, adapter = base, folder
    shapes_of = functools.partial(_shapes_of, as_path(folder), compute, mesh, devices)

    checkpoint = _checkpoint_of(as_path(folder), lambda cfg: shapes_of(cfg, quantize))
    cfg, metadata = read_metadata(checkpoint)
    if "adapter" in metadata:
        base = metadata["adapter"]["base"]["path"]
        raise ConfigError(
            f"{folder} holds a LoRA adapter, not the weights of a whole model, so {adapter} cannot "
            f"be used with it; give the weights that it was trained on ({base})"
        )
    _check_files(checkpoint, as_path(folder))
    if note := loaded_step_note(checkpoint):
        print(note, file=sys.stderr)
    stored = metadata.get("quantize")
    if stored is not None and quantize not in (None, stored):
        raise ValueError(
            f"quantize={quantize!r}, but {folder} holds {stored}: leave quantize out, or load the "
            "weights that it was made from"
        )
    update = None
    if adapter is not None:
        update = open_adapter(adapter, checkpoint)
        check_base(update, cfg, checkpoint)
        quantize = quantize or (None if stored else update.quantize)
    quantize = quantize or stored
    tokenizer = read_tokenizer(checkpoint, cfg)
    eos_ids = read_eos_ids(checkpoint, metadata, cfg)
    template, no_template = folder_template(checkpoint)
    shapes = shapes_of(cfg, quantize)
    _keep_compiled()
    with use_mesh(mesh):
        params = read_params(checkpoint, cfg, shapes, quantize, stored, compute.unroll)
    llm = LLM(
        cfg, params, tokenizer, compute, eos_ids=eos_ids, mesh=mesh, chat_template=template,
        no_template=no_template, checkpoint=checkpoint,
    )  # fmt: skip
    return llm if update is None else attach(llm, update)


def _shapes_of(
    folder: Path,
    compute: ComputeConfig,
    mesh: jax.sharding.Mesh | None,
    devices: list[jax.Device],
    cfg: ModelConfig,
    quantize: str | None,
) -> Any:
    """Shapes, dtypes and shardings of the weights; checks mesh and memory before any are read."""
    if mesh is not None:
        _check_mesh(cfg, mesh)
    with use_mesh(mesh):
        abstract = abstract_params(cfg, compute)
        _check_memory(folder, abstract, quantize or compute.dtype.name, devices)
    return on_devices(abstract, compute.dtype, mesh, devices[0])


def _checkpoint_of(folder: Path, check: Callable[[ModelConfig], Any]) -> Path:
    """The checkpoint to read: ``folder`` itself, or its conversion, made if ``check`` passes."""
    from llama_jax.convert.gguf import locate

    check_access(folder)
    if is_remote(folder) and (folder / "model.json").is_file():
        return folder
    try:
        folder = locate(local_folder(folder))
    except ValueError as e:
        raise ConfigError(str(e)) from None
    if not folder.exists():
        raise ConfigError(
            f"{folder} does not exist; `python -m llama_jax.train` makes checkpoints/tiny; for "
            "published weights give the folder that holds them"
        )
    if (folder / "model.json").is_file():
        return folder
    from llama_jax.convert.job import open_folder
    from llama_jax.convert.sources import NAMES

    try:
        found = open_folder(folder)
    except (ValueError, OSError) as e:
        raise ConfigError(f"{folder} cannot be loaded: {e}") from None
    if found.format == "orbax":
        root = next(p for p in folder.resolve().parents if (p / "model.json").is_file())
        raise ConfigError(f"{folder} is one step of a checkpoint: load {root}, its newest")
    if not found.tokenizers:
        raise ConfigError(f"{folder} has no tokenizer (tokenizer.model or tokenizer.json)")
    check(found.cfg)
    files = [*found.files, *(tokenizer.path for tokenizer in found.tokenizers)]
    return converted(folder.resolve(), NAMES[found.format], files)


def _check_files(checkpoint: Path, folder: Path) -> None:
    """Compare the files of a checkpoint, ``folder`` or its conversion, with their hashes."""
    try:
        check_weights(checkpoint)
    except ConfigError as e:
        if checkpoint == folder:
            raise
        advice = f"{checkpoint} is converted from {folder}: remove it, and load again"
        raise ConfigError(f"{e}\n{advice}") from e


def _check_mesh(cfg: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    wide = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1 and axis != "tensor"]
    if wide:
        raise ValueError(
            f"the mesh has {', '.join(wide)}: generation shards a model over tensor only; "
            "make_mesh(MeshConfig(preset='fsdp_tensor', fsdp=1, tensor=-1)) uses all devices"
        )
    tensor = mesh.shape["tensor"]
    sizes = dict(num_kv_heads=cfg.num_kv_heads, ffn_dim=cfg.ffn_dim, vocab_size=cfg.vocab_size)
    if bad := [f"{name}={size}" for name, size in sizes.items() if size % tensor]:
        raise ValueError(
            f"the mesh's tensor={tensor} does not divide {', '.join(bad)} of this model"
        )


def _check_memory(folder: Path, abstract: Any, kind: str, devices: list[jax.Device]) -> None:
    """Raise before reading anything if the weights alone are larger than the memory."""
    needed = weight_bytes(abstract, kind) / len(devices)
    available = device_memory(devices[0], len(devices))
    if available is not None and needed > available:
        smaller = weight_bytes(abstract, "int8") / len(devices)
        raise MemoryError(
            f"the weights of {folder} take {needed / 1e9:.1f} GB per device in {kind}, and "
            f'{devices[0].device_kind} has {available / 1e9:.1f} GB: load with quantize="int8" '
            f'({smaller / 1e9:.1f} GB) or "int4", or with a mesh over more devices'
        )


def _keep_compiled() -> None:
    """Keep compiled programs in the user's cache folder."""
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    with contextlib.suppress(ValueError):  # without a home folder, nothing is kept
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
