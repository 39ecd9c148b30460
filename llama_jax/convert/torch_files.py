"""Read and write torch's ``.pth`` and ``.bin`` files, a zip of raw storages and a pickle, without
torch."""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.convert.formats import (
    MAX_INT,
    MAX_RANK,
    ConvertError,
    TensorSlice,
    contiguous,
    short,
)
from llama_jax.convert.torch_pickle import TensorView, dump_pickle, load_pickle
from llama_jax.io import open_regular

_MAX_PICKLE_BYTES = 4 << 20
"""size limit of data.pkl; a tensor takes about 200 bytes, and Llama 3.1 405B has 1,138 tensors"""
_MAX_DIRECTORY_BYTES = 4 << 20
"""size limit of a zip's directory; a tensor takes about 80 bytes"""


class _Bounded(io.FileIO):
    """A file that limits the size of one read, which in :mod:`zipfile` the file itself decides."""

    def read(self, size: int | None = -1) -> bytes:
        rest = os.fstat(self.fileno()).st_size - self.tell()
        if (rest if size is None or size < 0 else min(size, rest)) > _MAX_DIRECTORY_BYTES:
            raise ConvertError(
                f"the zip's table of contents has over {_MAX_DIRECTORY_BYTES:,} bytes"
            )
        return super().read(-1 if size is None else size)


def read(path: Path) -> dict[str, TensorSlice]:
    """Locations of the tensors of a ``.pth`` or ``.bin`` file of torch 1.6 or newer.

    The tensors may be nested under "model" or "state_dict"; other entries are ignored.

    Raises:
      ValueError: the file is damaged, in an old format, or needs code to be loaded.
      OSError: missing or not readable.
    """
    with open_regular(path) as file:
        magic = file.read(16)
        if not magic.startswith(b"PK"):
            raise ConvertError(f"{path}: {_not_a_zip(magic)}")
        try:
            with zipfile.ZipFile(_Bounded(file.fileno(), closefd=False)) as archive:
                records = _zip_records(file, archive)
                root, tree = _unpickled(records, archive)
        except (zipfile.BadZipFile, EOFError, struct.error) as e:
            raise ConvertError(
                f"{path}: the zip is damaged or cut off ({e}); copy or download it again"
            ) from None
        except ConvertError as e:
            raise ConvertError(f"{path}: {e}") from None
        except OSError:
            raise
        except Exception as e:  # a hostile zip or pickle can cause any exception
            raise ConvertError(f"{path}: the zip or data.pkl cannot be read: {short(e)}") from None
    for nest in ("model", "state_dict"):
        if isinstance(tree, dict) and isinstance(tree.get(nest), dict):
            tree = tree[nest]
    items = tree.items() if isinstance(tree, dict) else ()
    views = {str(k): v for k, v in items if isinstance(v, TensorView)}
    if not views:
        raise ConvertError(f"{path}: holds no tensors")
    return {name: _torch_slice(path, name, v, records, root) for name, v in views.items()}


