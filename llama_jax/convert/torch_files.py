"""Torch's files, read and written natively: a ``.pth`` or ``.bin`` is a zip of raw storages and a
pickle.

A pickle can run code when it is loaded, or take any amount of time and memory, so Python's own
reader is not used: :func:`_load_pickle` carries out only the instructions that a state dict of
plain tensors needs, and refuses everything else by name. Torch is not needed. In comes a path, out
comes where each tensor lies, as a :class:`~llama_jax.convert.formats.Region`; or in come shapes,
out comes where bytes belong.

    python -m llama_jax.convert --inspect PATH
"""

import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.convert.formats import (
    DTYPES,
    MAX_INT,
    MAX_RANK,
    FormatError,
    Region,
    contiguous,
    open_weights,
    short,
)

_NAME_OF = {dtype: name for _, name, dtype in DTYPES}
_LARGEST_PICKLE = 4 << 20
"""bytes of data.pkl; a tensor takes about 200, and Llama 3.1 405B has 1,138"""
_LARGEST_DIRECTORY = 4 << 20
"""bytes of a zip's table of contents; a tensor takes about 80"""
_MOST_INSTRUCTIONS = 1_000_000
"""of a pickle; a tensor takes about 30"""


# --- the pickle ---


class _Storage(NamedTuple):
    """torch.FloatStorage and its like: a dtype."""

    dtype: np.dtype


class _Stored(NamedTuple):
    """A storage: a record of the zip."""

    key: str
    dtype: np.dtype
    elements: int


