"""Reading and writing of recipes: TOML files that may extend others, overrides, error messages."""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import tomli_w
from pydantic import TypeAdapter

from llama_jax.config.help import SECTIONS, settings
from llama_jax.config.model_config import MODELS, ModelConfig
from llama_jax.config.recipe import Recipe
from llama_jax.config.values import did_you_mean
from llama_jax.io import read_limited
from llama_jax.storage.errors import redacted

MAX_RECIPE_BYTES = 1 << 20

RENAMED = {
    "optim.clip": "optim.max_grad_norm",
    "checkpoint.every": "checkpoint.save_every",
    "data.holdout": "data.val_fraction",
    "train.accumulate": "train.gradient_accumulation",
}
"""Former names of settings. A recipe with one is refused, and the error gives the new name; only
the recipe that an older version saved in a run folder may have them."""

LENGTHS = ("steps", "epochs")
"""Settings of [train] of which a recipe has one; a later one replaces the other."""

Origins = dict[tuple[str | int, ...], str]
"""The file or override that each setting comes from, for error messages."""


class ConfigError(ValueError):
    """A recipe or override that cannot be used; the message says where and what to do."""


def recipes_folder() -> Path:
    """The folder of the shipped recipes: `configs/` of the repository, or its copy in a wheel."""
    package = Path(__file__).parents[1]
    in_wheel = package / "configs"
    return in_wheel if in_wheel.is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, each of which `load_recipe` accepts in place of a path."""
    of_training = (path.stem for path in recipes_folder().glob("*.toml"))
    return sorted(name for name in of_training if not name.startswith("corpus-"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe, apply ``section.key=value`` overrides, check everything.

    A recipe with ``extends = "other.toml"`` starts from that recipe. Its ``[data.sources]`` replace
    those of the other one; any other setting replaces only itself. ``[model] name = "llama-7b"``
    starts from a row of :data:`MODELS`; other keys of the section replace single fields.

    Args:
      path: a file, or the name of a shipped recipe such as "llama-7b-tpu".
      overrides: ``section.key=value``; the value is TOML or plain text.

    Raises:
      ConfigError: unreadable file, unknown setting (with the nearest known one), wrong type, or
        values that contradict each other; lists all problems of the recipe.
    """
    path = _find(str(path), Path())
    try:
        tree, origins = _read_extended(path)
        _override(tree, origins, overrides)
        return check_recipe(tree, str(path), origins)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None


def load_saved_recipe(path: Path) -> Recipe:
    """The recipe that a run saved in its folder, perhaps with former names of settings.

    Raises :class:`ConfigError` as :func:`load_recipe`.
    """
    tree = _read_toml(path)
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        if isinstance(settings := tree.get(section), dict) and key in settings:
            settings.setdefault(new.partition(".")[2], settings.pop(key))
    return check_recipe(tree, str(path))


def check_recipe(tree: dict[str, Any], where: str, origins: Origins | None = None) -> Recipe:
    """A parsed recipe as a checked :class:`Recipe`.

    Args:
      tree: nested dict of the settings.
      where: name of the file, for error messages.
      origins: files of the settings that come from elsewhere.

    Raises:
      ConfigError: as :func:`load_recipe`.
    """
    tree = dict(tree)
    if isinstance(tree.get("model"), dict):
        tree["model"] = _model_section(tree["model"], where, origins or {})
    return _validate(Recipe, tree, where, origins or {})


def load_settings(
    cls: type[pydantic.BaseModel],
    shipped: Sequence[Path],
    path: Path | None = None,
    overrides: Sequence[str] = (),
    section: str = "",
) -> Any:
    """Settings of another class than :class:`Recipe`, such as those of a corpus.

    Args:
      cls: class of the settings.
      shipped: files of this project that together have every setting.
      path: a file of the user, which may extend another one; it replaces single settings.
      overrides: ``section.key=value``, as for :func:`load_recipe`.
      section: section of ``path`` that has the settings; it may be absent.

    Raises:
      ConfigError: as :func:`load_recipe`.
    """
    tree: dict[str, Any] = {}
    origins: Origins = {}
    try:
        for file in shipped:
            _merge(tree, _read_toml(file), origins, str(file), ())
        if path:
            own, files = _read_extended(path)
            if section:
                own = own.get(section, {})
                if not isinstance(own, dict):
                    raise ConfigError(f"{path}: {section} must be a section, [{section}]")
                files = {key[1:]: file for key, file in files.items() if key[0] == section}
            _merge(tree, own, origins, str(path), ())
            origins |= files
        _override(tree, origins, overrides)
        return _validate(cls, tree, str(path or shipped[-1]), origins, [*_field_names(cls)])
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None