def _not_a_zip(magic: bytes) -> str:
    if magic.startswith((b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P", b"\x80\x02}", b"\x80\x02c")):
        return "written by torch before 1.6 (not a zip); load it with torch and save it again"
    return f"not a torch file: it starts with {magic[:8]!r}, not with a zip's {b'PK'!r}"


def _unpickled(records: dict[str, tuple[int, int]], archive: zipfile.ZipFile) -> tuple[str, Any]:
    """The root folder inside the zip, and the object of its data.pkl."""
    pickled = [n for n in records if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(pickled) != 1:
        raise ConvertError("a zip, but not of torch: no data.pkl inside")
    if (size := records[pickled[0]][1]) > _MAX_PICKLE_BYTES:
        raise ConvertError(f"data.pkl has {size:,} bytes; at most {_MAX_PICKLE_BYTES:,} are read")
    root = pickled[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in records and (records[order][1] > 9 or archive.read(order) != b"little"):
        raise ConvertError("stored big-endian, which is not supported")
    return root, load_pickle(archive.read(pickled[0]))


def _zip_records(file: Any, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Byte offset and size of each record's data. Every record must be uncompressed and lie in the
    file."""
    records: dict[str, tuple[int, int]] = {}
    size = os.fstat(file.fileno()).st_size
    for info in archive.infolist():
        name = info.filename
        if name in records:
            raise ConvertError(f"the zip names {name} twice")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ConvertError(f"{name} is compressed or encrypted; torch stores it plain")
        local = os.pread(file.fileno(), 30, max(0, info.header_offset))
        if len(local) < 30 or local[:4] != b"PK\3\4":
            raise ConvertError(f"no record at byte {info.header_offset} for {name}")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        if start + info.file_size > size:
            raise ConvertError(
                f"{name} ends at byte {start + info.file_size}, outside the file of {size} bytes"
            )
        records[name] = (start, info.file_size)
    return records


def _torch_slice(
    path: Path, name: str, tensor: TensorView, records: dict[str, tuple[int, int]], root: str
) -> TensorSlice:
    storage, offset, size, stride = tensor
    record = f"{root}data/{storage.key}"
    if record not in records:
        raise ConvertError(f"{path}: {name} is stored in {record}, which the file does not contain")
    start, length = records[record]
    numbers = (offset, storage.elements, *size[: MAX_RANK + 1], *stride[: MAX_RANK + 1])
    ranks = len(size) == len(stride) <= MAX_RANK
    if not ranks or not all(type(n) is int and 0 <= n < MAX_INT for n in numbers):
        given = f"offset {short(offset)}, shape {short(size)}, strides {short(stride)}"
        raise ConvertError(f"{path}: {name} has {given}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1
    itemsize = storage.dtype.itemsize
    if 0 not in size and (last > storage.elements or last * itemsize > length):
        raise ConvertError(
            f"{path}: {name} reaches element {last} of a storage that holds "
            f"{min(storage.elements, length // itemsize)}"
        )
    if (count := math.prod(size)) > storage.elements:
        raise ConvertError(
            f"{path}: {name} has {count} elements, which overlap in a storage of {storage.elements}"
        )
    return TensorSlice(path, start + offset * itemsize, size, stride, storage.dtype)


# Writing ------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """The layout of a ``.pth`` to be written: its small records and the location of each tensor."""

    small: dict[str, bytes]
    sizes: dict[str, int]
    """bytes of each record, in file order"""
    headers: dict[str, int]
    """byte offset of each record's local header"""
    data: dict[str, int]
    """byte offset of each record's data; a multiple of 64, as torch aligns"""
    end: int
    """byte offset of the central directory"""
    slices: dict[str, TensorSlice]
    records: dict[str, str]
    """tensor -> record"""


def plan(path: Path, tensors: dict[str, tuple[tuple[int, ...], np.dtype]]) -> Layout:
    """Lay out a zip that ``torch.load(path, weights_only=True)`` reads as a dict of these tensors
    (shape, dtype)."""
    root = path.stem
    records = {name: f"{root}/data/{i}" for i, name in enumerate(tensors)}
    small = {
        f"{root}/data.pkl": dump_pickle(tensors),
        f"{root}/byteorder": b"little",
        f"{root}/version": b"3\n",
    }
    sizes = {name: len(data) for name, data in small.items()}
    sizes |= {records[n]: math.prod(s) * d.itemsize for n, (s, d) in tensors.items()}
    headers, data, position = {}, {}, 0
    for record, size in sizes.items():
        headers[record] = position
        # A local header is 30 bytes, the name, the extra fields; the last pads (4 at least).
        start = position + 30 + len(record) + len(_zip64(size)) + 4
        data[record] = start + -start % 64
        position = data[record] + size
    slices = {
        n: TensorSlice(path, data[records[n]], shape, contiguous(shape), dtype)
        for n, (shape, dtype) in tensors.items()
    }
    return Layout(small, sizes, headers, data, position, slices, records)


def headers(plan: Layout, crc: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of everything but tensor data.

    Args:
      plan: the layout of the file.
      crc: CRC-32 of every tensor.
    """
    sums = {record: zlib.crc32(data) for record, data in plan.small.items()}
    sums |= {plan.records[name]: value for name, value in crc.items()}
    directory = b""
    for record, size in plan.sizes.items():
        name = record.encode()
        narrow = min(size, 0xFFFFFFFF)
        fixed = struct.pack("<HHHHHIII", 45, 0, 0, 0, 0x21, sums[record], narrow, narrow)
        extra = _zip64(size)
        pad = plan.data[record] - plan.headers[record] - 30 - len(name) - len(extra) - 4
        extra += struct.pack("<HH", 0x4246, pad) + b"Z" * pad  # "FB", torch's own padding field
        yield (
            plan.headers[record],
            b"PK\3\4" + fixed + struct.pack("<HH", len(name), len(extra)) + name + extra,
        )
        if record in plan.small:
            yield plan.data[record], plan.small[record]
        wide = [n for n in (size, size, plan.headers[record]) if n >= 0xFFFFFFFF]
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        where = min(plan.headers[record], 0xFFFFFFFF)
        directory += (
            b"PK\1\2\x2d\0"
            + fixed
            + struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, where)
        )
        directory += name + extra
    count, end = len(plan.sizes), plan.end
    yield end, directory
    where = end + len(directory)
    yield (
        where,
        struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), end),
    )
    yield where + 56, struct.pack("<4sIQI", b"PK\6\7", 0, where, 1)
    ends = [min(count, 0xFFFF)] * 2 + [min(len(directory), 0xFFFFFFFF), min(end, 0xFFFFFFFF)]
    yield where + 76, struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, *ends, 0)


def _zip64(size: int) -> bytes:
    return struct.pack("<HHQQ", 1, 16, size, size) if size >= 0xFFFFFFFF else b""
