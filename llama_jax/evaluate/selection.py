"""Tasks by name: this package's, those of the harness, and YAML files; with local data."""

import contextlib
import difflib
import functools
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from llama_jax.evaluate.local_data import FILES_READ, MissingData, check_data_folder, read_records
from llama_jax.evaluate.paper_task import TaskOptions
from llama_jax.evaluate.task_sets import TASKS, task_sets

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Suffixes of local data for tasks of the harness, and the readers of ``datasets``."""
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


class Selection(NamedTuple):
    """Tasks that are ready to run."""

    loaded: dict[str, Any]
    """what ``lm_eval.tasks.TaskManager.load`` returns"""
    missing: dict[str, str]
    """tasks of a set that cannot run, and what they need, such as data"""
    files: list[Path]
    """local files that were read"""

    @property
    def table_names(self) -> set[str]:
        """Tables of the paper that the tasks belong to."""
        return {TASKS[name].table for name in self.loaded["tasks"] if name in TASKS}


def select_tasks(names: Sequence[str], options: TaskOptions) -> Selection:
    """Find tasks and load their data.

    Args:
      names: of tasks and sets of this package, of tasks, groups and tags of the harness, or paths
        of YAML files.
      options: of the command. A task of the harness reads DIR/TASK/SPLIT.jsonl (or .json, .csv,
        .parquet) of the data folder DIR if there are such files, in place of the hub.

    Raises:
      MissingData: a task that was named itself cannot run, or no task of a set can.
      ValueError: an unknown name (the message has the nearest names), or a task that cannot be
        used.
    """
    if not names:
        raise ValueError(f"no tasks were named; the sets are {', '.join(task_sets())}")
    FILES_READ.clear()
    sets = task_sets()
    from_sets = {task for name in names for task in sets.get(name, ())}
    ours = dict.fromkeys(task for name in names for task in sets.get(name, [name]) if task in TASKS)
    others = list(dict.fromkeys(n for n in names if n not in sets and n not in TASKS))
    harness = _Harness(options.data, others) if others else None
    built: list[Any] = []
    missing: dict[str, str] = {}
    for name in ours:
        try:
            built.append(TASKS[name].make(options))
        except MissingData as e:
            if name in names or name not in from_sets:
                raise MissingData(f"{name}: {e}") from None
            missing[name] = str(e)
    if missing and not built and not others:
        raise MissingData(
            f"no task of {', '.join(names)} can run; the first, {next(iter(missing))}: "
            f"{next(iter(missing.values()))}"
        )
    manager = harness.manager if harness else _task_manager((), False)
    loaded = dict(manager.load([*built, *(harness.names if harness else [])]))
    if unsafe := [n for n, t in loaded["tasks"].items() if getattr(t, "UNSAFE_CODE", False)]:
        raise _unsafe(unsafe[0])
    files = [*FILES_READ, *(harness.files if harness else [])]
    return Selection(loaded, missing, sorted(dict.fromkeys(files)))


@functools.lru_cache(maxsize=4)
def _task_manager(folders: tuple[Path, ...], include_defaults: bool) -> Any:
    """The tasks of YAML files; reading the thousands of the harness takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders) or None, include_defaults=include_defaults)


class _Harness:
    """The harness's task manager, whose tasks read local files where there are any."""

    def __init__(self, data: Path | None, names: list[str]):
        from lm_eval.tasks._factory import TaskFactory
        from lm_eval.tasks._index import Kind, TaskIndex

        if data is not None:
            check_data_folder(data)
        self.files: list[Path] = []
        paths = [Path(n) for n in names if Path(n).suffix in (".yaml", ".yml")]
        if absent := [path for path in paths if not path.is_file()]:
            raise ValueError(f"the task file {absent[0]} does not exist")
        for path in paths:
            with _task_errors(str(path), {}, data):
                if TaskIndex.entry_from_path(path) is None:
                    raise ValueError("it has no name")
        # A group in a file may name tasks of files beside it, and tasks of the harness.
        folders = tuple(dict.fromkeys(path.resolve().parent for path in paths))
        groups = any("group:" in path.read_text(errors="replace") for path in paths)
        self.manager = _task_manager(folders, groups or len(paths) < len(names))
        known = [*self.manager.all_tasks, *TASKS, *task_sets()]
        for name in names:
            if name not in self.manager.task_index and Path(name) not in paths:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                raise ValueError(
                    f"there is no task {name!r}"
                    + (f"; the nearest names are {', '.join(near)}" if near else "")
                    + "; `lm_eval ls tasks` lists those of the harness, and the sets are "
                    + ", ".join(task_sets())
                )
        # For the path of a group, the harness would take the list of its tasks for its name.
        entries = self.manager.task_index.values()
        group_names = {e.yaml_path: e.name for e in entries if e.kind == Kind.GROUP}
        self.names = [group_names.get(Path(n).resolve(), n) for n in names]
        files = self.files

        class Factory(TaskFactory):
            def _load_full_config(self, entry: Any, overrides: Any = None) -> dict[str, Any]:
                with _task_errors(entry.name, {}, data):
                    config = super()._load_full_config(entry, overrides)
                splits = local_splits(data, entry.name)
                if splits and isinstance(config.get("task"), str):
                    config = with_local_data(config, splits)
                files.extend(_data_files(config))
                return config

            def _build_task(self, entry: Any, overrides: Any) -> Any:
                config = self._load_full_config(entry, overrides)
                with _task_errors(entry.name, config, data), _local_class(config):
                    return super()._build_task(entry, overrides)

        self.manager._factory = Factory()


