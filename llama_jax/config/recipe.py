"""Every setting of a run, with its meaning, type and default.

In comes a recipe (a TOML file) and ``section.key=value`` overrides; out comes a frozen, checked
:class:`Recipe`. The settings of the model, and the table :data:`MODELS` of published LLaMA models
and a few tiny ones, are those of :mod:`llama_jax.config.model_config`.

    python -m llama_jax.train --help
"""

import dataclasses
import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import pydantic
import tomli_w
from pydantic import AfterValidator, Field, TypeAdapter

from llama_jax.config.model_config import MODELS, ModelConfig, Positive, checked
from llama_jax.config.model_config import RopeConfig as RopeConfig
from llama_jax.io import read_limited

NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# JAX's random keys are made of 32 bits; a larger seed would be cut to them.
Seed = Annotated[int, Field(ge=0, lt=2**32)]

MAX_RECIPE_BYTES = 1 << 20

MAX_STEP_TOKENS = 2**28
"""Tokens of one optimizer step at most; the largest published batches have 16 million."""


def _local_path(path: str) -> str:
    if "://" in path:
        raise ValueError(
            "URLs are not supported; give a path of this machine, or of a file system that is "
            "mounted on every host"
        )
    if "\0" in path:
        raise ValueError("a path cannot contain a NUL character")
    return path


def _required_path(path: str) -> str:
    if not path.strip():
        raise ValueError("it is empty; give a path")
    return _local_path(path)


LocalPath = Annotated[str, AfterValidator(_local_path)]
RequiredPath = Annotated[str, AfterValidator(_required_path)]


def _steps_range(bounds: tuple[int, int]) -> tuple[int, int]:
    first, last = bounds
    if not 1 <= first <= last:
        raise ValueError("give [first, last], counted from 1, first at most last")
    return bounds


StepRange = Annotated[tuple[int, int], AfterValidator(_steps_range)]


@checked
class SourceConfig:
    """One text source of the mixture."""

    path: RequiredPath
    """raw text (folder, .txt, .jsonl[.gz|.zst], .parquet), a folder made by
    `python -m llama_jax.prepare`, or the embedded `python:code` / `python:prose` (the standard
    library of the running Python)"""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """share of the training tokens, relative to the other sources"""


@checked
class DataConfig:
    """Text to batches."""

    sources: dict[str, SourceConfig]
    """the mixture, one table a source: [data.sources.NAME] with path and weight"""
    tokenizer: LocalPath = ""
    """its file: SentencePiece, tokenizer.json or tiktoken; empty: that of train.init_from, or else
    train one of model.vocab_size pieces on the sources, as LLaMA's was"""
    seq_len: Positive
    """T, tokens a training sequence"""
    packing: Literal["concat", "segments"] = "concat"
    """concat: documents back to back, attention sees across them (as LLaMA); segments: attention
    stays inside a document and positions restart with it"""
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """share of the documents kept out of training, for evaluation (prepared folders have their
    own)"""
    seed: Seed = 0
    """order of the sequences"""
    skip_batches: tuple[StepRange, ...] = ()
    """batches left out of training, [[first, last], ...], counted from 1 in the order of the data;
    for batches on which the loss stops being finite"""
    prepared: LocalPath = ""
    """where token shards of raw sources are kept; empty: `data` inside the run folder"""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """threads that tokenise; 0: one a core"""
    skip_bad_lines: bool = False
    """leave out lines that cannot be used (no JSON, no text) and count them; false: an error"""

    def __post_init__(self):
        if not self.sources:
            raise ValueError(
                "data.sources is empty; give at least one text source, as "
                "data.sources.NAME.path=PATH (or [data.sources.NAME] in the recipe)"
            )
        names: dict[str, str] = {}
        for name, source in self.sources.items():
            path = source.path
            key = path if path.startswith("python:") else os.path.realpath(path)
            if key in names:
                raise ValueError(
                    f"data.sources.{name}.path={path!r} is the text of data.sources.{names[key]} "
                    "too; name it once, with the sum of the weights"
                )
            names[key] = name