class _View(NamedTuple):
    """A tensor: a part of a storage."""

    storage: _Stored
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _new_dict(pairs: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    _set_items(made, [x for pair in pairs for x in pair])
    return made


def _tensor(storage, offset, size, stride, requires_grad, hooks, metadata=None) -> _View:
    if not isinstance(storage, _Stored):
        raise FormatError(f"{short(storage)} is not a storage")
    return _View(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    return data


# What a name in a pickle stands for; nothing that a pickle could change.
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _new_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
} | {("torch", name): _Storage(dtype) for _, name, dtype in DTYPES}
_FUNCTIONS = (_new_dict, _tensor, _parameter)


def _named(module: Any, name: Any) -> Any:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise FormatError(f"its pickle asks for {short((module, name))}, which is not a name")
    try:
        return _NAMES[module, name]
    except KeyError:
        raise FormatError(
            f"its pickle asks for {module[:80]}.{name[:80]}, which a state dict of plain tensors "
            "does not need; such a file can run code when it is loaded, so it is refused"
        ) from None


def _storage(pid: Any) -> _Stored:
    if isinstance(pid, tuple) and len(pid) == 5:
        kind, storage, key, _, count = pid
        if kind == "storage" and isinstance(storage, _Storage) and isinstance(key, str):
            return _Stored(key, storage.dtype, count)
    raise FormatError(f"its pickle refers to {short(pid)}, which is not a storage")


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise FormatError("its pickle puts items into something that is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # The hash of a tuple that holds another one twice, and so on, takes for ever.
        if not isinstance(key, str | int | float | None):
            raise FormatError(f"its pickle has a dict with the key {short(key)}")
        target[key] = value


def _append(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise FormatError("its pickle appends to something that is not a list")
    target += items


def _call(function: Any, arguments: Any) -> Any:
    if not any(function is known for known in _FUNCTIONS) or not isinstance(arguments, tuple):
        raise FormatError("its pickle calls something that is not a function")
    return function(*arguments)


def _value(arg: Any) -> Any:
    if isinstance(arg, int) and abs(arg) >= MAX_INT:
        raise FormatError("its pickle holds a number of more than 62 bits")
    return arg


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip


def _load_pickle(data: bytes) -> Any:
    """The object of a pickle: dicts, lists, tuples, numbers, strings and :class:`_View`.

    Raises:
      FormatError: an instruction or name that a state dict of plain tensors does not need.
      Exception: anything else that a damaged pickle leads to.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def pop(count: int) -> tuple[Any, ...]:
        if len(stack) < count:
            raise FormatError("its pickle takes more values than it made")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return tuple(taken)

    def pop_to_mark() -> list[Any]:
        if not marks:
            raise FormatError("its pickle lacks a mark")
        return list(pop(max(0, len(stack) - marks.pop())))

    for count, (info, arg, _) in enumerate(pickletools.genops(data)):
        if count == _MOST_INSTRUCTIONS:
            raise FormatError(f"its pickle has over {_MOST_INSTRUCTIONS:,} instructions")
        match info.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in _VALUES:
                stack.append(_value(arg))
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            case "MARK":
                marks.append(len(stack))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(pop(int(name[-1])))
            case "LIST":
                stack.append(pop_to_mark())
            case "DICT":
                items = pop_to_mark()
                stack.append({})
                _set_items(stack[-1], items)
            case "SETITEM":
                items = list(pop(2))
                _set_items(stack[-1], items)
            case "SETITEMS":
                items = pop_to_mark()
                _set_items(stack[-1], items)
            case "APPEND":
                items = list(pop(1))
                _append(stack[-1], items)
            case "APPENDS":
                items = pop_to_mark()
                _append(stack[-1], items)
            case "GLOBAL":
                stack.append(_named(*str(arg).split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(*pop(2)))
            case "BINPERSID":
                stack.append(_storage(*pop(1)))
            case "REDUCE":
                stack.append(_call(*pop(2)))
            case "BUILD":  # the attributes of a dict: a module's state dict carries _metadata
                pop(1)
                _set_items(stack[-1], [])
            case "STOP":
                return stack[-1]
            case name:
                raise FormatError(
                    f"its pickle has the instruction {name}, which a state dict of plain tensors "
                    "does not need; such a file can run code when it is loaded, so it is refused"
                )
    raise FormatError("its pickle has no end")


# --- the zip ---


class _Bounded(io.RawIOBase):
    """A file for :mod:`zipfile`, which reads as much at once as the file tells it to."""

    def __init__(self, file: Any):
        self._file = file

    def read(self, size: int | None = -1) -> bytes:
        rest = os.fstat(self._file.fileno()).st_size - self._file.tell()
        if (rest if size is None or size < 0 else min(size, rest)) > _LARGEST_DIRECTORY:
            raise FormatError(
                f"the zip's table of contents has over {_LARGEST_DIRECTORY:,} bytes, for thousands "
                "of tensors"
            )
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def read(path: Path) -> dict[str, Region]:
    """Where the tensors of a ``.pth`` or ``.bin`` (torch 1.6 or newer) lie; raises
    :class:`FormatError`.

    The tensors may be nested under "model" or "state_dict"; entries that are not tensors are left
    out.
    """
    with open_weights(path) as file:
        magic = file.read(16)
        if not magic.startswith(b"PK"):
            raise FormatError(f"{path}: {_not_a_zip(magic)}")
        try:
            with zipfile.ZipFile(_Bounded(file)) as archive:  # type: ignore[call-overload]
                records = _zip_records(file, archive)
                root, tree = _unpickled(records, archive)
        except (zipfile.BadZipFile, EOFError, struct.error) as e:
            raise FormatError(
                f"{path}: the zip is damaged or cut off ({e}); copy or download it again"
            ) from None
        except FormatError as e:
            raise FormatError(f"{path}: {e}") from None
        except OSError:
            raise
        except Exception as e:  # a hostile zip or pickle fails in any way it likes
            raise FormatError(f"{path}: the zip or data.pkl cannot be read: {short(e)}") from None
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


def _not_a_zip(magic: bytes) -> str:
    if magic.startswith((b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P", b"\x80\x02}", b"\x80\x02c")):
        return "written by torch before 1.6 (not a zip); load it with torch and save it again"
    return f"not a torch file: it starts with {magic[:8]!r}, not with a zip's {b'PK'!r}"


def _unpickled(records: dict[str, tuple[int, int]], archive: zipfile.ZipFile) -> tuple[str, Any]:
    """The folder inside the zip that holds everything, and the object of its data.pkl."""
    pickled = [n for n in records if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(pickled) != 1:
        raise FormatError("a zip, but not of torch: no data.pkl inside")
    if (size := records[pickled[0]][1]) > _LARGEST_PICKLE:
        raise FormatError(f"data.pkl has {size:,} bytes; at most {_LARGEST_PICKLE:,} are read")
    root = pickled[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in records and (records[order][1] > 9 or archive.read(order) != b"little"):
        raise FormatError("stored big-endian, which is not supported")
    return root, _load_pickle(archive.read(pickled[0]))


def _zip_records(file: Any, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Byte offset and size of each record's data; every record must be stored as it is and lie
    in the file."""
    records: dict[str, tuple[int, int]] = {}
    size = os.fstat(file.fileno()).st_size
    for info in archive.infolist():
        name = info.filename
        if name in records:
            raise FormatError(f"the zip names {name} twice")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise FormatError(f"{name} is compressed or encrypted; torch stores it plain")
        local = os.pread(file.fileno(), 30, max(0, info.header_offset))
        if len(local) < 30 or local[:4] != b"PK\3\4":
            raise FormatError(f"no record at byte {info.header_offset} for {name}")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        if start + info.file_size > size:
            raise FormatError(
                f"{name} ends at byte {start + info.file_size}, outside the file of {size} bytes"
            )
        records[name] = (start, info.file_size)
    return records


def _torch_region(
    path: Path, name: str, tensor: _View, records: dict[str, tuple[int, int]], root: str
) -> Region:
    storage, offset, size, stride = tensor
    record = f"{root}data/{storage.key}"
    if record not in records:
        raise FormatError(f"{path}: {name} lies in {record}, which the file does not hold")
    start, length = records[record]
    numbers = (offset, storage.elements, *size[: MAX_RANK + 1], *stride[: MAX_RANK + 1])
    ranks = len(size) == len(stride) <= MAX_RANK
    if not ranks or not all(type(n) is int and 0 <= n < MAX_INT for n in numbers):
        given = f"offset {short(offset)}, shape {short(size)}, strides {short(stride)}"
        raise FormatError(f"{path}: {name} has {given}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1
    itemsize = storage.dtype.itemsize
    if 0 not in size and (last > storage.elements or last * itemsize > length):
        raise FormatError(
            f"{path}: {name} reaches element {last} of a storage that holds "
            f"{min(storage.elements, length // itemsize)}"
        )
    if (count := math.prod(size)) > storage.elements:
        raise FormatError(
            f"{path}: {name} has {count} elements, which overlap in a storage of {storage.elements}"
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
        narrow = min(size, 0xFFFFFFFF)
        fixed = struct.pack("<HHHHHIII", 45, 0, 0, 0, 0x21, crc[record], narrow, narrow)
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
