"""Quantize the matrices of the layers of any source to 8 or 4 bits, a few rows at a time.

A quantized checkpoint holds each matrix as an array ``q`` of integers and an array of float32
scales, with the bits of :func:`~llama_jax.model.quantize.quantize_weight`; ``q`` of int4 is packed.
"""

import functools
from collections.abc import Iterator

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.convert.formats import ConvertError
from llama_jax.convert.tensors import LayerTensor, Weights
from llama_jax.model.quantize import max_abs, pack, scale_of, to_integers

BLOCK = 4 << 20
"""largest number of elements of a matrix that are float32 at once"""


class QuantizedWeights:
    """The weights of a source, with matrices quantized when they are read.

    Example:
      >>> weights = QuantizedWeights(source.weights, source.cfg)
      >>> q = weights.read(layer_tensors(source.cfg, "int8")[3], 0, 100)
    """

    def __init__(self, source: Weights, cfg: ModelConfig):
        self.source, self.cfg = source, cfg
        self._max_abs: dict[str, np.ndarray] = {}

    def dtype(self, tensor: LayerTensor) -> np.dtype:
        return tensor.spec.quantized_dtype or self.source.dtype(tensor)

    def read(self, tensor: LayerTensor, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor: weights, scales, integers, or packed pairs of rows."""
        kind, scales = tensor.spec.quantized, tensor.spec.scales
        if kind is None:
            return self.source.read(tensor, start, stop)
        matrix = tensor.unquantized()
        if kind == "int8":
            scale = self._int8_scale(matrix)
            if scales:
                return scale
            blocks = self._blocks(matrix, start, stop, 1)
            return np.concatenate([to_integers(w, scale, np.int8) for w in blocks])
        group = tensor.spec.group(self.cfg)
        if scales:
            blocks = self._blocks(matrix, start * group, stop * group, group)
            return np.concatenate([_scales(w, group, matrix) for w in blocks])[:, 0]
        inputs = matrix.shape(self.cfg)[0]
        first = 2 * start // group * group
        last = min(-(-2 * stop // group) * group, inputs)
        rows = []
        for w in self._blocks(matrix, first, last, group):
            integers = to_integers(_groups(w, group), _scales(w, group, matrix), np.int8)
            rows.append(integers.reshape(w.shape))
        return pack(np.concatenate(rows)[2 * start - first : 2 * stop - first])

    def write(self, tensor: LayerTensor, start: int, row_block: np.ndarray) -> None:
        raise NotImplementedError("a source is only read")

    def _int8_scale(self, matrix: LayerTensor) -> np.ndarray:
        """Scales [1, out] of a matrix. The maxima are kept, because they need the whole matrix."""
        if matrix.name not in self._max_abs:
            blocks = self._blocks(matrix, 0, matrix.shape(self.cfg)[0], 1)
            maxima = (_max_abs(w, matrix) for w in blocks)
            self._max_abs[matrix.name] = functools.reduce(np.maximum, maxima)
        return scale_of(self._max_abs[matrix.name], "int8")

    def _blocks(
        self, matrix: LayerTensor, start: int, stop: int, group: int
    ) -> Iterator[np.ndarray]:
        """Rows start to stop of a matrix in float32, in blocks of whole groups."""
        step = max(1, BLOCK // (group * matrix.shape(self.cfg)[1])) * group
        for i in range(start, stop, step):
            yield self.source.read(matrix, i, min(i + step, stop)).astype(np.float32, copy=False)


def _groups(w: np.ndarray, group: int) -> np.ndarray:
    return w.reshape(-1, group, w.shape[1])


def _scales(w: np.ndarray, group: int, matrix: LayerTensor) -> np.ndarray:
    """int4 scales [groups, 1, out]."""
    return scale_of(_max_abs(_groups(w, group), matrix), "int4")


def _max_abs(w: np.ndarray, matrix: LayerTensor) -> np.ndarray:
    out = max_abs(w)
    if not np.isfinite(out).all():
        raise ConvertError(f"{matrix.name} holds numbers that are not finite: it has no scale")
    return out