@checked
class MeshConfig:
    """How arrays are laid out over devices."""

    preset: Literal["fsdp", "fsdp_tensor", "tensor_sequence"] = "fsdp"
    """sharding rules: fsdp (weights over fsdp), fsdp_tensor (heads and widths over tensor as well),
    tensor_sequence (and the residual stream over T between the matrix products, as the paper)"""
    data: int = 1
    """devices along `data`: whole copies of the model"""
    fsdp: int = -1
    """devices along `fsdp`: weights sharded, gathered when used; -1: all the devices that are
    left"""
    tensor: int = 1
    """devices along `tensor`: heads and feed-forward width"""
    context: int = 1
    """devices along `context`: sequence positions"""


@checked
class OptimConfig:
    """AdamW and its schedule; the defaults are the paper's (section 2.2)."""

    peak_lr: Annotated[float, Field(gt=0)] = 3e-4
    """peak learning rate"""
    warmup_steps: NonNegative = 2000
    """linear warm-up from zero, steps"""
    final_fraction: Fraction = 0.1
    """the cosine ends at this fraction of the peak"""
    b1: Beta = 0.9
    """AdamW beta 1"""
    b2: Beta = 0.95
    """AdamW beta 2"""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW epsilon (the paper states none)"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """decoupled weight decay"""
    decay: Literal["matrices", "all"] = "matrices"
    """which weights decay: matrices (not the norms), or all"""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """largest global gradient norm; 0: no clipping"""


@checked
class TrainConfig:
    """The loop."""

    steps: Positive
    """optimizer steps"""
    batch_size: Positive
    """B, sequences a step over all devices and accumulation steps"""
    gradient_accumulation: Positive = 1
    """split each batch into this many parts, one after the other"""
    seed: Seed = 0
    """initial weights"""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """standard deviation of the initial matrices; the two that write to the residual stream get
    init_std / sqrt(2 L)"""
    init_from: LocalPath = ""
    """checkpoint whose weights, tokenizer and chat template to start from (fine-tuning); empty:
    random weights"""
    allow_other_tokenizer: bool = False
    """allow a data.tokenizer that is not the one of train.init_from, whose ids then change their
    meaning"""
    restart_from: NonNegative = 0
    """go back to this earlier checkpoint, once: newer ones are moved to `set-aside-N` in the run
    folder; 0: continue from the newest"""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of activations and products; auto: bfloat16 on TPU and GPU, float32 on CPU; weights are
    float32"""
    reduce_dtype: Literal["compute", "float32"] = "compute"
    """dtype in which the gradient of a weight is summed over devices: compute (that of the
    products), or float32, for twice the bytes of these sums"""
    remat: Literal["none", "matmuls", "full"] = "none"
    """what the backward pass recomputes: nothing, all but the outputs of matrix products (as the
    paper), everything"""
    unroll: bool = False
    """layers one after the other instead of a scan: faster steps on a CPU, slower compilation"""
    loss_chunk: NonNegative = 0
    """tokens whose logits exist at once, a device; 0: all"""
    attention: str = ""
    """implementation of pallas_kernels.rotary_attention; empty: the best for the platform"""
    log_every: Positive = 10
    """steps between log lines"""
    eval_every: NonNegative = 0
    """steps between evaluations on held-out text; 0: at the end only"""
    eval_batches: Positive = 16
    """held-out batches an evaluation reads at most, a source"""
    profile_steps: StepRange | None = None
    """[first, last] steps to trace for the profiler (TensorBoard, Perfetto)"""
    sample_prompts: tuple[str, ...] = ()
    """prompts continued at the end of the run"""


@checked
class CheckpointConfig:
    """What is kept."""

    dir: RequiredPath
    """run folder: checkpoints, recipe, metrics, pictures"""
    save_every: Positive = 1000
    """steps between checkpoints"""
    keep: Positive = 2
    """newest checkpoints kept"""


