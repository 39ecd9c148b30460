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
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class FormatError(ValueError):
    """A file that is not what its name says, or not something we read; the message says which
    and what to do."""


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


def view(region: Region, mapped: mmap.mmap) -> np.ndarray:
    """The tensor as an array over the mapped file: no byte is read until it is used."""
    strides = [s * region.dtype.itemsize for s in region.strides]
    return np.ndarray(region.shape, region.dtype, mapped, region.offset, strides)


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading."""
    with path.open("rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def release(mapped: mmap.mmap, start: int, stop: int) -> None:
    """Let go of the mapped pages of bytes start to stop, so that they no longer count as this
    process's memory."""
    start -= start % mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, start, min(stop, len(mapped)) - start)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


# --- safetensors ---


def read_safetensors(path: Path) -> dict[str, Region]:
    """Where the tensors of a ``.safetensors`` file lie; raises :class:`FormatError` for a file
    that is not whole."""
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(size - 8, 100_000_000):
            raise FormatError(
                f"{path}: not a safetensors file, or cut off: its first 8 bytes give a header of "
                f"{length} bytes, "
                f"the file has {size}"
            )
        text = f.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        regions = {n: _safetensors_region(path, n, e, 8 + length) for n, e in header.items()}
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise FormatError(f"{path}: the safetensors header cannot be read: {e!r}") from None
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
    dtype = {n: d for n, _, d in DTYPES}.get(entry["dtype"])
    if dtype is None:
        raise FormatError(
            f"{path}: {name} has dtype {entry['dtype']}: quantised and exotic files are not "
            "supported"
        )
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise FormatError(f"{path}: {name} has shape {shape}, offsets {start}, {stop}")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise FormatError(
            f"{path}: {name} of shape {list(shape)} and dtype {entry['dtype']} cannot lie in "
            f"{stop - start} bytes"
        )
    return Region(path, base + start, shape, contiguous(shape), dtype)


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
