"""Torch's files, read and written natively: a ``.pth`` or ``.bin`` is a zip of raw storages and a
pickle.

A pickle can run code when it is loaded, so ours may name only what a state dict of plain tensors
needs; everything else is refused by name. Torch is not needed. In comes a path, out comes where
each tensor lies, as a :class:`~llama_jax.conversion.formats.Region`; or in come shapes, out comes
where bytes
belong.

    python -m llama_jax.convert --inspect PATH
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.conversion.formats import DTYPES, FormatError, Region, contiguous

_NAME_OF = {dtype: name for _, name, dtype in DTYPES}


class _Storage(NamedTuple):
    dtype: np.dtype


class _Named:
    """What a name in a pickle stands for: callable, without attributes that the pickle could
    set."""

    __slots__ = ()


class _NewDict(_Named):
    def __call__(self, *args: Any) -> "_Dict":
        return _Dict(*args)


class _Dict(dict):
    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drop attributes: a module's state dict carries `_metadata`."""


class _Parameter(_Named):
    def __call__(self, data: Any, requires_grad: Any, hooks: Any) -> Any:
        return data


class _Tensor(_Named):
    def __call__(self, storage, offset, size, stride, requires_grad, hooks, metadata=None) -> Any:
        if not isinstance(storage, _Stored):
            raise FormatError(f"{storage!r} is not a storage")
        return _View(storage, offset, tuple(size), tuple(stride))


class _Stored(NamedTuple):
    key: str
    dtype: np.dtype
    elements: int


class _View(NamedTuple):
    storage: _Stored
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _NewDict(),
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
} | {("torch", name): _Storage(dtype) for _, name, dtype in DTYPES}


class _Unpickler(pickle.Unpickler):
    """Builds dicts of :class:`_View` and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise FormatError(
                f"its pickle asks for {module}.{name}, which a state dict of plain tensors does "
                "not need; "
                "such a file can run code when it is loaded, so it is refused"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _location, count = pid
        if kind != "storage" or not isinstance(storage, _Storage) or type(count) is not int:
            raise FormatError(f"its pickle refers to {pid!r}, which is not a storage")
        return _Stored(str(key), storage.dtype, count)


def read(path: Path) -> dict[str, Region]:
    """Where the tensors of a ``.pth`` or ``.bin`` (torch 1.6 or newer) lie; raises
    :class:`FormatError`.

    The tensors may be nested under "model" or "state_dict"; entries that are not tensors are left
    out.
    """
    with path.open("rb") as f:
        magic = f.read(16)
    if not magic.startswith(b"PK"):
        legacy = magic.startswith(
            (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P", b"\x80\x02}", b"\x80\x02c")
        )
        raise FormatError(
            f"{path}: written by torch before 1.6 (not a zip); load it with torch and save it again"
            if legacy
            else f"{path}: not a torch file: it starts with {magic[:8]!r}, not with a zip's "
            f"{b'PK'!r}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            records = _zip_records(path, archive)
            pickled = [n for n in records if n.endswith("/data.pkl") and n.count("/") == 1]
            if len(pickled) != 1 or records[pickled[0]][1] > 64 << 20:
                raise FormatError(f"{path}: a zip, but not of torch: no data.pkl inside")
            root = pickled[0].removesuffix("data.pkl")
            if (order := f"{root}byteorder") in records and archive.read(order) != b"little":
                raise FormatError(f"{path}: stored big-endian, which is not supported")
            with archive.open(pickled[0]) as f:
                tree = _Unpickler(f).load()
    except (zipfile.BadZipFile, EOFError, struct.error) as e:
        raise FormatError(
            f"{path}: the zip is damaged or cut off ({e}); copy or download it again"
        ) from None
    except FormatError as e:
        raise FormatError(str(e) if str(path) in str(e) else f"{path}: {e}") from None
    except OSError:
        raise
    except Exception as e:  # a hostile pickle fails in any way it likes
        raise FormatError(f"{path}: data.pkl cannot be read: {e!r}") from None
    for nest in ("model", "state_dict"):
        if isinstance(tree, dict) and isinstance(tree.get(nest), dict):
            tree = tree[nest]
    views = (
        {str(k): v for k, v in tree.items() if isinstance(v, _View)}
        if isinstance(tree, dict)
        else {}
    )
    if not views:
        raise FormatError(f"{path}: holds no tensors")
    return {name: _torch_region(path, name, v, records, root) for name, v in views.items()}


def _zip_records(path: Path, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Byte offset and size of each record's data; every record must be stored as it is and lie
    in the file."""
    records: dict[str, tuple[int, int]] = {}
    size = path.stat().st_size
    with path.open("rb") as f:
        for info in archive.infolist():
            if info.filename in records:
                raise FormatError(f"{path}: the zip names {info.filename} twice")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise FormatError(
                    f"{path}: {info.filename} is compressed or encrypted; torch stores it plain"
                )
            f.seek(info.header_offset)
            local = f.read(30)
            if len(local) < 30 or local[:4] != b"PK\3\4":
                raise FormatError(
                    f"{path}: no record at byte {info.header_offset} for {info.filename}"
                )
            start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
            if start + info.file_size > size:
                raise FormatError(
                    f"{path}: {info.filename} ends at byte {start + info.file_size}, "
                    f"outside the file of {size} bytes"
                )
            records[info.filename] = (start, info.file_size)
    return records


