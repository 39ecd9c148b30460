"""The mesh, and the sharding rules, which map the letters of a shape to mesh axes.

The sharding of a weight is ``rules.weight("DF")``, that of an activation
``rules.activation("BTNH")``. The mesh axes:

  data     copies of the model; only gradients are communicated
  fsdp     weights and optimizer state are sharded; each layer is gathered when it is used
  tensor   heads, feed-forward width and vocabulary are sharded
  context  sequence positions are sharded

The axis types are explicit: the sharding is part of an array's type, and JAX rejects an ambiguous
product.
"""

import contextlib
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from llama_jax.config import ConfigError, MeshConfig, Recipe
from llama_jax.config.model_config import FIELD_OF_LETTER

AXES = ("data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of each letter, for weights and for activations.

    Example::

      rules = PRESETS["fsdp_tensor"]
      w_DF = jax.device_put(w_DF, NamedSharding(mesh, rules.weight("DF")))
    """

    weights: tuple[tuple[str, tuple[str, ...]], ...]
    activations: tuple[tuple[str, tuple[str, ...]], ...]

    def weight(self, letters: str) -> P:
        """Sharding of a stored weight; a vector (a norm's scale) is replicated."""
        return _spec(letters, dict(self.weights)) if len(letters.lstrip("L")) > 1 else P()

    def weight_without_fsdp(self, letters: str, tokens: Iterable[Any]) -> P:
        """Sharding of a weight while it is used: gathered over ``fsdp``.

        ``tokens`` are the spec entries of the tokens that it is used on. Over their axes its
        gradient arrives as partial sums (``reduced``), which :func:`gather` adds up into the stored
        shards.
        """
        rules = {k: tuple(a for a in axes if a != "fsdp") for k, axes in self.weights}
        return _spec(letters, rules, reduced=frozenset(a for entry in tokens for a in _axes(entry)))

    def activation(self, letters: str) -> P:
        """Sharding of an activation.

        Each mesh axis shards one letter; widths take ``tensor`` before positions do.
        """
        return _spec(letters, dict(self.activations))

    def activation_without_tensor(self, letters: str) -> P:
        """Sharding of an activation that is multiplied with a weight sharded over ``tensor``."""
        rules = {k: tuple(a for a in axes if a != "tensor") for k, axes in self.activations}
        return _spec(letters, rules)


def num_shards(axes: tuple[str, ...] | str | None) -> int:
    """Number of shards of an array axis with this spec entry, on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[a] for a in _axes(axes))


def is_sharded(axes: tuple[str, ...] | str | None) -> bool:
    """Whether an array axis with this spec entry has several shards on the current mesh."""
    return num_shards(axes) > 1


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Context manager that sets ``mesh``; None leaves the current one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def no_mesh() -> bool:
    """Whether no mesh is set, as in a notebook on one device; arrays then have no sharding."""
    return jax.sharding.get_abstract_mesh().empty


def reshard(x: jax.Array, spec: P) -> jax.Array:
    """`jax.sharding.reshard` if a mesh is set."""
    return x if no_mesh() else jax.sharding.reshard(x, spec)


def gather(w_IO: jax.Array, gathered: P) -> jax.Array:
    """A stored matrix in the sharding of :meth:`Rules.weight_without_fsdp`.

    Two steps, for the sake of the gradient, which takes them backwards: it is summed over ``fsdp``
    into shards, and only the shards are summed over ``data`` and ``context``. In one step, the
    partitioner would sum the whole matrix over all axes. The shards are rows, of the transpose if
    necessary: XLA for TPU emits a reduce-scatter only for rows.
    """
    stored = jax.typeof(w_IO).sharding.spec
    transposed = "fsdp" in _axes(stored[1])
    w = jnp.swapaxes(w_IO, 0, 1) if transposed else w_IO
    order = slice(None, None, -1) if transposed else slice(None)
    w = reshard(w, P(*stored[order], reduced=gathered.reduced - {"fsdp"}))
    w = reshard(w, P(*gathered.partitions[order], reduced=gathered.reduced))
    return jnp.swapaxes(w, 0, 1) if transposed else w


def gather_float32_gradient(
    w_IO: jax.Array, gathered: P, dtype: jnp.dtype, out_dtype: jnp.dtype
) -> jax.Array:
    """A matrix in ``dtype``, gathered, whose gradient is summed over devices in float32.

    Args:
      w_IO: the stored weight.
      gathered: as for :func:`gather`.
      dtype: of what is gathered.
      out_dtype: of the result and of its gradient before the sum.
    """
    kind = jax.typeof(w_IO)

    @jax.custom_vjp
    def cast_and_gather(w):
        return gather(w.astype(dtype), gathered).astype(out_dtype)

    def backward(_, gradient):
        zeros = jnp.zeros(kind.shape, jnp.float32, out_sharding=kind.sharding)
        (total,) = jax.vjp(lambda w: gather(w, gathered), zeros)[1](gradient.astype(jnp.float32))
        return (total.astype(w_IO.dtype),)

    cast_and_gather.defvjp(lambda w: (cast_and_gather(w), None), backward)
    return cast_and_gather(w_IO)


def all_gather_columns(w_IO: jax.Array, axis: Any, dtype: jnp.dtype, float32: bool) -> jax.Array:
    """All columns of a weight from each device's own, inside `shard_map`.

    Args:
      w_IO: the device's columns.
      axis: mesh axis that shards the columns.
      dtype: of the result.
      float32: sum the gradient over devices in float32 instead of ``dtype``.
    """

    def all_columns(w):  # rows of the transpose, see gather
        w = jax.lax.all_gather(jnp.swapaxes(w, 0, 1), axis, axis=0, tiled=True)
        return jnp.swapaxes(w, 0, 1)

    if not float32:
        return all_columns(w_IO.astype(dtype))

    @jax.custom_vjp
    def cast_and_gather(w):
        return all_columns(w.astype(dtype))

    def backward(_, gradient):
        gradient_OI = jnp.swapaxes(gradient.astype(jnp.float32), 0, 1)
        shard = jax.lax.psum_scatter(gradient_OI, axis, scatter_dimension=0, tiled=True)
        return (jnp.swapaxes(shard, 0, 1).astype(w_IO.dtype),)

    cast_and_gather.defvjp(lambda w: (cast_and_gather(w), None), backward)
    return cast_and_gather(w_IO)


def first_position(T: int) -> jax.Array | int:
    """Index in the whole sequence of the first of a device's T positions, inside `shard_map`."""
    # The constant 0 if T is not sharded: some kernels support only that.
    split = not no_mesh() and is_sharded("context")
    return jax.lax.axis_index("context") * T if split else 0


# Order in which the letters of an activation take mesh axes.
_PRIORITY = "NKQEFVBT"


def _spec(letters: str, rules: dict[str, tuple[str, ...]], **kwargs) -> P:
    taken: set[str] = set()
    axes: dict[str, tuple[str, ...]] = {}
    for letter in sorted(letters, key=lambda x: (_PRIORITY + letters).index(x)):
        axes[letter] = tuple(a for a in rules.get(letter, ()) if a not in taken)
        taken.update(axes[letter])
    return P(*(axes[x] if len(axes[x]) > 1 else (*axes[x], None)[0] for x in letters), **kwargs)


def _rules(tensor: bool, sequence: bool) -> Rules:
    wide = {letter: ("tensor",) for letter in "NKQEFV"} if tensor else {}
    positions = ("context", "tensor") if sequence else ("context",)
    return Rules(
        weights=tuple({"D": ("fsdp",), **wide}.items()),
        activations=tuple({"B": ("data", "fsdp"), "T": positions, **wide}.items()),
    )


PRESETS = {
    "fsdp": _rules(tensor=False, sequence=False),
    "fsdp_tensor": _rules(tensor=True, sequence=False),
    "tensor_sequence": _rules(tensor=True, sequence=True),
}


def make_mesh(
    cfg: MeshConfig, devices: Sequence[jax.Device] | None = None, host_is_slice: bool = False
) -> Mesh:
    """A mesh with the axes :data:`AXES`, of explicit type.

    A *slice* is a group of devices with a fast interconnect: a TPU slice, or GPUs connected by
    NVLink (in most clusters, those of one host). Slices are connected by the slower data-center
    network (DCN). The mesh places them along ``data`` as far as its size allows, and the rest along
    ``fsdp``.

    Args:
      cfg: the sizes; one may be -1, which stands for all remaining devices.
      devices: default: all devices of this job. `slice_index` is the slice of each.
      host_is_slice: take each process's devices as a slice instead; absent devices that programs
        are compiled for all have slice_index 0.

    Raises:
      ConfigError: the product of the sizes is not the number of devices, ``tensor`` or ``context``
        would cross slices, or JAX cannot place the mesh on the chips' topology.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _mesh_sizes(cfg, len(devices))
    ids = slice_ids(devices, host_is_slice)
    members = Counter(ids)
    if len(set(members.values())) > 1:
        raise ConfigError(f"the slices have different numbers of devices: {dict(members)}")
    outer = _slices_along(sizes, len(members)) if len(members) > 1 else dict.fromkeys(AXES, 1)
    inner = tuple(sizes[a] // outer[a] for a in AXES)
    try:
        if len(members) == 1:
            placed = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
        else:
            placed = mesh_utils.create_hybrid_device_mesh(
                inner,
                tuple(outer.values()),
                [_InSlice(d, i) for d, i in zip(devices, ids, strict=True)],
                allow_split_physical_axes=True,
            )
            placed = np.vectorize(lambda d: d.device, otypes=[object])(placed)
    except (AssertionError, NotImplementedError, TypeError, ValueError) as e:
        # jax 0.10 drops prime factors of some sizes (10, 14, 28) and then fails to place them.
        raise ConfigError(
            f"JAX cannot place a mesh of {_text(sizes)} on the topology of these chips; choose "
            "other sizes, such as powers of two"
        ) from e
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def slice_ids(devices: Iterable[Any], host_is_slice: bool = False) -> list[int]:
    """The slice of each device, see :func:`make_mesh`."""
    if host_is_slice:
        return [d.process_index for d in devices]
    return [slice_of_process.get(d.process_index, getattr(d, "slice_index", 0)) for d in devices]


slice_of_process: dict[int, int] = {}
"""The slice of each process of a job on CPUs, whose devices all have slice_index 0 in JAX."""


class _InSlice:
    """A device with the slice of its process, for JAX's placement of a mesh."""

    def __init__(self, device: Any, slice_index: int):
        self.device, self.slice_index = device, slice_index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)


def _mesh_sizes(cfg: MeshConfig, num_devices: int) -> dict[str, int]:
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    requested = _text(sizes)
    if any(n == 0 or n < -1 for n in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ConfigError(
            f"{requested}: sizes must be positive; one may be -1 (all remaining devices)"
        )
    fixed = math.prod(n for n in sizes.values() if n > 0)
    sizes = {a: num_devices // fixed if n == -1 else n for a, n in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise ConfigError(
            f"{requested} does not fit {num_devices} device{'s' * (num_devices > 1)}: "
            f"the product must be {num_devices}"
        )
    if cfg.preset == "fsdp" and sizes["tensor"] > 1:
        raise ConfigError(
            f'mesh.tensor={sizes["tensor"]} has no effect with mesh.preset="fsdp"; '
            'choose "fsdp_tensor" or "tensor_sequence"'
        )
    return sizes


def _slices_along(sizes: dict[str, int], slices: int) -> dict[str, int]:
    """Number of slices along each mesh axis: as many as possible along ``data``."""
    data = math.gcd(sizes["data"], slices)
    rest = slices // data
    if sizes["fsdp"] % rest:
        inside = math.prod(sizes.values()) // slices
        raise ConfigError(
            f"mesh.tensor={sizes['tensor']} x mesh.context={sizes['context']} would cross slices: "
            f"there are {slices} slices of {inside} devices (a TPU slice, or the GPUs of one "
            f"host); choose sizes whose product divides {inside}; data and fsdp may cross slices"
        )
    return {"data": data, "fsdp": rest, "tensor": 1, "context": 1}


def mesh_for(
    recipe: Recipe, devices: Sequence[jax.Device] | None = None, host_is_slice: bool = False
) -> tuple[Recipe, Mesh]:
    """The mesh of a recipe, and the recipe adapted to the devices.

    Where the devices do not divide the model or the batch, a recipe with ``mesh.fsdp=-1`` gets more
    copies of the model (``mesh.data``, a multiple of the recipe's) and fewer microbatches
    (``train.gradient_accumulation``). The batch size per step stays the same, and no device holds
    more rows at a time. :func:`changed_settings` lists the adapted settings.

    Args:
      recipe: what to train.
      devices: as for :func:`make_mesh`.
      host_is_slice: as for :func:`make_mesh`.

    Returns:
      The adapted recipe and the mesh.

    Raises:
      ConfigError: the mesh cannot be made, or does not divide the model and the batch; the message
        has settings that work, if any do.
    """
    devices = jax.devices() if devices is None else devices
    adaptable = False
    try:
        mesh = make_mesh(recipe.mesh, devices, host_is_slice)
        adaptable = recipe.mesh.fsdp == -1
        check_fits(recipe, mesh)
        return recipe, mesh
    except ConfigError as e:
        error = e
    for other in _alternatives(recipe, len(devices)):
        try:
            mesh = make_mesh(other.mesh, devices, host_is_slice)
        except ConfigError:
            continue
        changed = changed_settings(recipe, other)
        if (
            adaptable
            and changed.keys() <= {"mesh.data", "train.gradient_accumulation"}
            and other.mesh.data % recipe.mesh.data == 0
        ):
            return other, mesh
        hint = " ".join(f"{name}={value}" for name, value in changed.items())
        raise ConfigError(f"{error}\nthese settings fit {len(devices)} device(s): {hint}")
    raise ConfigError(
        f"{error}\nno mesh of {len(devices)} device(s) divides this model and batch; change "
        "train.batch_size or the number of devices"
    )


def changed_settings(recipe: Recipe, other: Recipe) -> dict[str, Any]:
    """Mesh settings and ``train.gradient_accumulation`` that differ: name to value in ``other``."""
    names = [f.name for f in dataclasses.fields(MeshConfig)]
    values = {f"mesh.{n}": (getattr(recipe.mesh, n), getattr(other.mesh, n)) for n in names}
    values["train.gradient_accumulation"] = (
        recipe.train.gradient_accumulation,
        other.train.gradient_accumulation,
    )
    return {name: now for name, (was, now) in values.items() if was != now}


def _alternatives(recipe: Recipe, num_devices: int) -> Iterator[Recipe]:
    """Recipes with other mesh sizes and numbers of microbatches, the least changed first."""
    given, train, model = recipe.mesh, recipe.train, recipe.model
    found = []
    for tensor, context in itertools.product(_divisors(num_devices), repeat=2):
        if num_devices % (tensor * context) or model.num_kv_heads % tensor:
            continue
        rows = num_devices // (tensor * context)
        if train.batch_size % rows:
            continue
        # The most microbatches with a whole number of rows per device: they need the least memory.
        accumulation = max(
            n for n in _divisors(train.batch_size // rows) if n <= train.gradient_accumulation
        )
        preset = "tensor_sequence" if tensor > 1 and given.preset == "fsdp" else given.preset
        for data in _divisors(rows):
            sizes = dict(data=data, fsdp=rows // data, tensor=tensor, context=context)
            written = sizes | ({"fsdp": -1} if given.fsdp == -1 else {})
            other = dataclasses.replace(
                recipe,
                mesh=MeshConfig(preset=preset, **written),
                train=dataclasses.replace(train, gradient_accumulation=accumulation),
            )
            if not _undivided(other, sizes):
                changes = [tensor != given.tensor, context != given.context, tensor * context]
                found.append(([*changes, data != given.data, data], other))
    return (other for _, other in sorted(found, key=lambda pair: pair[0]))


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def check_fits(recipe: Recipe, mesh: Mesh) -> None:
    """Raises a :class:`ConfigError` that lists the sizes that the mesh does not divide."""
    if problems := _undivided(recipe, mesh.shape):
        raise ConfigError("the mesh does not divide these sizes:\n  " + "\n  ".join(problems))


def _undivided(recipe: Recipe, mesh: Mapping[str, int]) -> list[str]:
    """One line per size of the recipe that a mesh of these sizes does not divide."""
    rules, model, train = PRESETS[recipe.mesh.preset], recipe.model, recipe.train
    micro = train.batch_size // train.gradient_accumulation
    sizes = {
        "B": (micro, "train.batch_size / train.gradient_accumulation"),
        "T": (recipe.data.seq_len, "data.seq_len"),
        **{x: (model.size(x), f"model.{FIELD_OF_LETTER[x]}") for x in "DNKFV"},
    }
    problems = []
    for rule, letters in ((rules.activation, "B T N K F V"), (rules.weight, "DF")):
        for word in letters.split():
            for letter, axes in zip(word, rule(word), strict=True):
                num_shards = math.prod(mesh[a] for a in _axes(axes))
                size, name = sizes[letter]
                if size % num_shards:
                    shards = " x ".join(_axes(axes))
                    problems.append(
                        f"{name}={size} is not a multiple of {num_shards} ({shards} of the mesh)"
                    )
    return problems


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"mesh.{a}={n}" for a, n in sizes.items())


def _axes(entry) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()
