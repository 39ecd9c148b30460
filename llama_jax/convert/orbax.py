"""Our own checkpoints: ``model.json`` and Orbax arrays, read and written by row blocks through
tensorstore.

Orbax only saves arrays that are in memory. To write a larger model, the arrays are declared to
Orbax, which writes all metadata, so that a stock restore reads the result; the values are written
afterwards.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.arrays import EVERY_CHUNK, ORBAX, check_item, open_array
from llama_jax.checkpoint.model_json import read_metadata
from llama_jax.checkpoint.steps import best_step, loaded_step, whole_steps
from llama_jax.config import ModelConfig
from llama_jax.convert import sources
from llama_jax.convert.formats import FLOATS, ConvertError, raise_if_any
from llama_jax.convert.sources import CheckpointWriter, Report, SourceCheckpoint
from llama_jax.convert.tensors import LayerTensor, layer_tensors, rows_per_chunk, tensor_specs
from llama_jax.data import tokenizer_files


class OrbaxWeights:
    """The weights of one of our checkpoints: one tensorstore array for each line of the table.

    Args:
      folder: the arrays of one step, such as ``steps/0/model``.
      cfg: the model.
      quantize: "int8" or "int4" if the matrices are quantized.

    Example:
      >>> weights = OrbaxWeights(Path("checkpoints/tiny/steps/100/model"), cfg)
      >>> rows = weights.read(layer_tensors(cfg)[0], 0, 100)
    """

    def __init__(self, folder: Path, cfg: ModelConfig, quantize: str | None = None):
        self.cfg = cfg
        check_item(folder, {})
        self.arrays = {s.path: open_array(folder, s.path) for s in tensor_specs(cfg, quantize)}

    def dtype(self, tensor: LayerTensor) -> np.dtype:
        return self.arrays[tensor.spec.path].dtype.numpy_dtype

    def read(self, tensor: LayerTensor, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor."""
        rows = self._array(tensor)[start:stop].read().result()
        return np.asarray(rows).reshape(stop - start, tensor.shape(self.cfg)[1])

    def write(self, tensor: LayerTensor, start: int, row_block: np.ndarray) -> None:
        """Write rows of a tensor; they must be whole chunks, which need not be read first."""
        array = self._array(tensor)[start : start + len(row_block)]
        block = row_block.reshape(array.shape)
        array.write(block, can_reference_source_data_indefinitely=True).result()

    def _array(self, tensor: LayerTensor) -> Any:
        array = self.arrays[tensor.spec.path]
        return array if tensor.layer is None else array[tensor.layer]


# Reader -------------------------------------------------------------------------------------------


def open_orbax(root: Path, path: Path) -> SourceCheckpoint:
    """Open one of our checkpoints.

    Args:
      root: the folder that holds model.json.
      path: `root`, or one step in it.

    Raises:
      ConvertError: the checkpoint cannot be used; lists every reason.
    """
    cfg, metadata = read_metadata(root)
    if "adapter" in metadata:
        raise ConvertError(f"{path} is a LoRA adapter; give the weights of a whole model")
    quantize = metadata.get("quantize")
    step, steps = find_step(root, path)
    folder = root / "steps" / str(step) / "model"
    weights = _open_arrays(folder, cfg, quantize)
    warnings = other_steps(root, step, steps)
    report = Report(f"{root}/model.json")
    token_ids = sources.check_token_ids(metadata["token_ids"], cfg.vocab_size, report)
    warnings += report.warnings
    # The manifest describes the converted step 0, not later training steps.
    sha256 = sources.manifest_sha256(root, cfg, quantize) if step == 0 else {}
    return SourceCheckpoint(
        "orbax", path, cfg, weights, [folder], token_ids, tokenizer_files.find(root),
        sources.extras(root), warnings, sha256, quantize, metadata.get("lineage"),
    )  # fmt: skip


def root_of(path: Path) -> Path:
    """The run folder of a path that may be one step of it, or the model in a step."""
    return next((p.parent for p in list(path.resolve().parents)[:2] if p.name == "steps"), path)


def other_steps(root: Path, step: int, steps: list[int]) -> list[str]:
    """A warning that names the steps of a folder, if this is not the only one."""
    if len(steps) == 1:
        return []
    best = ", which has the best validation loss" if step == best_step(root) else ""
    return [f"this is step {step}{best}; the folder has steps {', '.join(map(str, steps))}"]


