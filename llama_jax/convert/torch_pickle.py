"""Read and write the pickle in torch's files without torch and without executing code.

A pickle can execute code or use unlimited time and memory when it is loaded, so Python's own reader
is not used: :func:`load_pickle` executes only the instructions that a state dict of plain tensors
needs, and refuses every other one by name.
"""

import math
import pickletools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llama_jax.convert.formats import DTYPES, MAX_INT, ConvertError, contiguous, short

_STORAGE_NAME = {dtype: name for _, name, dtype in DTYPES}
_MAX_INSTRUCTIONS = 1_000_000
"""limit on instructions of a pickle; a tensor takes about 30"""


class _StorageType(NamedTuple):
    """A storage class of torch, such as torch.FloatStorage."""

    dtype: np.dtype


class _Storage(NamedTuple):
    """A storage: a record of the zip."""

    key: str
    dtype: np.dtype
    elements: int


class TensorView(NamedTuple):
    """A tensor: a strided part of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _new_dict(pairs: Any = ()) -> dict[Any, Any]:
    new: dict[Any, Any] = {}
    _set_items(new, [x for pair in pairs for x in pair])
    return new


def _tensor(storage, offset, size, stride, requires_grad, hooks, metadata=None) -> TensorView:
    if not isinstance(storage, _Storage):
        raise ConvertError(f"{short(storage)} is not a storage")
    return TensorView(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    return data


# The names that a pickle may use. No value is mutable, so a pickle cannot change them.
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _new_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
} | {("torch", name): _StorageType(dtype) for _, name, dtype in DTYPES}
_FUNCTIONS = (_new_dict, _tensor, _parameter)


def _named(module: Any, name: Any) -> Any:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ConvertError(f"its pickle asks for {short((module, name))}, which is not a name")
    try:
        return _NAMES[module, name]
    except KeyError:
        raise ConvertError(
            f"its pickle asks for {module[:80]}.{name[:80]}, which a state dict of plain tensors "
            "does not need; such a file can run code when it is loaded, so it is refused"
        ) from None


def _storage(pid: Any) -> _Storage:
    if isinstance(pid, tuple) and len(pid) == 5:
        kind, storage_type, key, _, count = pid
        if kind == "storage" and isinstance(storage_type, _StorageType) and isinstance(key, str):
            return _Storage(key, storage_type.dtype, count)
    raise ConvertError(f"its pickle refers to {short(pid)}, which is not a storage")


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ConvertError("its pickle puts items into something that is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing nested tuples that each hold the previous one twice takes exponential time.
        if not isinstance(key, str | int | float | None):
            raise ConvertError(f"its pickle has a dict with the key {short(key)}")
        target[key] = value


def _append(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise ConvertError("its pickle appends to something that is not a list")
    target += items


def _call(function: Any, arguments: Any) -> Any:
    if not any(function is known for known in _FUNCTIONS) or not isinstance(arguments, tuple):
        raise ConvertError("its pickle calls something that is not a function")
    return function(*arguments)


def _value(arg: Any) -> Any:
    if isinstance(arg, int) and abs(arg) >= MAX_INT:
        raise ConvertError("its pickle holds a number of more than 62 bits")
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


class _Stack(list[Any]):
    """The stack of a pickle, and its marks."""

    def __init__(self) -> None:
        self.marks: list[int] = []

    def take(self, count: int) -> tuple[Any, ...]:
        if len(self) < count:
            raise ConvertError("its pickle pops more values than it pushed")
        taken = self[len(self) - count :]
        del self[len(self) - count :]
        return tuple(taken)

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise ConvertError("its pickle has no mark")
        return list(self.take(max(0, len(self) - self.marks.pop())))


def load_pickle(data: bytes) -> Any:
    """The object of a pickle: dicts, lists, tuples, numbers, strings and :class:`TensorView`.

    Raises:
      ConvertError: an instruction or name that a state dict of plain tensors does not need.
      Exception: of any type, for a damaged pickle.
    """
    stack = _Stack()
    memo: dict[Any, Any] = {}
    for count, (info, arg, _) in enumerate(pickletools.genops(data)):
        if count == _MAX_INSTRUCTIONS:
            raise ConvertError(f"its pickle has over {_MAX_INSTRUCTIONS:,} instructions")
        match info.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in _VALUES:
                stack.append(_value(arg))
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            case "MARK":
                stack.marks.append(len(stack))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "TUPLE":
                stack.append(tuple(stack.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(stack.take(int(name[-1])))
            case "LIST":
                stack.append(stack.pop_to_mark())
            case "DICT":
                items = stack.pop_to_mark()
                stack.append({})
                _set_items(stack[-1], items)
            case "SETITEM" | "SETITEMS" as name:
                items = list(stack.take(2)) if name == "SETITEM" else stack.pop_to_mark()
                _set_items(stack[-1], items)
            case "APPEND" | "APPENDS" as name:
                items = list(stack.take(1)) if name == "APPEND" else stack.pop_to_mark()
                _append(stack[-1], items)
            case "GLOBAL":
                stack.append(_named(*str(arg).split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(*stack.take(2)))
            case "BINPERSID":
                stack.append(_storage(*stack.take(1)))
            case "REDUCE":
                stack.append(_call(*stack.take(2)))
            case "BUILD":  # attributes of a dict, such as _metadata of a module's state dict
                stack.take(1)
                _set_items(stack[-1], [])
            case "STOP":
                return stack[-1]
            case name:
                raise ConvertError(
                    f"its pickle has the instruction {name}, which a state dict of plain tensors "
                    "does not need; such a file can run code when it is loaded, so it is refused"
                )
    raise ConvertError("its pickle has no end")


def dump_pickle(tensors: dict[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """The pickle (protocol 2) of {name: tensor}, as torch writes it."""

    def text(s: str) -> bytes:
        return b"X" + struct.pack("<I", len(s.encode())) + s.encode()

    def integer(n: int) -> bytes:
        return b"J" + struct.pack("<i", n) if n < 1 << 31 else b"\x8a\x08" + struct.pack("<q", n)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    out = b"\x80\x02}("
    for key, (name, (shape, dtype)) in enumerate(tensors.items()):
        storage_type = f"ctorch\n{_STORAGE_NAME[dtype]}\n".encode()
        storage = text("storage") + storage_type + text(str(key)) + text("cpu")
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        out += b"(" + storage + integer(math.prod(shape)) + b"tQ" + integer(0)
        out += numbers(shape) + numbers(contiguous(shape)) + b"\x89ccollections\nOrderedDict\n)Rt"
        out += b"R"
    return out + b"u."
