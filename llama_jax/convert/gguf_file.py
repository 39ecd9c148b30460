"""Headers of GGUF files: read with a check of every count, length and offset, and written.

A header lists metadata (key, type, value) and tensors (name, shape, type, offset). Files come from
anywhere, so nothing is allocated or repeated because a number in the file says so.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.convert.formats import ConvertError, map_file, raise_if_any, short
from llama_jax.convert.tensors import Q8_0_BLOCK

_MAGIC = b"GGUF"
_MAX_HEADER_BYTES = 128 << 20
"""limit on a header; that of Llama 3.1 405B has 10 MB, most of it the tokenizer"""
_MAX_KEYS, _MAX_TENSORS, _MAX_ITEMS = 4096, 1 << 17, 1 << 22
_MAX_KEY_BYTES, _MAX_TEXT_BYTES = 1 << 16, 8 << 20
_MAX_RANK = 4
_ALIGNMENT = 32
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_AGAIN = "copy or download it again"

Metadata = dict[str, Any]
"""values by key: a scalar, a text, a list of texts, or an array of numbers"""


class GgmlType(NamedTuple):
    """A type of tensor: blocks of ``block`` weights in ``size`` bytes."""

    number: int
    name: str
    block: int
    size: int


FLOAT_TYPES = {t.name: t for t in (
    GgmlType(0, "F32", 1, 4), GgmlType(1, "F16", 1, 2), GgmlType(30, "BF16", 1, 2),
)}  # fmt: skip
Q8_0 = GgmlType(8, "Q8_0", *Q8_0_BLOCK)


class GgufTensor(NamedTuple):
    """The location of a tensor; the last axis of its shape is contiguous."""

    path: Path
    offset: int
    """bytes from the start of the file"""
    shape: tuple[int, ...]
    type: GgmlType

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.size


class GgufFile(NamedTuple):
    """The header of one file."""

    path: Path
    metadata: Metadata
    tensors: dict[str, GgufTensor]


def import_gguf() -> Any:
    """The package ``gguf``, which knows the quantized types."""
    try:
        import gguf
    except ImportError:
        raise ConvertError(
            "quantized GGUF tensors need the package gguf: pip install 'llama_jax[gguf]'"
        ) from None
    return gguf


# Reading ------------------------------------------------------------------------------------------


class _Header:
    """The bytes of a header, read in order."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0
        self.end = min(len(data), _MAX_HEADER_BYTES)

    def error(self, text: str) -> ConvertError:
        return ConvertError(f"{self.path}: {text}")

    def take(self, size: int, what: str) -> bytes:
        """The next bytes; `what` names them in an error."""
        if size > self.end - self.at:
            limit = self.end < len(self.data)
            problem = f"the header has over {_MAX_HEADER_BYTES:,} bytes" if limit else "is cut off"
            raise self.error(f"{problem} in {what}: {_AGAIN}")
        self.at += size
        return self.data[self.at - size : self.at]

    def integer(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def count(self, largest: int, what: str) -> int:
        count = self.integer(8, what)
        if count > largest:
            raise self.error(f"is damaged: {what} is {count:,}, at most {largest:,} are read")
        return count

    def text(self, largest: int, what: str) -> str:
        content = self.take(self.count(largest, f"the length of {what}"), what)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.error(f"{what} is not UTF-8 text (byte {e.start}): damaged") from None

    def value(self, key: str) -> Any:
        kind = self.integer(4, key)
        if kind == _STRING:
            return self.text(_MAX_TEXT_BYTES, key)
        if kind != _ARRAY:
            return self.numbers(kind, 1, key)[0].item()
        kind = self.integer(4, key)
        count = self.count(_MAX_ITEMS, f"the number of items of {key}")
        if kind == _STRING:
            return [self.text(_MAX_TEXT_BYTES, f"{key}[{i}]") for i in range(count)]
        return self.numbers(kind, count, key)

    def numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind not in _SCALARS:
            nested = "an array of arrays" if kind == _ARRAY else f"the unknown type {kind}"
            raise self.error(f"{key} has {nested}, which is not supported")
        dtype = np.dtype(_SCALARS[kind])
        numbers = np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        if kind != _BOOL:
            return numbers
        if (numbers > 1).any():
            raise self.error(f"{key} is neither true nor false: damaged")
        return numbers.astype(bool)


def read(path: Path) -> GgufFile:
    """Read and check the header of a file.

    Raises:
      ConvertError: something else, damaged, cut off, or of another version; says which.
      OSError: missing or not readable.
    """
    try:
        data = map_file(path)
    except ValueError as e:  # also an empty file, which cannot be mapped
        raise ConvertError(str(e) if str(path) in str(e) else f"{path} is empty") from None
    header = _Header(path, data)
    if data[:4] != _MAGIC:
        raise header.error(f"is not a GGUF file: it begins with {data[:4]!r}, not {_MAGIC!r}")
    header.take(4, "the first bytes")
    version = header.integer(4, "the version")
    if version & 0xFFFF == 0:
        raise header.error("is big-endian: only little-endian files are supported")
    if version not in (2, 3):
        raise header.error(f"has version {version} of GGUF: versions 2 and 3 are supported")
    num_tensors = header.count(_MAX_TENSORS, "the number of tensors")
    num_keys = header.count(_MAX_KEYS, "the number of metadata keys")
    metadata: Metadata = {}
    for i in range(num_keys):
        key = header.text(_MAX_KEY_BYTES, f"metadata key {i}")
        if key in metadata:
            raise header.error(f"is damaged: it has the metadata key {short(key)} twice")
        metadata[key] = header.value(short(key)[1:-1])
    entries = [_tensor_entry(header, i) for i in range(num_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise header.error(f"general.alignment={short(alignment)} is not a power of two")
    start = header.at + -header.at % alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in entries:
        if name in tensors:
            raise header.error(f"is damaged: it has the tensor {short(name)} twice")
        if offset % alignment:
            raise header.error(f"is damaged: {short(name)} is not aligned to {alignment} bytes")
        tensors[name] = GgufTensor(path, start + offset, shape, _type_of(number, name, header))
    _check_extents(path, len(data), start, tensors)
    data.close()
    return GgufFile(path, metadata, tensors)


def _tensor_entry(header: _Header, i: int) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, number of the type and offset of a tensor."""
    name = header.text(_MAX_KEY_BYTES, f"the name of tensor {i}")
    rank = header.integer(4, name)
    if not 1 <= rank <= _MAX_RANK:
        raise header.error(f"is damaged: {short(name)} has {rank:,} dimensions")
    shape = tuple(header.integer(8, name) for _ in range(rank))[::-1]
    if not all(0 < n < 1 << 40 for n in shape) or math.prod(shape) >= 1 << 60:
        raise header.error(f"is damaged: {short(name)} has the shape {short(list(shape))}")
    return name, shape, header.integer(4, name), header.integer(8, name)


def _type_of(number: int, name: str, header: _Header) -> GgmlType:
    known = next((t for t in FLOAT_TYPES.values() if t.number == number), None)
    if known is not None:
        return known
    gguf = import_gguf()
    try:
        kind = gguf.GGMLQuantizationType(number)
        return GgmlType(number, kind.name, *gguf.GGML_QUANT_SIZES[kind])
    except (ValueError, KeyError):
        raise header.error(
            f"{short(name)} has type {number}, which this release of the package gguf does not "
            "know; pip install -U gguf, or take a file of another type"
        ) from None


def _check_extents(path: Path, size: int, start: int, tensors: dict[str, GgufTensor]) -> None:
    """Tensors must be whole blocks inside the file, and may not overlap."""
    problems = [
        f"{path}: is damaged: rows of {n[:200]} have {t.shape[-1]} weights, not a multiple of "
        f"{t.type.block} ({t.type.name})"
        for n, t in tensors.items()
        if t.shape[-1] % t.type.block
    ]
    end, before = start, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            problems.append(f"{path}: is damaged: {name[:200]} overlaps {before[:200]}")
        end, before = max(end, tensor.offset + tensor.num_bytes), name
    if end > size:
        problems.append(
            f"{path}: is cut off: its tensors reach byte {end:,}, it has {size:,}; {_AGAIN}"
        )
    raise_if_any(problems)


# Writing ------------------------------------------------------------------------------------------


def plan(
    path: Path, metadata: Metadata, tensors: dict[str, tuple[tuple[int, ...], GgmlType]]
) -> tuple[bytes, dict[str, GgufTensor]]:
    """The header of a file, and the location of each tensor, in the given order.

    Args:
      path: the file.
      metadata: integers are written as uint32, numbers with a fraction as float32.
      tensors: shape and type of each tensor.
    """
    out = [_MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        out += [_text(key), _encode(value)]
    offsets, position = {}, 0
    for name, (shape, kind) in tensors.items():
        offsets[name] = position
        out.append(_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]))
        out.append(struct.pack("<IQ", kind.number, position))
        position += math.prod(shape) // kind.block * kind.size
        position += -position % _ALIGNMENT
    header = b"".join(out)
    header += b"\0" * (-len(header) % _ALIGNMENT)
    located = {n: GgufTensor(path, len(header) + offsets[n], *t) for n, t in tensors.items()}
    return header, located


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _encode(value: Any) -> bytes:
    """Type and value of metadata."""
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
        return head + b"".join(map(_text, value))
    kind = next(k for k, dtype in _SCALARS.items() if np.dtype(dtype) == value.dtype)
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.tobytes()
