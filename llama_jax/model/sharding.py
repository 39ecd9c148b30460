"""Where arrays live: the mesh, and the one table from letters to mesh axes.

A *sharding rule* maps a letter of a shape (D, N, F, ...) to mesh axes. A weight's sharding is
``rules.weight("DF")``, an activation's ``rules.act("BTNH")``; nothing else in the project names a
mesh axis. The axes:

  data     whole copies of the model; only gradients cross it
  fsdp     weights and optimizer sharded, each layer gathered when it is used
  tensor   heads, feed-forward width and vocabulary split
  context  sequence positions split

The mesh has explicit axis types: a sharding is part of an array's type, and an ambiguous product is
an error.
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
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from llama_jax.config import ConfigError, MeshConfig, Recipe

AXES = ("data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Letters to mesh axes, for weights and for activations."""

    weights: tuple[tuple[str, tuple[str, ...]], ...]
    acts: tuple[tuple[str, tuple[str, ...]], ...]

    def weight(self, letters: str) -> P:
        """Sharding of a stored weight. A vector (a norm's scale) is small: all devices have all."""
        return _spec(letters, dict(self.weights)) if len(letters.lstrip("L")) > 1 else P()

    def weight_without_fsdp(self, letters: str, tokens: Iterable[Any]) -> P:
        """Sharding of a weight while it is used: whole over ``fsdp``.

        ``tokens`` are the axes that split the tokens it is used on. Its gradient arrives as one
        partial sum for each of them (``reduced``), summed into the stored shards by
        :func:`gather`.
        """
        rules = {k: tuple(a for a in axes if a != "fsdp") for k, axes in self.weights}
        return _spec(letters, rules, reduced=frozenset(a for entry in tokens for a in _axes(entry)))

    def activation(self, letters: str) -> P:
        """Sharding of an activation.

        An axis serves one letter: widths take ``tensor`` before positions do.
        """
        return _spec(letters, dict(self.acts))

    def activation_without_tensor(self, letters: str) -> P:
        """Sharding of an activation that meets a weight split over ``tensor``: whole over it."""
        rules = {k: tuple(a for a in axes if a != "tensor") for k, axes in self.acts}
        return _spec(letters, rules)


def num_shards(axes: tuple[str, ...] | str | None) -> int:
    """Into how many parts an entry of a spec divides its axis on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[a] for a in _axes(axes))


def is_sharded(axes: tuple[str, ...] | str | None) -> bool:
    """Whether an entry of a spec divides its axis on the mesh that is set."""
    return num_shards(axes) > 1


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which arrays lie on ``mesh``; for None, one that changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def no_mesh() -> bool:
    """True where no mesh is set: a notebook on one device, where arrays carry no sharding."""
    return jax.sharding.get_abstract_mesh().empty


def reshard(x: jax.Array, spec: P) -> jax.Array:
    """`jax.sharding.reshard` where a mesh is set."""
    return x if no_mesh() else jax.sharding.reshard(x, spec)


def gather(w_IO: jax.Array, whole: P) -> jax.Array:
    """A stored weight of two axes, whole over ``fsdp`` as :meth:`Rules.gathered` says.

    Written for its gradient, which takes the same steps back: summed over ``fsdp`` straight into
    shards, and only these summed over the axes that hold copies (``data``, ``context``). In one
    step the partitioner sums the whole matrix over all of them. The shards are rows, of the
    transpose where need be: XLA for TPU makes a reduce-scatter of a sum cut into rows, not into
    columns.
    """
    stored = jax.typeof(w_IO).sharding.spec
    turn = "fsdp" in _axes(stored[1])
    w = jnp.swapaxes(w_IO, 0, 1) if turn else w_IO
    order = slice(None, None, -1) if turn else slice(None)
    w = reshard(w, P(*stored[order], reduced=whole.reduced - {"fsdp"}))
    w = reshard(w, P(*whole.partitions[order], reduced=whole.reduced))
    return jnp.swapaxes(w, 0, 1) if turn else w


def gather_float32_gradient(w_IO: jax.Array, whole: P, dtype: jnp.dtype) -> jax.Array:
    """``gather(w_IO.astype(dtype), whole)`` for a float32 weight, whose gradient is converted to
    float32 before it is summed over devices."""
    kind = jax.typeof(w_IO)

    @jax.custom_vjp
    def cast_and_gather(w):
        return gather(w.astype(dtype), whole)

    def backward(_, gradient):
        zeros = jnp.zeros(kind.shape, jnp.float32, out_sharding=kind.sharding)
        return jax.vjp(lambda w: gather(w, whole), zeros)[1](gradient.astype(jnp.float32))

    cast_and_gather.defvjp(lambda w: (cast_and_gather(w), None), backward)
    return cast_and_gather(w_IO)


def all_gather_columns(w_IO: jax.Array, axis: Any, dtype: jnp.dtype, float32: bool) -> jax.Array:
    """A device's columns of a float32 weight to all columns in ``dtype``, inside `shard_map`.

    Args:
      axis: mesh axis that splits the columns.
      float32: the gradient is summed over devices in float32, and not in ``dtype``.
    """

    def all_columns(w):  # as rows of the transpose, see gather
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
        return (jnp.swapaxes(shard, 0, 1),)

    cast_and_gather.defvjp(lambda w: (cast_and_gather(w), None), backward)
    return cast_and_gather(w_IO)


def first_position(T: int) -> jax.Array | int:
    """Where a device's own T positions start in the whole sequence, inside `shard_map`."""
    # The number 0 where nothing is split: some kernels can only do that.
    split = not no_mesh() and is_sharded("context")
    return jax.lax.axis_index("context") * T if split else 0


