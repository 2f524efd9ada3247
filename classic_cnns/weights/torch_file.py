"""Reads .pth, .pt and .th files without PyTorch and without executing anything.

A file of `torch.save` is a pickle program that builds containers around tensors (see program.py),
with
the numbers beside it: in members of a zip file, or, before PyTorch 1.6, after the program.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from classic_cnns.errors import DataError
from classic_cnns.weights.program import Global, Storage, Tensor, run

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_torch(path: str | Path) -> Any:
    """What was saved, with every tensor as a NumPy array.

    Arrays of zip files are views of the mapped file where they are contiguous, so that memory is
    used once. bfloat16 comes as `ml_dtypes.bfloat16`.

    Raises:
        DataError: not such a file, damaged, or one that holds anything but tensors, containers and
            plain values; names the file and the reason.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK":
            return _read_zip(path)
        if start[:1] != b"\x80":
            raise ValueError("it is neither a zip file nor a pickle")
        return _read_legacy(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. Fix: the path") from error
    except (ValueError, OSError, KeyError, IndexError, TypeError, EOFError, struct.error) as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path}: not a readable PyTorch file: {reason}. Fix: another file"
        ) from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        MemoryError,  # a length that no file has
        NotImplementedError,
        OverflowError,
        RecursionError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path}: damaged: {reason}. Fix: another file") from error


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        infos = {info.filename: info for info in archive.infolist()}
        if len(infos) != len(archive.infolist()):
            raise ValueError("two members have the same name")
        programs = [name for name in infos if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError(f"{len(programs)} members are called data.pkl, not one")
        root = programs[0].removesuffix("data.pkl")

        def member(name: str) -> np.ndarray:
            info = infos[name]
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ValueError(f"member {name} is compressed, which torch.save never does")
            header = data[info.header_offset : info.header_offset + 30].tobytes()
            if header[:4] != b"PK\x03\x04":
                raise ValueError(f"member {name} has no header")
            lengths = struct.unpack("<HH", header[26:30])
            begin = info.header_offset + 30 + sum(lengths)
            if begin + info.file_size > len(data):
                raise ValueError(f"member {name} is cut short")
            return data[begin : begin + info.file_size]

        order = f"{root}byteorder"
        if order in infos and member(order).tobytes() != b"little":
            raise ValueError("its numbers are big-endian")
        value = run(io.BytesIO(member(programs[0]).tobytes()))
        return _fill(value, lambda storage: member(f"{root}data/{storage.key}"))


def _read_legacy(path: Path) -> Any:
    with path.open("rb") as file:
        if run(file) != _LEGACY_MAGIC:
            raise ValueError("it does not start with PyTorch's magic number")
        version, system = run(file), run(file)
        if version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
            raise ValueError(f"protocol {version!r} of system {system!r} is unknown")
        value, keys = run(file), run(file)
        storages = {}
        sizes = {s.key: np.dtype(s.dtype).itemsize for s in _storages(value)}
        for key in keys:
            count = struct.unpack("<q", file.read(8))[0]
            if key not in sizes:
                raise ValueError(
                    f"storage {key!r} belongs to no tensor, so that its size is unknown"
                )
            wanted = count * sizes[key]
            left = path.stat().st_size - file.tell()
            if not 0 <= wanted <= left:
                raise ValueError(f"storage {key!r} claims {wanted:,} bytes, {left:,} are left")
            storages[key] = np.frombuffer(file.read(wanted), np.uint8)
        return _fill(value, lambda storage: storages[storage.key])


def _fill(value: Any, raw: Any) -> Any:
    """Puts arrays in place of tensors."""
    if isinstance(value, Tensor):
        return _array(value, raw(value.storage))
    if isinstance(value, dict):
        return {key: _fill(item, raw) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(item, raw) for item in value)
    if isinstance(value, (Global, Storage)):
        raise ValueError(f"a bare {type(value).__name__[1:].lower()} is not a value")
    return value


def _array(tensor: Tensor, raw: np.ndarray) -> np.ndarray:
    dtype = np.dtype(tensor.storage.dtype)
    sizes = (*tensor.shape, *tensor.strides, tensor.offset)
    if not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in sizes):
        raise ValueError(f"a tensor has an impossible shape or stride: {tensor.shape}")
    if len(tensor.shape) != len(tensor.strides):
        raise ValueError("a tensor has another number of strides than axes")
    if math.prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, dtype)
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    last = tensor.offset + reach
    # Expanded views (stride 0) would let a small file claim a huge array.
    if (last + 1) * dtype.itemsize > len(raw) or math.prod(tensor.shape) > len(raw):
        raise ValueError(
            f"a tensor of shape {tensor.shape} does not fit its storage of {len(raw):,} bytes"
        )
    numbers = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)[tensor.offset :]
    strides = tuple(s * dtype.itemsize for s in tensor.strides)
    view = np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)
    return view if view.flags.c_contiguous else np.ascontiguousarray(view)


def _storages(value: Any) -> list[Storage]:
    if isinstance(value, Tensor):
        return [value.storage]
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple)):
        return [storage for item in items for storage in _storages(item)]
    return []