@checked
class Recipe:
    """Everything that makes a run."""

    model: ModelConfig
    data: DataConfig
    mesh: MeshConfig = MeshConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig

    def __post_init__(self):
        if self.train.batch_size % self.train.gradient_accumulation:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} must be a multiple of "
                f"train.gradient_accumulation={self.train.gradient_accumulation}"
            )
        tokens = self.train.batch_size * self.data.seq_len
        if tokens > MAX_STEP_TOKENS:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} x data.seq_len={self.data.seq_len} are "
                f"{tokens:,} tokens a step; at most {MAX_STEP_TOKENS:,} are possible"
            )
        if self.data.seq_len > self.model.context:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} is longer than "
                f"model.context={self.model.context}; set model.context to at least data.seq_len"
            )
        skipped = sum(last - first + 1 for first, last in self.data.skip_batches)
        if skipped > self.train.steps:
            raise ValueError(
                f"data.skip_batches leaves out {skipped:,} batches, more than the "
                f"{self.train.steps:,} of train.steps; give the batches to leave out alone"
            )


RENAMED = {
    "optim.clip": "optim.max_grad_norm",
    "checkpoint.every": "checkpoint.save_every",
    "data.holdout": "data.val_fraction",
    "train.accumulate": "train.gradient_accumulation",
}
"""Former names of settings. A recipe that has one is refused with the new name; the recipe that an
older version saved in its run folder is read."""


