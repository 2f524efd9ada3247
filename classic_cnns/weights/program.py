"""Interprets the pickle programs of `torch.save`, opcode by opcode, executing nothing.

A program can make containers, plain values and descriptions of tensors. Whatever else it names is
an error, before anything of it is looked up. Every step is counted, every type checked, and no
value is compared, hashed or printed whose cost a program could drive up.
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
MAX_STEPS = 1_000_000  # ResNet-152 takes 60,000
_MAX_BITS = 80  # of an integer: PyTorch's magic number has 77
_MAX_AXES = 32
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4")
_PLAIN = {
    *("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


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
    """Interprets one pickle program, leaving the stream behind it.

    Args:
        stream: whose `read` returns no more than there is, however much is asked for.

    Returns:
        Dicts, lists and tuples, perhaps in themselves, of plain values, `Tensor`, `Storage` and
        `Global`.

    Raises:
        ValueError: the program is malformed, too long, or wants what tensors do not need.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.spend(1)
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError) as error:
        raise ValueError("its program takes a value that is not there") from error
    raise ValueError("its program does not end")


def short(value: Any) -> str:
    """A string of a file for people: quoted, cut, and without control characters."""
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    return ascii(value if len(value) <= 60 else f"{value[:60]}…")


class _Machine:
    """The state of one program.

    Attributes:
        stack: values since the last mark.
        marked: the stacks below the marks.
        memo: values by number.
        steps: that it has taken.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise ValueError(f"its program takes more than {MAX_STEPS:,} steps")

    def pop(self) -> Any:
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marked.append(self.stack)
                self.stack = []
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([self.pop() for _ in range(int(name[-1]))][::-1]))
            case "TUPLE":
                items = self.since_mark()
                self.stack.append(tuple(items))
            case "SETITEMS":
                items = self.since_mark()
                _set(self.stack[-1], items)
            case "SETITEM":
                items = [self.pop(), self.pop()][::-1]
                _set(self.stack[-1], items)
            case "APPEND" | "APPENDS":
                items = [self.pop()] if name == "APPEND" else self.since_mark()
                if not isinstance(self.stack[-1], list):
                    raise ValueError("something that is not a list is appended to")
                self.stack[-1].extend(items)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "GLOBAL":
                push(_allowed(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                items = [self.pop(), self.pop()][::-1]
                push(_allowed(*items))
            case "BINPERSID":
                push(_storage(self.pop()))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                push(self.reduce(function, arguments))
            case "BUILD":  # attributes of a container, such as a state dict's _metadata
                self.pop()
                if not isinstance(self.stack[-1], (dict, Tensor)):
                    raise ValueError("it sets the state of an object")
            case _ if name in _CONSTANTS:
                push(_CONSTANTS[name])
            case _ if name in _PLAIN:
                push(argument)
            case _ if name in _INTEGERS:
                if argument.bit_length() > _MAX_BITS:
                    raise ValueError(f"a number has {argument.bit_length():,} bits")
                push(argument)
            case _:
                raise ValueError(f"its program uses the opcode {name}, which tensors do not need")

    def reduce(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is not a function")
        match function.name, arguments:
            case "OrderedDict", ():
                return {}
            case "OrderedDict", (list(pairs),):  # as Python 2 wrote them
                self.spend(len(pairs))  # the same list can be given again and again
                out: dict[Any, Any] = {}
                for pair in pairs:
                    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                        raise ValueError("a dict is made of something that is not pairs")
                    _set(out, list(pair))
                return out
            case "Size", (sizes,):
                return _sizes(sizes)
            case "_rebuild_parameter", (Tensor() as tensor, *_):
                return tensor
            case (
                ("_rebuild_tensor" | "_rebuild_tensor_v2"),
                (
                    Storage() as storage,
                    offset,
                    shape,
                    strides,
                    *_,
                ),
            ):
                shape, strides = _sizes(shape), _sizes(strides)
                if len(shape) != len(strides):
                    raise ValueError("a tensor has another number of strides than axes")
                return Tensor(storage, _sizes((offset,))[0], shape, strides)
        raise ValueError(f"it calls {function.module}.{function.name} with what it does not take")


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("something that is not a dict is set by key")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Tuples are no keys: hashing nested ones can take for ever.
        if not isinstance(key, (str, int, float, bytes, type(None))):
            raise ValueError("a dict has a key that is not a plain value")
        if key in target:
            name = short(key) if isinstance(key, str) else "of a dict"
            raise ValueError(f"the key {name} is there twice")
        target[key] = value


def _allowed(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("it refers to something whose name is not text")
    storage = module == "torch" and name.removesuffix("Storage") in _DTYPES
    rebuild = module == "torch._utils" and name in _REBUILD
    container = (module, name) in (("collections", "OrderedDict"), ("torch", "Size"))
    if not (storage or rebuild or container):
        raise ValueError(f"it refers to {short(f'{module}.{name}')}, which is refused")
    return Global(module, name)


def _storage(persistent: Any) -> Storage:
    match persistent:
        case ("storage", Global("torch", name), str(key), str(), int(count), *rest) if (
            name.endswith("Storage") and len(key) <= 100 and count >= 0
        ):
            if any(r is not None for r in rest):
                raise ValueError("a storage is a view of another, which PyTorch before 0.4 wrote")
            return Storage(key, _DTYPES[name.removesuffix("Storage")], count)
    raise ValueError("it refers to something outside that is not a storage")


def _sizes(values: Any) -> tuple[int, ...]:
    """Shapes, strides and offsets."""
    if not isinstance(values, (list, tuple)) or len(values) > _MAX_AXES:
        raise ValueError(f"a shape or stride is not a sequence of up to {_MAX_AXES} numbers")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in values):
        raise ValueError("a tensor has an impossible shape, stride or offset")
    return tuple(values)