# Letters of an activation in the order in which they claim a mesh axis.
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
        acts=tuple({"B": ("data", "fsdp"), "T": positions, **wide}.items()),
    )


PRESETS = {
    "fsdp": _rules(tensor=False, sequence=False),
    "fsdp_tensor": _rules(tensor=True, sequence=False),
    "tensor_sequence": _rules(tensor=True, sequence=True),
}


def make_mesh(
    cfg: MeshConfig, devices: Sequence[jax.Device] | None = None, host_is_slice: bool = False
) -> Mesh:
    """The mesh of ``cfg``: axes :data:`AXES`, explicit.

    Devices of one *slice* have fast links: the chips of a TPU slice, GPUs joined by NVLink (of one
    host, in most clusters). Several slices are joined by the slower data-center network. They lie
    along ``data`` as far as its size allows, the rest along ``fsdp``.

    Args:
      cfg: the sizes; one may be -1, all devices that are left.
      devices: default: all of this job's. Their `slice_index` says which slice each belongs to.
      host_is_slice: the devices of each process are a slice, whatever their `slice_index` says (for
        devices compiled for and not present, which all have 0).

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, would place ``tensor`` or
        ``context`` across slices, or cannot be placed on the chips' grid.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _mesh_sizes(cfg, len(devices))
    members = Counter(slice_ids(devices, host_is_slice))
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
                devices,
                process_is_granule=host_is_slice,
                allow_split_physical_axes=True,
            )
    except (AssertionError, NotImplementedError, TypeError, ValueError) as e:
        # jax 0.10 drops prime factors of some sizes (10, 14, 28), so it finds no place for them.
        raise ConfigError(
            f"JAX cannot place a mesh of {_text(sizes)} on the grid of these chips; take other "
            "sizes, such as powers of two"
        ) from e
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def slice_ids(devices: Iterable[Any], host_is_slice: bool = False) -> list[int]:
    """Which slice each device belongs to; see :func:`make_mesh`."""
    if host_is_slice:
        return [d.process_index for d in devices]
    return [getattr(d, "slice_index", 0) for d in devices]


def _mesh_sizes(cfg: MeshConfig, num_devices: int) -> dict[str, int]:
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    asked = _text(sizes)
    if any(n == 0 or n < -1 for n in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ConfigError(
            f"{asked}: sizes are positive, and at most one may be -1 (all that is left)"
        )
    fixed = math.prod(n for n in sizes.values() if n > 0)
    sizes = {a: num_devices // fixed if n == -1 else n for a, n in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise ConfigError(
            f"{asked} does not fit {num_devices} device{'s' * (num_devices > 1)}: "
            f"the product must be {num_devices}"
        )
    if cfg.preset == "fsdp" and sizes["tensor"] > 1:
        raise ConfigError(
            f'mesh.tensor={sizes["tensor"]} has no use under mesh.preset="fsdp"; '
            'take "fsdp_tensor" or "tensor_sequence"'
        )
    return sizes


def _slices_along(sizes: dict[str, int], slices: int) -> dict[str, int]:
    """How many slices lie along each axis of the mesh: as many as possible along ``data``."""
    data = math.gcd(sizes["data"], slices)
    rest = slices // data
    if sizes["fsdp"] % rest:
        inside = math.prod(sizes.values()) // slices
        raise ConfigError(
            f"mesh.tensor={sizes['tensor']} x mesh.context={sizes['context']} would lie across "
            f"slices: there are {slices} slices of {inside} devices (a slice: a TPU slice, or the "
            "GPUs of one host); take sizes whose product divides "
            f"{inside}; data and fsdp may cross slices"
        )
    return {"data": data, "fsdp": rest, "tensor": 1, "context": 1}


def mesh_for(
    recipe: Recipe, devices: Sequence[jax.Device] | None = None, host_is_slice: bool = False
) -> tuple[Recipe, Mesh]:
    """The mesh of a recipe on these devices, and the recipe with what was adapted to them.

    On more devices than the model or the batch divides, a recipe that leaves ``mesh.fsdp`` open
    (-1) gets more copies of the model (``mesh.data``, a multiple of the recipe's) and fewer
    microbatches (``train.gradient_accumulation``). The batch size per step stays the same, and no
    device holds more of its rows at once. :func:`changed_settings` says what was adapted.

    Args:
      recipe: what to train.
      devices: as for :func:`make_mesh`.
      host_is_slice: as for :func:`make_mesh`.

    Raises:
      ConfigError: the mesh cannot be built, or does not divide the run; with settings that work,
        where there are any.
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
    """The recipe with other mesh sizes and parts that divide the run, least changed first."""
    given, train, model = recipe.mesh, recipe.train, recipe.model
    found = []
    for tensor, context in itertools.product(_divisors(num_devices), repeat=2):
        if num_devices % (tensor * context) or model.num_kv_heads % tensor:
            continue
        rows = num_devices // (tensor * context)
        if train.batch_size % rows:
            continue
        # Of the parts that leave each device a whole number of rows, the most: least memory.
        parts = [n for n in _divisors(train.batch_size // rows) if n <= train.gradient_accumulation]
        preset = "tensor_sequence" if tensor > 1 and given.preset == "fsdp" else given.preset
        for data in _divisors(rows):
            sizes = dict(data=data, fsdp=rows // data, tensor=tensor, context=context)
            written = sizes | ({"fsdp": -1} if given.fsdp == -1 else {})
            other = dataclasses.replace(
                recipe,
                mesh=MeshConfig(preset=preset, **written),
                train=dataclasses.replace(train, gradient_accumulation=parts[-1]),
            )
            if not _undivided(other, sizes):
                changes = [tensor != given.tensor, context != given.context, tensor * context]
                found.append(([*changes, data != given.data, data], other))
    return (other for _, other in sorted(found, key=lambda pair: pair[0]))


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def check_fits(recipe: Recipe, mesh: Mesh) -> None:
    """Raise a :class:`ConfigError` that lists each size of the recipe the mesh does not divide."""
    if problems := _undivided(recipe, mesh.shape):
        raise ConfigError("the mesh does not divide the run:\n  " + "\n  ".join(problems))


def _undivided(recipe: Recipe, mesh: Mapping[str, int]) -> list[str]:
    """A line for each size of the recipe that a mesh of these sizes does not divide."""
    rules, model, train = PRESETS[recipe.mesh.preset], recipe.model, recipe.train
    micro = train.batch_size // train.gradient_accumulation
    sizes = {
        "B": (micro, "train.batch_size / train.gradient_accumulation"),
        "T": (recipe.data.seq_len, "data.seq_len"),
        **{x: (model.size(x), name) for x, name in _MODEL_SETTINGS.items()},
    }
    problems = []
    for rule, letters in ((rules.activation, "B T N K F V"), (rules.weight, "DF")):
        for word in letters.split():
            for letter, axes in zip(word, rule(word), strict=True):
                num_shards = math.prod(mesh[a] for a in _axes(axes))
                size, name = sizes[letter]
                if size % num_shards:
                    split = " x ".join(_axes(axes))
                    problems.append(
                        f"{name}={size} is not a multiple of {num_shards} ({split} of the mesh)"
                    )
    return problems


_MODEL_SETTINGS = dict(
    D="model.dim",
    N="model.num_heads",
    K="model.num_kv_heads",
    F="model.ffn_dim",
    V="model.vocab_size",
)


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"mesh.{a}={n}" for a, n in sizes.items())


def _axes(entry) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()