class ConfigError(ValueError):
    """A recipe or override that cannot be used; the message says where and what to do."""


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a TOML recipe, apply ``section.key=value`` overrides, check everything.

    The value of an override is TOML, or plain text. ``[model] name = "llama-7b"`` starts from a row
    of :data:`MODELS`; other keys of the section replace single fields.

    Raises:
      ConfigError: unreadable file, unknown setting (with the nearest known one), wrong type, or
        values that do not fit; all problems of the recipe at once.
    """
    tree = _read_toml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(
                f"override {override!r} is not of the form section.key=value (see --help)"
            )
        _set(tree, key.strip(), _value(text.strip()))
    return check_recipe(tree, where=str(path))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_limited(path, MAX_RECIPE_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist; recipes are in configs/") from None
    except RecursionError:
        raise ConfigError(f"recipe {path} cannot be read: nested too deeply") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"recipe {path} cannot be read: {e}") from None


def load_saved_recipe(path: Path) -> Recipe:
    """The recipe that a run saved in its folder, perhaps with former names of settings.

    Raises :class:`ConfigError` as :func:`load_recipe`.
    """
    tree = _read_toml(path)
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        if isinstance(settings := tree.get(section), dict) and key in settings:
            settings.setdefault(new.partition(".")[2], settings.pop(key))
    return check_recipe(tree, where=str(path))


def check_recipe(tree: dict[str, Any], where: str) -> Recipe:
    """A nested dict (a parsed recipe) as a checked :class:`Recipe`.

    Raises :class:`ConfigError` as :func:`load_recipe`.
    """
    tree = dict(tree)
    if isinstance(tree.get("model"), dict):
        tree["model"] = _model_section(tree["model"], where)
    return _validate(Recipe, tree, where)


def check_model(tree: dict[str, Any], where: str) -> ModelConfig:
    """A nested dict (a checkpoint's ``model.json``) as a checked :class:`ModelConfig`.

    Raises :class:`ConfigError`.
    """
    return _validate(ModelConfig, tree, where)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain values: the inverse of `check_recipe` and `check_model`."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def to_toml(config: Any) -> str:
    """A config as TOML that :func:`load_recipe` reads back; unset optional fields are left out."""
    return tomli_w.dumps(_without_none(to_dict(config)))


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    unset = lambda value: _without_none(value) if isinstance(value, dict) else value
    return {key: unset(value) for key, value in tree.items() if value is not None}


class Setting(NamedTuple):
    """One line of ``--help``."""

    name: str
    type: str
    default: str
    meaning: str


def settings(cls: Any = Recipe, prefix: str = "") -> list[Setting]:
    """Every setting with its type, default and meaning, in the order of the file."""
    out = []
    if cls is ModelConfig:
        meaning = "start from a row of the table of models: " + ", ".join(MODELS)
        out.append(Setting(f"{prefix}name", "str", "none", meaning))
    for name, field in cls.__pydantic_fields__.items():
        if dataclasses.is_dataclass(field.annotation):
            out += settings(field.annotation, f"{prefix}{name}.")
        elif name == "sources":
            out += settings(SourceConfig, f"{prefix}sources.NAME.")
        else:
            default = "from model.name" if cls is ModelConfig else "required"
            if not field.is_required():
                default = "none" if field.default is None else json.dumps(field.default)
            meaning = field.description.replace("\n", " ")
            out.append(Setting(prefix + name, _type_name(field.annotation), default, meaning))
    return out


def _type_name(annotation: Any) -> str:
    if annotation in (int, float, str, bool):
        return annotation.__name__
    args = [a for a in get_args(annotation) if a is not type(None)]
    if all(isinstance(a, str) for a in args):
        return "|".join(args)
    if getattr(annotation, "__origin__", None) is tuple:
        return "[" + ", ".join("..." if a is ... else _type_name(a) for a in args) + "]"
    return _type_name(args[0])


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text  # a bare word or path


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    if sections[:1] == ["rope"]:
        sections.insert(0, "model")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {dotted}: {section} is a setting, not a section")
    tree[key] = value


def _model_section(section: dict[str, Any], where: str) -> dict[str, Any]:
    section = dict(section)
    if (name := section.pop("name", None)) is None:
        return section
    if not isinstance(name, str) or name not in MODELS:
        raise ConfigError(
            f"{where}: model.name={name!r} is not a known model{_nearest(str(name), list(MODELS))}"
        )
    base = to_dict(MODELS[name])
    rope = section.pop("rope", {})
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: model.rope must be a section, [model.rope], not {rope!r}")
    keep = base["rope"]
    if rope.get("type", keep["type"]) != keep["type"]:
        keep = {"theta": keep["theta"]}  # another type starts from its own fields
    return base | section | {"rope": keep | rope}


def _validate(cls: Any, tree: dict[str, Any], where: str) -> Any:
    try:
        for text in _strings(tree):
            text.encode()
        # Through JSON: there, pydantic's strict mode takes nested dicts and lists, and nothing but
        # the right types.
        return TypeAdapter(cls).validate_json(json.dumps(tree, default=str))
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    except UnicodeEncodeError as e:
        raise ConfigError(
            f"{where}: {e.object!r:.200} is not valid Unicode; settings are UTF-8 text"
        ) from None
    except pydantic.ValidationError as e:
        errors = e.errors()
    known = [s.name for s in settings(cls)]
    known += sorted({name.rpartition(".")[0] for name in known} - {""})
    lines = [f"{where}: {_explain(error, known)}" for error in errors[:20]]
    if len(errors) > 20:
        lines.append(f"{where}: and {len(errors) - 20:,} more problems")
    raise ConfigError("\n".join(lines)) from None


def _strings(tree: Any) -> Iterator[str]:
    """Every string of a nested value, keys included."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        inside: Iterable[Any] = [*tree, *tree.values()] if isinstance(tree, dict) else tree
        for value in inside:
            yield from _strings(value)


def _explain(error: Any, known: list[str]) -> str:
    name = ".".join(map(str, error["loc"]))[:100]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if name in RENAMED:
            return f"unknown setting {name}: it is now called {RENAMED[name]}"
        return f"unknown setting {name}{_nearest(name, known)}"
    if error["type"] in ("missing", "missing_argument"):
        hint = ' (or give model.name, for example "tiny")' if name.startswith("model") else ""
        return f"setting {name} is missing{hint}"
    given = error["input"] if not isinstance(error["input"], dict) else "a table"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        if given != "a table":
            return f"{name}={given!r:.200}: {message}"
        return message if not name or message.startswith(f"{name}.") else f"{name}: {message}"
    return f"{name}={given!r:.200}: {message[0].lower() + message[1:]}"


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # the right key in the wrong section
        close = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known[:40])}"