def _field_names(cls: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield prefix + name
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, pydantic.BaseModel):
            yield from _field_names(inner, f"{prefix}{name}.")


def check_model(tree: dict[str, Any], where: str) -> ModelConfig:
    """A nested dict (a checkpoint's ``model.json``) as a checked :class:`ModelConfig`.

    Raises :class:`ConfigError`.
    """
    return _validate(ModelConfig, tree, where, {})


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain values: the inverse of `check_recipe` and `check_model`."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def to_toml(config: Any) -> str:
    """A config as TOML that :func:`load_recipe` reads back; unset optional fields are left out."""
    return tomli_w.dumps(_without_none(to_dict(config)))


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    nested = lambda value: _without_none(value) if isinstance(value, dict) else value
    return {key: nested(value) for key, value in tree.items() if value is not None}


# Files -------------------------------------------------------------------------------------------


def _find(name: str, folder: Path) -> Path:
    """The file ``name``, relative to ``folder``, or the shipped recipe of that name."""
    path = folder / name
    if name in recipe_names() and not path.is_file():
        return recipes_folder() / f"{name}.toml"
    return path


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_limited(path, MAX_RECIPE_BYTES).decode("utf-8"))
    except FileNotFoundError:
        names = recipe_names()
        nearest = difflib.get_close_matches(path.stem, names, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(
            f"recipe {path} does not exist{hint}\nshipped recipes: {', '.join(names)}"
        ) from None
    except RecursionError:
        raise ConfigError(f"recipe {path} cannot be read: nested too deeply") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"recipe {path} cannot be read: {e}") from None


def _read_extended(path: Path, extending: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Origins]:
    """A recipe merged into those it extends, and the file of each setting."""
    tree = _read_toml(path)
    if path.resolve() in extending:
        raise ConfigError(f"{path} extends itself")
    merged: dict[str, Any] = {}
    origins: Origins = {}
    if (base := tree.pop("extends", None)) is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: extends={base!r:.200} is not the path of a recipe")
        try:
            base_path = _find(base, path.parent)
            merged, origins = _read_extended(base_path, (*extending, path.resolve()))
        except ConfigError as e:
            raise ConfigError(f"{path}: extends={base!r:.200}: {e}") from None
    data, base_data = tree.get("data"), merged.get("data")
    if isinstance(data, dict) and "sources" in data and isinstance(base_data, dict):
        base_data.pop("sources", None)
        origins = {key: file for key, file in origins.items() if key[:2] != ("data", "sources")}
    _merge(merged, tree, origins, str(path), ())
    return merged, origins


def _merge(
    into: dict[str, Any], tree: dict[str, Any], origins: Origins, file: str, prefix: tuple[str, ...]
) -> None:
    """Replace settings of ``into`` by those of ``tree``, and record ``file`` as their origin."""
    if prefix == ("train",):
        _drop_alternatives(into, tree)
    for key, value in tree.items():
        origins[*prefix, key] = file
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, origins, file, (*prefix, key))
        else:
            into[key] = value


def _drop_alternatives(train: dict[str, Any], given: dict[str, Any]) -> None:
    """Remove the other one of the settings of :data:`LENGTHS` where one of them is given."""
    if any(name in given for name in LENGTHS):
        for name in LENGTHS:
            train.pop(name, None)


# Overrides ---------------------------------------------------------------------------------------


def _override(tree: dict[str, Any], origins: Origins, overrides: Sequence[str]) -> None:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(
                f"override {override!r} is not of the form section.key=value (see --help)"
            )
        _set(tree, origins, key.strip(), _value(text.strip()))


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text  # plain text, such as a path


