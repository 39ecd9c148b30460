"""Names and checks of the model files that ``llama-jax corpus models`` makes."""

from collections.abc import Iterable
from pathlib import Path

LANGUAGE_ID = "lid.176.ftz"
REFERENCES = "references.bin"
_MODEL = ".arpa.bin"


def lm_languages(folder: Path) -> list[str]:
    """Languages whose language model is in the folder of models."""
    return sorted(path.name.removesuffix(_MODEL) for path in folder.glob(f"*{_MODEL}"))


def check_models(folder: Path, names: Iterable[str]) -> list[Path]:
    """The paths of model files.

    Raises:
        ValueError: One is missing; names the command that makes it.
    """
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"the model {path} does not exist; make it with: "
                f"llama-jax corpus models {_arguments(path.name)} --models {folder}"
            )
    return paths


def _arguments(name: str) -> str:
    if name == LANGUAGE_ID:
        return "language"
    if name == REFERENCES:
        return "references --positive PAGES --negative PAGES"
    return f"{name.partition('.')[0]} --text WIKIPEDIA"
