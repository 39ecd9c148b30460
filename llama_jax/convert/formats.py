"""Files of tensors, read and written natively: torch's ``.pth``/``.bin`` (a zip and a pickle) and
``.safetensors``.

In comes a path; out comes where each tensor lies in the file (a :class:`Region`), for :func:`view`
to map into memory. No code of the file runs: a pickle may name only what a state dict of plain
tensors needs. Nothing here needs torch.

    python -m llama_jax.convert --inspect PATH
"""

import json
import math
import mmap
import os
import reprlib
import stat
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.io import LFS_POINTER


class FormatError(ValueError):
    """A file that is not what its name says, or not something we read; the message says which
    and what to do."""

    def __init__(self, message: str):
        super().__init__(message[:_LONGEST_MESSAGE])


_LONGEST_MESSAGE = 1000
_LONGEST_HEADER = 8 << 20
"""bytes of a safetensors header; that of Llama 3.1 405B in one file has 0.2 MB"""
MAX_RANK = 8
"""dimensions of a tensor; weights have at most two"""
MAX_INT = 1 << 62


class Region(NamedTuple):
    """Where a tensor lies: a strided view of a file."""

    path: Path
    offset: int
    """bytes from the start of the file"""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """in elements, as torch counts"""
    dtype: np.dtype


_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# name in safetensors, storage class in torch, numpy's dtype
DTYPES = [
    ("F16", "HalfStorage", np.dtype(np.float16)),
    ("BF16", "BFloat16Storage", _BFLOAT16),
    ("F32", "FloatStorage", np.dtype(np.float32)),
    ("F64", "DoubleStorage", np.dtype(np.float64)),
    ("I8", "CharStorage", np.dtype(np.int8)),
    ("U8", "ByteStorage", np.dtype(np.uint8)),
    ("I16", "ShortStorage", np.dtype(np.int16)),
    ("I32", "IntStorage", np.dtype(np.int32)),
    ("I64", "LongStorage", np.dtype(np.int64)),
    ("BOOL", "BoolStorage", np.dtype(np.bool_)),
]
_SAFETENSORS_NAME = {dtype: name for name, _, dtype in DTYPES}
_OF_SAFETENSORS = {name: dtype for name, _, dtype in DTYPES}


def short(value: Any) -> str:
    """A value out of a stranger's file for a message: its start, whatever its size and depth."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 80
    shown.maxlevel = 3
    return shown.repr(value)


def some(names: list[str], most: int = 10) -> str:
    """A list for a message: the first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(name[:100] for name in names[:most]) + more


def open_weights(path: Path) -> IO[bytes]:
    """Open a file of weights for reading.

    Raises:
      FormatError: a folder, pipe, device, or a Git LFS pointer; says which.
      OSError: missing or not readable.
    """
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path} is not a regular file")
    if os.pread(descriptor, len(LFS_POINTER), 0) == LFS_POINTER:
        os.close(descriptor)
        raise FormatError(
            f"{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull` where it "
            "came from"
        )
    return open(descriptor, "rb", buffering=0)


def view(region: Region, mapped: mmap.mmap) -> np.ndarray:
    """The tensor as an array over the mapped file: no byte is read until it is used."""
    strides = [s * region.dtype.itemsize for s in region.strides]
    return np.ndarray(region.shape, region.dtype, mapped, region.offset, strides)


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading."""
    with open_weights(path) as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def release(mapped: mmap.mmap, start: int, stop: int) -> None:
    """Let go of the mapped pages of bytes start to stop, so that they no longer count as this
    process's memory."""
    start -= start % mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, start, min(stop, len(mapped)) - start)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a tensor stored row after row."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


# --- safetensors ---


def read_safetensors(path: Path) -> dict[str, Region]:
    """Where the tensors of a ``.safetensors`` file lie; raises :class:`FormatError` for a file
    that is not whole."""
    with open_weights(path) as f:
        size = os.fstat(f.fileno()).st_size
        head = f.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= size - 8:
            raise FormatError(
                f"{path}: not a safetensors file, or cut off: its first 8 bytes give a header of "
                f"{length} bytes, "
                f"the file has {size}"
            )
        if length > _LONGEST_HEADER:
            raise FormatError(
                f"{path}: a header of {length:,} bytes; at most {_LONGEST_HEADER:,} are read, 40 "
                "times that of the largest Llama"
            )
        text = f.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        regions = {n: _safetensors_region(path, n, e, 8 + length) for n, e in header.items()}
        del header, text
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise FormatError(f"{path}: the safetensors header cannot be read: {short(e)}") from None
    end = 8 + length
    for name, region in sorted(regions.items(), key=lambda item: item[1].offset):
        if region.offset != end:
            raise FormatError(
                f"{path}: {name} starts at byte {region.offset}, expected {end}: tensors overlap "
                "or leave a gap"
            )
        end += math.prod(region.shape) * region.dtype.itemsize
    if end != size:
        what = "is cut off" if size < end else "has bytes after the last tensor"
        raise FormatError(
            f"{path}: the file {what}: its header describes {end} bytes, it has {size}; copy or "
            "download it again"
        )
    return regions


def _safetensors_region(path: Path, name: str, entry: dict[str, Any], base: int) -> Region:
    dtype = _OF_SAFETENSORS.get(entry["dtype"])
    if dtype is None:
        raise FormatError(
            f"{path}: {name} has dtype {short(entry['dtype'])}: quantised and exotic files are not "
            "supported"
        )
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if len(shape) > MAX_RANK or not all(_natural(n) for n in (*shape, start, stop)):
        given = f"shape {short(shape)}, offsets {short(start)}, {short(stop)}"
        raise FormatError(f"{path}: {name} has {given}")
    shape = tuple(shape)
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise FormatError(
            f"{path}: {name} of shape {list(shape)} and dtype {entry['dtype']} cannot lie in "
            f"{stop - start} bytes"
        )
    return Region(path, base + start, shape, contiguous(shape), dtype)


def _natural(number: Any) -> bool:
    return type(number) is int and 0 <= number < MAX_INT


def plan_safetensors(
    path: Path, tensors: dict[str, tuple[tuple[int, ...], np.dtype]]
) -> tuple[bytes, dict[str, Region]]:
    """The head of a file that holds these (shape, dtype), and where each tensor's bytes belong,
    in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    position = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAME[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    base = 8 + len(text)
    regions = {
        name: Region(path, base + header[name]["data_offsets"][0], shape, contiguous(shape), dtype)
        for name, (shape, dtype) in tensors.items()
    }
    return len(text).to_bytes(8, "little") + text, regions