def _set(tree: dict[str, Any], origins: Origins, dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    if sections[:1] == ["rope"]:
        sections.insert(0, "model")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {dotted}: {section} is a setting, not a section")
    if sections == ["train"]:
        _drop_alternatives(tree, {key: value})
    tree[key] = value
    setting = (*sections, key)
    replaced = [name for name in origins if name[: len(setting)] == setting]
    origins.update(dict.fromkeys([*replaced, setting], "command line"))


def _model_section(section: dict[str, Any], where: str, origins: Origins) -> dict[str, Any]:
    """The section with the fields of the row of :data:`MODELS` that it names."""
    section = dict(section)
    if (name := section.pop("name", None)) is None:
        return section
    if not isinstance(name, str) or name not in MODELS:
        where = _origin(("model", "name"), where, origins)
        raise ConfigError(
            f"{where}: model.name={name!r} is not a known model{_nearest(str(name), list(MODELS))}"
        )
    base = to_dict(MODELS[name])
    rope = section.pop("rope", {})
    if not isinstance(rope, dict):
        where = _origin(("model", "rope"), where, origins)
        raise ConfigError(f"{where}: model.rope must be a section, [model.rope], not {rope!r}")
    keep = base["rope"]
    if rope.get("type", keep["type"]) != keep["type"]:
        keep = {"theta": keep["theta"]}  # the other fields belong to the other type
    return base | section | {"rope": keep | rope}


# Checks and messages -----------------------------------------------------------------------------


def _validate(
    cls: Any,
    tree: dict[str, Any],
    where: str,
    origins: Origins,
    known: Sequence[str] = (),
) -> Any:
    try:
        for text in strings_of(tree):
            text.encode()
        # In strict mode pydantic accepts nested dicts and lists only from JSON.
        return TypeAdapter(cls).validate_json(json.dumps(tree, default=str))
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    except UnicodeEncodeError as e:
        raise ConfigError(
            f"{where}: {e.object!r:.200} is not valid Unicode; settings are UTF-8 text"
        ) from None
    except pydantic.ValidationError as e:
        errors = e.errors()
    known = list(known) or [*(s.name for s in settings()), *SECTIONS, "extends"]
    if cls is ModelConfig:
        known = [name.removeprefix("model.") for name in known if name.startswith("model.")]
    lines = [f"{_origin(e['loc'], where, origins)}: {_explain(e, known)}" for e in errors[:20]]
    if len(errors) > 20:
        lines.append(f"{where}: and {len(errors) - 20:,} more problems")
    raise ConfigError("\n".join(lines)) from None


def _origin(setting: tuple[str | int, ...], where: str, origins: Origins) -> str:
    """The file that gave a setting, or the innermost section around it that some file has."""
    around = (setting[:n] for n in range(len(setting), 0, -1))
    return next((origins[key] for key in around if key in origins), where)


def strings_of(tree: Any) -> Iterator[str]:
    """Every string of a nested value, keys included."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            todo += [*node, *node.values()]
        elif isinstance(node, list | tuple):
            todo += node


def _explain(error: Any, known: list[str]) -> str:
    name = ".".join(map(str, error["loc"]))[:100]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if name in RENAMED:
            return f"unknown setting {name}: it is now called {RENAMED[name]}"
        if name == "extends":
            return "extends is a setting of a file: write a recipe that has it"
        return f"unknown setting {name}{_nearest(name, known)}"
    if error["type"] in ("missing", "missing_argument"):
        hint = ' (or give model.name, for example "tiny")' if name.startswith("model") else ""
        return f"setting {name} is missing{hint}"
    given = error["input"] if not isinstance(error["input"], dict) else "a table"
    if isinstance(given, str) and "://" in given:
        given = redacted(given)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        if given != "a table":
            return f"{name}={given!r:.200}: {message}"
        return message if not name or message.startswith(f"{name}.") else f"{name}: {message}"
    hint = ', such as [1, 2] or ["a", "b"]' if error["type"] == "tuple_type" else ""
    if error["type"] == "literal_error":
        allowed = re.findall("'([^']*)'", error["ctx"]["expected"])
        hint = did_you_mean(str(given), allowed)
    return f"{name}={given!r:.200}: {message[0].lower() + message[1:]}{hint}"


def _nearest(name: str, known: list[str]) -> str:
    if hint := did_you_mean(name, known):
        return hint
    # The right key in the wrong section.
    same = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]
    return f"; did you mean {same[0]}?" if same else f"; known: {', '.join(known[:40])}"
