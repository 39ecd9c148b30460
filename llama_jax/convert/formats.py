"""Find tensors in files of weights, map them into memory, and read and write ``.safetensors``.

A reader returns the location of each tensor (:class:`TensorSlice`); no tensor is read before it is
needed, and no code of a file is executed.
"""

import json
import math
import mmap
import os
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.io import open_regular

_MAX_PROBLEMS = 20
_MAX_PROBLEM_LENGTH = 500


class ConvertError(ValueError):
    """Weights that cannot be converted; the message gives every reason and what to do.

    Args:
      problems: one line each; long lines and long lists are cut.

    Example:
      >>> raise ConvertError("params.json: dim is missing")
    """

    def __init__(self, *problems: str):
        lines = [
            p if len(p) <= _MAX_PROBLEM_LENGTH else f"{p[:_MAX_PROBLEM_LENGTH]}..."
            for p in problems[:_MAX_PROBLEMS]
        ]
        if len(problems) > _MAX_PROBLEMS:
            lines.append(f"and {len(problems) - _MAX_PROBLEMS:,} more problems")
        super().__init__("\n".join(lines))


def raise_if_any(problems: list[str]) -> None:
    """Raise one :class:`ConvertError` for all problems."""
    if problems:
        raise ConvertError(*problems)


_MAX_HEADER_BYTES = 8 << 20
"""size limit of a safetensors header; that of Llama 3.1 405B in one file has 0.2 MB"""
MAX_RANK = 8
"""largest number of dimensions of a tensor; weights have at most two"""
MAX_INT = 1 << 62


class TensorSlice(NamedTuple):
    """The location of a tensor: a strided view of a file."""

    path: Path
    offset: int
    """bytes from the start of the file"""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """in elements, as in torch"""
    dtype: np.dtype


FLOATS = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)]
# name in safetensors, storage class in torch, numpy dtype
DTYPES = [
    ("F16", "HalfStorage", FLOATS[0]), ("BF16", "BFloat16Storage", FLOATS[1]),
    ("F32", "FloatStorage", FLOATS[2]), ("F64", "DoubleStorage", np.dtype(np.float64)),
    ("I8", "CharStorage", np.dtype(np.int8)), ("U8", "ByteStorage", np.dtype(np.uint8)),
    ("I16", "ShortStorage", np.dtype(np.int16)), ("I32", "IntStorage", np.dtype(np.int32)),
    ("I64", "LongStorage", np.dtype(np.int64)), ("BOOL", "BoolStorage", np.dtype(np.bool_)),
]  # fmt: skip
_SAFETENSORS_NAME = {dtype: name for name, _, dtype in DTYPES}
_SAFETENSORS_DTYPE = {name: dtype for name, _, dtype in DTYPES}


def short(value: Any) -> str:
    """The start of a value from an untrusted file, for a message; bounded for any size and
    depth."""
    limited = reprlib.Repr()
    limited.maxstring = limited.maxother = 80
    limited.maxlevel = 3
    return limited.repr(value)


def first_names(names: list[str], count: int = 10) -> str:
    """The first names of a list, and how many more there are, for a message."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(name[:100] for name in names[:count]) + more


def view(location: TensorSlice, mapped: mmap.mmap) -> np.ndarray:
    """The tensor as an array over the mapped file; bytes are read when they are used."""
    strides = [s * location.dtype.itemsize for s in location.strides]
    return np.ndarray(location.shape, location.dtype, mapped, location.offset, strides)


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading."""
    with open_regular(path) as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def release(mapped: mmap.mmap, start: int, stop: int) -> None:
    """Release the mapped pages of bytes start to stop, so that they no longer count as memory of
    this process.

    Args:
      mapped: from :func:`map_file`.
      start: first byte.
      stop: byte after the last one.
    """
    start -= start % mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, start, min(stop, len(mapped)) - start)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a tensor in row-major order."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


# safetensors --------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, TensorSlice]:
    """Locations of the tensors of a ``.safetensors`` file.

    Raises:
      ValueError: the file is damaged, truncated, or holds unsupported dtypes.
      OSError: missing or not readable.
    """
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        head = f.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= size - 8:
            raise ConvertError(
                f"{path}: not a safetensors file, or cut off: its first 8 bytes give a header of "
                f"{length} bytes, the file has {size}"
            )
        if length > _MAX_HEADER_BYTES:
            raise ConvertError(
                f"{path}: a header of {length:,} bytes; at most {_MAX_HEADER_BYTES:,} are read, 40 "
                "times that of the largest Llama"
            )
        text = f.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {n: _safetensors_slice(path, n, e, 8 + length) for n, e in header.items()}
        del header, text
    except ConvertError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ConvertError(f"{path}: the safetensors header cannot be read: {short(e)}") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            raise ConvertError(
                f"{path}: {name} starts at byte {tensor.offset}, expected {end}: tensors overlap "
                "or leave a gap"
            )
        end += math.prod(tensor.shape) * tensor.dtype.itemsize
    if end != size:
        what = "is cut off" if size < end else "has bytes after the last tensor"
        raise ConvertError(
            f"{path}: the file {what}: its header describes {end} bytes, it has {size}; copy or "
            "download it again"
        )
    return tensors


def _safetensors_slice(path: Path, name: str, entry: dict[str, Any], base: int) -> TensorSlice:
    dtype = _SAFETENSORS_DTYPE.get(entry["dtype"])
    if dtype is None:
        raise ConvertError(
            f"{path}: {name} has dtype {short(entry['dtype'])}: quantized files and "
            "rare dtypes are not supported"
        )
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    numbers = (*shape, start, stop)
    if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n < MAX_INT for n in numbers):
        given = f"shape {short(shape)}, offsets {short(start)}, {short(stop)}"
        raise ConvertError(f"{path}: {name} has {given}")
    shape = tuple(shape)
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ConvertError(
            f"{path}: {name} of shape {list(shape)} and dtype {entry['dtype']} does not fit in "
            f"{stop - start} bytes"
        )
    return TensorSlice(path, base + start, shape, contiguous(shape), dtype)


def plan_safetensors(
    path: Path, tensors: dict[str, tuple[tuple[int, ...], np.dtype]]
) -> tuple[bytes, dict[str, TensorSlice]]:
    """The header of a file with these tensors (shape, dtype), and the location of each tensor, in
    the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    position = 0
    for name, (shape, dtype) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        entry = {"dtype": _SAFETENSORS_NAME[dtype], "shape": list(shape)}
        header[name] = entry | {"data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    base = 8 + len(text)
    locations = {
        n: TensorSlice(path, base + header[n]["data_offsets"][0], shape, contiguous(shape), dtype)
        for n, (shape, dtype) in tensors.items()
    }
    return len(text).to_bytes(8, "little") + text, locations
