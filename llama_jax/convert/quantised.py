"""The layers' matrices in 8 or 4 bits, made of any weights a few rows at a time.

In come the weights of a source; out come those of a quantised checkpoint, as pieces: each matrix is
an array ``q`` of integers and one of float32 scales, with the bits that
``quantize_weight`` gives. In int4 a byte of ``q`` holds two rows, the even
one in its low half.

    python -m llama_jax.convert SOURCE DESTINATION --quantize int8
"""

import functools
from collections.abc import Iterator

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.convert.tensors import Row, Unit, Weights

MOST = {"int8": 127, "int4": 7}
"""the largest integer"""
BLOCK = 8 << 20
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
        self._largest: dict[str, np.ndarray] = {}

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
            return np.concatenate([_round(w, scale) for w in self._blocks(matrix, start, stop, 1)])
        group = unit.row.group(self.cfg)
        if unit.row.scales:
            blocks = self._blocks(matrix, start * group, stop * group, group)
            scales = [_scale(_largest(_groups(w, group), matrix), kind) for w in blocks]
            return np.concatenate(scales)[:, 0]
        inputs = matrix.shape(self.cfg)[0]
        first = 2 * start // group * group
        last = min(-(-2 * stop // group) * group, inputs)
        made = []
        for w in self._blocks(matrix, first, last, group):
            grouped = _groups(w, group)
            scale = _scale(_largest(grouped, matrix), kind)
            made.append(_round(grouped, scale).reshape(w.shape))
        return pack(np.concatenate(made)[2 * start - first : 2 * stop - first])

    def write(self, unit: Unit, start: int, piece: np.ndarray) -> None:
        raise NotImplementedError("a source is only read")

    def _scale(self, matrix: Unit) -> np.ndarray:
        """Scales [1, out] of a matrix in int8; kept, for it is read once more for them."""
        if matrix.name not in self._largest:
            blocks = self._blocks(matrix, 0, matrix.shape(self.cfg)[0], 1)
            of_each = (_largest(w, matrix) for w in blocks)
            self._largest[matrix.name] = functools.reduce(np.maximum, of_each)
        return _scale(self._largest[matrix.name], "int8")

    def _blocks(self, matrix: Unit, start: int, stop: int, group: int) -> Iterator[np.ndarray]:
        """Rows start to stop of a matrix in float32, a few whole groups of them at a time."""
        step = max(1, BLOCK // (group * matrix.shape(self.cfg)[1])) * group
        for i in range(start, stop, step):
            yield self.source.read(matrix, i, min(i + step, stop)).astype(np.float32, copy=False)


def _groups(w: np.ndarray, group: int) -> np.ndarray:
    return w.reshape(-1, group, w.shape[1])


def _largest(w: np.ndarray, matrix: Unit) -> np.ndarray:
    """max |w| over the inputs."""
    out = np.maximum(w.max(axis=-2, keepdims=True), -w.min(axis=-2, keepdims=True))
    if not np.isfinite(out).all():
        raise ValueError(f"{matrix.name} holds numbers that are not finite: it has no scale")
    return out


def _scale(largest: np.ndarray, kind: str) -> np.ndarray:
    return np.where(largest == 0, np.float32(1), largest * np.float32(1 / MOST[kind]))


def _round(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    w = np.multiply(w, 1 / scale, out=w)
    return np.rint(w, out=w).astype(np.int8)


def pack(q: np.ndarray) -> np.ndarray:
    """int8 [rows, out] of -7 to 7 as uint8 [rows / 2, out], rounded up."""
    if len(q) % 2:
        q = np.concatenate([q, np.zeros_like(q[:1])])
    q = q.view(np.uint8)
    return q[::2] & 15 | q[1::2] << 4


def unpack(packed: np.ndarray, rows: int) -> np.ndarray:
    """The inverse of :func:`pack`: int8 [rows, out]."""
    q = np.empty((2 * len(packed), packed.shape[1]), np.int8)
    # Shifted up and down again as signed numbers: the fourth bit becomes the sign.
    q[::2] = packed.view(np.int8) << 4
    q[1::2] = packed.view(np.int8)
    return np.right_shift(q, 4, out=q)[:rows]
