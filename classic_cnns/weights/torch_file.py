"""Reads .pth, .pt and .th files without PyTorch and without executing anything.

A file of `torch.save` is a pickle program that builds containers around tensors (see program.py),
with the numbers beside it: in members of a zip file, or, before PyTorch 1.6, after the program.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from classic_cnns.errors import DataError, printable
from classic_cnns.weights.program import MAX_STEPS, Global, Storage, Tensor, run, short

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PROGRAM = 64 << 20  # bytes; ResNet-152's has 80,000
_MAX_DEPTH = 50


def read_torch(path: str | Path) -> Any:
    """What was saved, with every tensor as a NumPy array.

    Arrays are read-only views of the mapped file, with the strides they were saved with, so that
    no file costs more memory than its own size. bfloat16 comes as `ml_dtypes.bfloat16`.

    Raises:
        DataError: not such a file, damaged, or one that holds anything but tensors, containers and
            plain values; names the file and the reason.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. Fix: the path")
    try:
        with path.open("rb") as file:
            start = file.read(2)
            if start not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise ValueError("it is neither a zip file nor a pickle")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _read_zip(path, mapped) if start == b"PK" else _read_legacy(mapped)
    except (ValueError, OSError, EOFError, struct.error, MemoryError) as error:
        reason = printable(str(error)[:300]) or type(error).__name__
        raise DataError(
            f"{path}: not a readable PyTorch file: {reason}. Fix: another file"
        ) from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, OverflowError) as error:
        reason = printable(str(error)[:300]) or type(error).__name__
        raise DataError(f"{path}: damaged: {reason}. Fix: another file") from error


def _read_zip(path: Path, mapped: mmap.mmap) -> Any:
    data = np.frombuffer(mapped, np.uint8)
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        if len(infos) != len(archive.infolist()):
            raise ValueError("two members have the same name")
    programs = [name for name in infos if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError(f"{len(programs)} members are called data.pkl, not one")
    root = programs[0].removesuffix("data.pkl")

    def member(name: str) -> np.ndarray:
        info = infos.get(name)
        if info is None:
            raise ValueError(f"member {short(name)} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"member {short(name)} is compressed, which torch.save never does")
        header = data[max(info.header_offset, 0) :][:30].tobytes()
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"member {short(name)} has no header")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if begin + info.file_size > len(data):
            raise ValueError(f"member {short(name)} is cut short")
        return data[begin : begin + info.file_size]

    order = f"{root}byteorder"
    if order in infos and member(order)[:10].tobytes() != b"little":
        raise ValueError("its numbers are not little-endian")
    program = member(programs[0])
    if len(program) > _MAX_PROGRAM:
        raise ValueError(f"its program has more than {_MAX_PROGRAM >> 20} MiB")
    value = run(io.BytesIO(program.tobytes()))
    return _fill(value, lambda storage: member(f"{root}data/{storage.key}"))


def _read_legacy(mapped: mmap.mmap) -> Any:
    stream: Any = mapped
    magic, version, system = run(stream), run(stream), run(stream)
    if magic != _LEGACY_MAGIC:
        raise ValueError("it does not start with PyTorch's magic number")
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("it is of an unknown version, or its numbers are not little-endian")
    value, keys = run(stream), run(stream)
    sizes: dict[str, int] = {}
    for storage in _storages(value):
        size = np.dtype(storage.dtype).itemsize
        if sizes.setdefault(storage.key, size) != size:
            raise ValueError(f"storage {short(storage.key)} is of two types")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("its storages have no list of names")
    storages: dict[str, np.ndarray] = {}
    data = np.frombuffer(mapped, np.uint8)
    for key in keys:
        if key not in sizes or key in storages:
            problem = "is there twice" if key in storages else "belongs to no tensor"
            raise ValueError(f"storage {short(key)} {problem}")
        wanted = struct.unpack("<q", mapped.read(8))[0] * sizes[key]
        left = len(data) - mapped.tell()
        if not 0 <= wanted <= left:
            raise ValueError(f"storage {short(key)} claims {wanted:,} bytes, {left:,} are left")
        storages[key] = data[mapped.tell() :][:wanted]
        mapped.seek(wanted, 1)
    return _fill(value, lambda storage: storages.get(storage.key))


def _fill(value: Any, raw: Callable[[Storage], np.ndarray | None]) -> Any:
    """Puts arrays in place of tensors; a container that is in itself is an error."""
    steps = itertools.count()

    def fill(value: Any, depth: int) -> Any:
        _limit(next(steps), depth)
        if isinstance(value, Tensor):
            return _array(value, raw(value.storage))
        if isinstance(value, dict):
            return {key: fill(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([fill(item, depth + 1) for item in value])
        if isinstance(value, (Global, Storage)):
            raise ValueError(f"a bare {type(value).__name__.lower()} is not a value")
        return value

    return fill(value, 0)


def _storages(value: Any) -> Iterator[Storage]:
    steps = itertools.count()

    def walk(value: Any, depth: int) -> Iterator[Storage]:
        _limit(next(steps), depth)
        if isinstance(value, Tensor):
            yield value.storage
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from walk(item, depth + 1)

    return walk(value, 0)


def _limit(steps: int, depth: int) -> None:
    """Containers in themselves have no end; ones in several others can have 2^n."""
    if depth > _MAX_DEPTH or steps > MAX_STEPS:
        raise ValueError(
            f"its containers are nested deeper than {_MAX_DEPTH} levels"
            if depth > _MAX_DEPTH
            else f"it holds more than {MAX_STEPS:,} values"
        )


def _array(tensor: Tensor, raw: np.ndarray | None) -> np.ndarray:
    dtype, shape = np.dtype(tensor.storage.dtype), tensor.shape
    if raw is None:
        raise ValueError(f"storage {short(tensor.storage.key)} is missing")
    count = math.prod(shape)
    if count == 0:
        return np.zeros(shape, dtype)
    reach = sum((n - 1) * s for n, s in zip(shape, tensor.strides, strict=True))
    # Expanded views (stride 0) would let a small file claim a huge array.
    if max(tensor.offset + reach + 1, count) * dtype.itemsize > len(raw):
        raise ValueError(
            f"a tensor of shape {shape} does not fit its storage of {len(raw):,} bytes"
        )
    numbers = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)[tensor.offset :]
    strides = tuple(s * dtype.itemsize for s in tensor.strides)
    return np.lib.stride_tricks.as_strided(numbers, shape, strides, writeable=False)