def find_step(root: Path, path: Path) -> tuple[int, list[int]]:
    """The step that ``path`` names, or the one that is loaded, and all steps."""
    folder = root / "steps"
    steps = whole_steps(root)
    given = next(iter(path.resolve().relative_to(root.resolve()).parts[1:]), None)
    if given is not None and given not in map(str, steps):
        raise ConvertError(f"{path} is not a finished step of {root}")
    if not steps:
        raise ConvertError(f"{folder} holds no finished step")
    return int(given) if given is not None else loaded_step(root), steps


def array_names(folder: Path) -> set[str]:
    """Names of the arrays of one step, such as "blocks/mlp/up"."""
    metadata = sources.read_settings(folder / "_METADATA", sources.MAX_INDEX_BYTES)
    try:
        keys = [v["key_metadata"] for v in metadata["tree_metadata"].values()]
        return {"/".join(str(k["key"])[:200] for k in key) for key in keys}
    except (KeyError, TypeError, AttributeError):
        raise ConvertError(f"{folder}/_METADATA is damaged: it lists no arrays") from None


def _open_arrays(folder: Path, cfg: ModelConfig, quantize: str | None) -> OrbaxWeights:
    """The arrays of one step, after a check of their names, shapes and dtypes."""
    specs = tensor_specs(cfg, quantize)
    shapes = {s.path: (cfg.num_layers,) * s.stacked + s.shape(cfg) for s in specs}
    raise_if_any(sources.check_names(array_names(folder), set(shapes), folder))
    weights = OrbaxWeights(folder, cfg, quantize)
    problems = []
    for name, array in weights.arrays.items():
        if array.shape != shapes[name]:
            problems.append(
                f"{folder}: {name} has shape {list(array.shape)}, model.json makes it "
                f"{list(shapes[name])}"
            )
        if array.dtype.numpy_dtype not in FLOATS and not name.endswith("/q"):
            problems.append(
                f"{folder}: {name} is {array.dtype.name}: only float16, bfloat16 and float32 "
                "weights are supported"
            )
    raise_if_any(problems)
    return weights


# Writer -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Declared:
    """An array without values."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    """shape of the parts that are stored as one file each"""
    dtype: np.dtype

    def create(self, path: Any) -> None:
        """Create the empty array."""
        import tensorstore as ts

        metadata = {
            "shape": self.shape,
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
        kvstore = {"driver": "file", "path": f"{path}/"}
        spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata} | EVERY_CHUNK
        ts.open(spec, create=True).result()


def create_writer(
    folder: Path, cfg: ModelConfig, dtypes: dict[str, np.dtype], quantize: str | None = None
) -> CheckpointWriter:
    """Create step 0 of a checkpoint with empty arrays, or open the one of a killed run.

    Args:
      folder: the checkpoint.
      cfg: the model.
      dtypes: dtype of each line of the table.
      quantize: "int8" or "int4" for quantized matrices.
    """
    arrays = folder / "steps" / "0" / "model"
    if not (arrays / "_METADATA").exists():
        first = [t for t in layer_tensors(cfg, quantize) if t.layer in (None, 0)]
        declared = {t.spec.path: _declare(t, cfg, dtypes[t.spec.path]) for t in first}
        create_arrays(folder / "steps", declared)
    return CheckpointWriter(OrbaxWeights(arrays, cfg, quantize))


def _declare(tensor: LayerTensor, cfg: ModelConfig, dtype: np.dtype) -> Declared:
    """A tensor of all layers, in chunks of some rows of one layer."""
    shape = tensor.spec.shape(cfg)
    rows = rows_per_chunk(tensor, cfg, dtype)
    stacked = tensor.layer is not None
    chunk = (1,) * stacked + (rows, *shape[1:])
    return Declared((cfg.num_layers,) * stacked + shape, chunk, dtype)


def create_arrays(steps: Path, arrays: dict[str, Declared]) -> None:
    """Create step 0 with these arrays by name ("blocks/mlp/up"); values are written later."""
    import orbax.checkpoint as ocp
    from flax import traverse_util

    class Declare(ocp.type_handlers.TypeHandler):
        def typestr(self):
            return "jax.Array"  # what a stock restore looks for

        async def metadata(self, infos):
            raise NotImplementedError

        async def deserialize(self, infos, args=None):
            raise NotImplementedError

        async def serialize(self, values, infos, args=None):
            for value, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                value.create(info.path)
            return []

    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # Orbax warns about the missing values
    try:
        registry = ocp.type_handlers.create_type_handler_registry((Declared, Declare()))
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **ORBAX)
        with ocp.CheckpointManager(
            steps, item_handlers={"model": handler}, options=options
        ) as manager:
            tree = ocp.args.PyTreeSave(traverse_util.unflatten_dict(arrays, sep="/"))
            manager.save(0, args=ocp.args.Composite(model=tree))
    finally:
        log.setLevel(level)
