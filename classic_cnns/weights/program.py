"""Interprets the pickle programs of `torch.save`, opcode by opcode, executing nothing.

A program can make containers, plain values and descriptions of tensors. Whatever else it names is
an error, before anything of it is looked up.
"""

from __future__ import annotations

import dataclasses
import pickletools
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_DTYPES: dict[str, Any] = {
    "Float": np.float32,
    "Double": np.float64,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
_MAX_OPCODES = 20_000_000
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the program may use."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """Numbers of one type, not read yet."""

    key: str
    dtype: Any
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def run(stream: BinaryIO) -> Any:
    """Interprets one pickle program, leaving the stream behind it."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if count > _MAX_OPCODES:
            raise ValueError("its program is too long")
        if name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            return stack.pop()
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _WITH_ARGUMENT:
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            items = stack[-size:]
            del stack[-size:]
            stack.append(tuple(items))
        elif name in ("TUPLE", "LIST"):
            items = since_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("DICT", "SETITEMS"):
            items = since_mark()
            if name == "DICT":
                stack.append({})
            _set(stack[-1], items)
        elif name == "SETITEM":
            items = stack[-2:]
            del stack[-2:]
            _set(stack[-1], items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            if not isinstance(stack[-1], list):
                raise ValueError("something that is not a list is appended to")
            stack[-1].extend(items)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_allowed(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            items = stack[-2:]
            del stack[-2:]
            stack.append(_allowed(*items))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_reduce(stack.pop(), arguments))
        elif name == "BUILD":  # attributes of a container, such as a state dict's _metadata
            stack.pop()
            if not isinstance(stack[-1], (dict, Tensor)):
                raise ValueError("it sets the state of an object")
        else:
            raise ValueError(f"its program uses the opcode {name}, which tensors do not need")
    raise ValueError("its program does not end")


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_WITH_ARGUMENT = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("something that is not a dict is set by key")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int, float, bytes, type(None), tuple)):
            raise ValueError("a dict has a key that is not a plain value")
        if key in target:
            raise ValueError(f"the key {key!r} is there twice")
        target[key] = value


def _allowed(module: Any, name: Any) -> Global:
    storage = module == "torch" and str(name).removesuffix("Storage") in _DTYPES
    rebuild = module == "torch._utils" and name in _REBUILD
    container = (module, name) in (("collections", "OrderedDict"), ("torch", "Size"))
    if not (storage or rebuild or container):
        raise ValueError(f"it refers to {module}.{name}, which is refused")
    return Global(module, name)


def _storage(persistent: Any) -> Storage:
    tag, kind, key, _, count, *rest = persistent
    if tag != "storage" or not isinstance(kind, Global) or kind.module != "torch":
        raise ValueError("it refers to something outside that is not a storage")
    if any(r is not None for r in rest):
        raise ValueError("a storage is a view of another, which PyTorch before 0.4 wrote")
    return Storage(str(key), _DTYPES[kind.name.removesuffix("Storage")], int(count))


def _reduce(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("it calls something that is not a function")
    if function.name == "OrderedDict":
        out: dict[Any, Any] = {}
        for pair in arguments[0] if arguments else []:
            _set(out, list(pair))
        return out
    if function.name == "Size":
        return tuple(arguments[0])
    if function.name == "_rebuild_parameter":
        return arguments[0]
    if function.name not in _REBUILD:
        raise ValueError(f"it calls {function.module}.{function.name}")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    return Tensor(storage, offset, tuple(shape), tuple(strides))