def _torch_region(
    path: Path, name: str, tensor: _View, records: dict[str, tuple[int, int]], root: str
) -> Region:
    storage, offset, size, stride = tensor
    record = f"{root}data/{storage.key}"
    if record not in records:
        raise FormatError(f"{path}: {name} lies in {record}, which the file does not hold")
    start, length = records[record]
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise FormatError(f"{path}: {name} has offset {offset}, shape {size}, strides {stride}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1
    itemsize = storage.dtype.itemsize
    if 0 not in size and (last > storage.elements or last * itemsize > length):
        raise FormatError(
            f"{path}: {name} reaches element {last} of a storage that holds "
            f"{min(storage.elements, length // itemsize)}"
        )
    return Region(path, start + offset * itemsize, size, stride, storage.dtype)


# --- writing ---


class Layout(NamedTuple):
    """A ``.pth`` to be: its small records, and where each tensor's bytes belong."""

    small: dict[str, bytes]
    sizes: dict[str, int]
    """bytes of each record, in the order of the file"""
    headers: dict[str, int]
    """byte offset of each record's local header"""
    data: dict[str, int]
    """byte offset of each record's data; a multiple of 64, as torch aligns"""
    end: int
    """byte offset of the central directory"""
    regions: dict[str, Region]
    records: dict[str, str]
    """tensor -> record"""


def plan(path: Path, tensors: dict[str, tuple[tuple[int, ...], np.dtype]]) -> Layout:
    """Lay out a zip that ``torch.load(path, weights_only=True)`` reads as a dict of these
    (shape, dtype)."""
    root = path.stem
    records = {name: f"{root}/data/{i}" for i, name in enumerate(tensors)}
    small = {
        f"{root}/data.pkl": _pickle_state(tensors),
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
    regions = {
        n: Region(path, data[records[n]], shape, contiguous(shape), dtype)
        for n, (shape, dtype) in tensors.items()
    }
    return Layout(small, sizes, headers, data, position, regions, records)


def headers(plan: Layout, crc: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of all that is not tensor data; `crc` has the CRC-32 of every record
    of :class:`Layout`."""
    directory = b""
    for record, size in plan.sizes.items():
        name = record.encode()
        short = min(size, 0xFFFFFFFF)
        fixed = struct.pack("<HHHHHIII", 45, 0, 0, 0, 0x21, crc[record], short, short)
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


def _pickle_state(tensors: dict[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """The pickle (protocol 2) of {name: tensor}, as torch writes it: opcodes by hand, since
    torch is not here."""

    def text(s: str) -> bytes:
        return b"X" + struct.pack("<I", len(s.encode())) + s.encode()

    def integer(n: int) -> bytes:
        return b"J" + struct.pack("<i", n) if n < 1 << 31 else b"\x8a\x08" + struct.pack("<q", n)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    out = b"\x80\x02}("
    for key, (name, (shape, dtype)) in enumerate(tensors.items()):
        storage = (
            text("storage") + f"ctorch\n{_NAME_OF[dtype]}\n".encode() + text(str(key)) + text("cpu")
        )
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        out += b"(" + storage + integer(math.prod(shape)) + b"tQ" + integer(0)
        out += numbers(shape) + numbers(contiguous(shape)) + b"\x89ccollections\nOrderedDict\n)Rt"
        out += b"R"
    return out + b"u."
