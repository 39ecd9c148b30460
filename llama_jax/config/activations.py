"""The values of ``train.remat`` and ``train.offload``: activations of a layer by name."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from llama_jax.config.values import did_you_mean

REMAT_NAMES = ("q", "k", "v", "attention", "o", "gate", "up", "down")
"""Activations of a layer: outputs of its matrices, and of the attention kernel."""
_LISTS = tuple(f'["{name}"]' for name in REMAT_NAMES)
REMAT_WORDS = ("none", "matmuls", "full", "auto")


def _list_or_word(value: object) -> object:
    """The value with a list as a tuple; one error instead of one for each type of the union."""
    names = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"give {', '.join(REMAT_WORDS)}, or a list of activations to keep, such as "
            '["gate", "up"]'
        )
    return tuple(value) if isinstance(value, list) else value


def _remat(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(value, str):
        if value not in REMAT_WORDS:
            raise ValueError(
                f"give {', '.join(REMAT_WORDS)}, or a list of activations to keep, such as "
                '["gate", "up"]' + did_you_mean(value, (*REMAT_WORDS, *_LISTS))
            )
        return value
    for name in value:
        if name not in REMAT_NAMES:
            raise ValueError(
                f"{name!r:.100} is not an activation; there are {', '.join(REMAT_NAMES)}"
                + did_you_mean(name, REMAT_NAMES)
            )
    return tuple(dict.fromkeys(value))


Remat = Annotated[str | tuple[str, ...], BeforeValidator(_list_or_word), AfterValidator(_remat)]
RematNames = Annotated[tuple[str, ...], AfterValidator(_remat)]
