"""Quantises the layers' matrices of any source to 8 or 4 bits, a few rows at a time.

A quantised checkpoint holds each matrix as an array ``q`` of integers and one of float32 scales,
with the bits that :func:`~llama_jax.model.quantize.quantize_weight` gives; ``q`` of int4 is packed.

    python -m llama_jax.convert SOURCE DESTINATION --quantize int8
"""

import functools
from collections.abc import Iterator

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.convert.tensors import Row, Unit, Weights
from llama_jax.model.quantize import max_abs, pack, scale_of, to_integers

BLOCK = 4 << 20
"""numbers of a matrix that are float32 at once"""


def dtype_of(row: Row) -> np.dtype:
    """Of scales or integers, as they are stored."""
    if row.scales:
        return np.dtype(np.float32)
    return np.dtype(np.int8 if row.quantized == "int8" else np.uint8)


class Quantizing:
    """Weights of another layout, their matrices quantised as they are read."""

    def __init__(self, source: Weights, cfg: ModelConfig):
        self.source, self.cfg = source, cfg
        self._max_abs: dict[str, np.ndarray] = {}

    def dtype(self, unit: Unit) -> np.dtype:
        return self.source.dtype(unit) if unit.row.quantized is None else dtype_of(unit.row)

    def read(self, unit: Unit, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a unit; of numbers, or of their scales, or of pairs of rows."""
        kind = unit.row.quantized
        if kind is None:
            return self.source.read(unit, start, stop)
        matrix = unit.whole()
        if kind == "int8":
            scale = self._scale(matrix)
            if unit.row.scales:
                return scale
            blocks = self._blocks(matrix, start, stop, 1)
            return np.concatenate([to_integers(w, scale, np.int8) for w in blocks])
        group = unit.row.group(self.cfg)
        if unit.row.scales:
            blocks = self._blocks(matrix, start * group, stop * group, group)
            scales = [scale_of(_max_abs(_groups(w, group), matrix), kind) for w in blocks]
            return np.concatenate(scales)[:, 0]
        inputs = matrix.shape(self.cfg)[0]
        first = 2 * start // group * group
        last = min(-(-2 * stop // group) * group, inputs)
        made = []
        for w in self._blocks(matrix, first, last, group):
            grouped = _groups(w, group)
            scale = scale_of(_max_abs(grouped, matrix), kind)
            made.append(to_integers(grouped, scale, np.int8).reshape(w.shape))
        return pack(np.concatenate(made)[2 * start - first : 2 * stop - first])

    def write(self, unit: Unit, start: int, piece: np.ndarray) -> None:
        raise NotImplementedError("a source is only read")

    def _scale(self, matrix: Unit) -> np.ndarray:
        """Scales [1, out] of a matrix in int8; kept, for it is read once more for them."""
        if matrix.name not in self._max_abs:
            blocks = self._blocks(matrix, 0, matrix.shape(self.cfg)[0], 1)
            of_each = (_max_abs(w, matrix) for w in blocks)
            self._max_abs[matrix.name] = functools.reduce(np.maximum, of_each)
        return scale_of(self._max_abs[matrix.name], "int8")

    def _blocks(self, matrix: Unit, start: int, stop: int, group: int) -> Iterator[np.ndarray]:
        """Rows start to stop of a matrix in float32, a few whole groups of them at a time."""
        step = max(1, BLOCK // (group * matrix.shape(self.cfg)[1])) * group
        for i in range(start, stop, step):
            yield self.source.read(matrix, i, min(i + step, stop)).astype(np.float32, copy=False)


def _groups(w: np.ndarray, group: int) -> np.ndarray:
    return w.reshape(-1, group, w.shape[1])


def _max_abs(w: np.ndarray, matrix: Unit) -> np.ndarray:
    out = max_abs(w)
    if not np.isfinite(out).all():
        raise ValueError(f"{matrix.name} holds numbers that are not finite: it has no scale")
    return out