@contextlib.contextmanager
def _local_class(config: dict[str, Any]) -> Iterator[None]:
    """Let a task that is a class, and names its data set itself, read the local files."""
    if "class" not in config or config.get("dataset_path") not in FORMATS.values():
        yield
        return
    import datasets

    load, kind = datasets.load_dataset, config["dataset_path"]
    local = lambda *_, **__: load(kind, **config["dataset_kwargs"])
    with mock.patch.object(datasets, "load_dataset", local):
        yield


def _unsafe(name: str) -> ValueError:
    ours = " or ".join(n for n, task in TASKS.items() if task.table == "code")
    return ValueError(
        f"{name} of the harness runs generated code without a sandbox; use "
        f"{ours} with --allow-code-execution"
    )


@contextlib.contextmanager
def _task_errors(name: str, config: dict[str, Any], data: Path | None) -> Iterator[None]:
    """Turn errors of loading a task into one line that says what to do."""
    try:
        yield
    except MissingData:
        raise
    except Exception as e:
        reason = (str(e).strip().splitlines() or [""])[0]
        path = config.get("dataset_path") or getattr(config.get("class"), "DATASET_PATH", None)
        if "code_eval" in reason:  # the hub's metric that runs programs, loaded with the task
            raise _unsafe(name) from None
        if path in FORMATS.values():
            _check_files(name, config)
        if isinstance(e, ImportError) and e.name:
            raise ValueError(f"{name} needs the package {e.name}: pip install {e.name}") from None
        if not isinstance(e, OSError) or not path or path in FORMATS.values():
            raise ValueError(f"{name} cannot be loaded: {type(e).__name__}: {reason}") from None
        folder = (data or Path("DIR")) / name
        splits = dict.fromkeys(config[key] for key in _SPLITS if config.get(key)) or ["SPLIT"]
        wanted = " and ".join(f"{folder / split}.jsonl" for split in splits)
        raise MissingData(
            f"{name} has no data: {path} is not reachable ({reason}); download "
            f"https://huggingface.co/datasets/{path}, save it as {wanted} (or .json, .csv, "
            f".parquet){'' if data else ', and give --data DIR'}"
        ) from None


def _check_files(name: str, config: dict[str, Any]) -> None:
    """Raise an error with the place of what is wrong in the files of a task, if it is found."""
    for path in _data_files(config):
        try:
            read_records(path)
        except ValueError as e:
            raise ValueError(f"{name} cannot be loaded: {e}") from None


def _data_files(config: dict[str, Any]) -> list[Path]:
    """The local files that the configuration of a task names, also by patterns."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") or ()
    values = named.values() if isinstance(named, dict) else [named]
    patterns = [x for value in values for x in (value if isinstance(value, list) else [value])]
    found = [path for x in patterns if isinstance(x, str) for path in sorted(glob.glob(x))]
    return [Path(path).resolve() for path in found if Path(path).is_file()]


def local_splits(data: Path | None, task: str) -> dict[str, Path]:
    """The files of a task in the data folder, by the name of their split."""
    folder = data / task if data is not None else None
    if folder is None or not folder.is_dir():
        return {}
    return {p.stem: p.resolve() for p in sorted(folder.iterdir()) if p.suffix in FORMATS}


def with_local_data(config: dict[str, Any], splits: dict[str, Path]) -> dict[str, Any]:
    """The configuration of a task that reads local files.

    Raises:
      MissingData: the split with the questions is not among them.
    """
    formats = {FORMATS[path.suffix] for path in splits.values()}
    folder = next(iter(splits.values())).parent
    if len(formats) > 1:
        raise ValueError(f"{folder} has files of several formats: {', '.join(sorted(formats))}")
    questions = config.get("test_split") or config.get("validation_split")
    needed = [questions, _split_of_shots(config)]
    if absent := [split for split in needed if split and split not in splits]:
        raise MissingData(
            f"{config['task']} needs the split {absent[0]!r}: {folder} has {', '.join(splits)}; "
            f"save it as {folder / absent[0]}.jsonl (or .json, .csv, .parquet)"
        )
    gone = {s: None for s in _SPLITS if config.get(s) and config[s] not in splits}
    # Other splits may have other columns, such as test questions without answers.
    used = {*needed, *(config.get(s) for s in _SPLITS)}
    (kind,) = formats
    # The reader takes the paths for patterns.
    escaped = {s: glob.escape(str(path)) for s, path in splits.items()}
    files = {s: path for s, path in escaped.items() if s in used or not questions}
    settings: dict[str, Any] = {"data_files": files}
    if kind == "csv":  # texts such as "None" or "N/A" are texts
        settings |= {"keep_default_na": False, "na_values": [""]}
    local = dict(
        dataset_path=kind, dataset_name=None, custom_dataset=None, dataset_kwargs=settings
    )  # fmt: skip
    return {**config, **gone, **local}


def _split_of_shots(config: dict[str, Any]) -> str | None:
    """The split with the examples of a task; None if there are none, or if its file has them."""
    if not config.get("num_fewshot"):
        return None
    settings = config.get("fewshot_config") or {}
    if split := config.get("fewshot_split") or settings.get("split"):
        return split
    # Without the training split, the harness would take examples from the questions themselves.
    return None if settings.get("samples") else config.get("training_split")
