"""Weight files of every format as flat dictionaries of arrays, told apart by content."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import numpy as np

from classic_cnns.errors import DataError, printable
from classic_cnns.rundir import replace_file
from classic_cnns.weights.convert import Flat, unwrap
from classic_cnns.weights.hdf5 import read_h5
from classic_cnns.weights.program import short
from classic_cnns.weights.torch_file import read_torch

# Weights are noise and shrink by a tenth; what shrinks more than this is a bomb.
_MAX_COMPRESSION = 20
_MAX_KEY = 300  # characters


def read_weights(path: str | Path) -> Flat:
    """Arrays by their keys in the file; PyTorch's counters and prefixes are gone, see `unwrap`.

    Reads .pth/.pt/.th (both formats), .safetensors, .npz (without objects), and Keras' .h5,
    .weights.h5 and .keras, whose keys become "layer/variable". Nothing in a file is executed, no
    other file is opened, and no file takes more memory than its size (compressed ones 20 times).

    Raises:
        DataError: missing, damaged, or of another format; one line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. Fix: the path")
    try:
        with path.open("rb") as file:
            start = file.read(10)
        if start.startswith(b"\x89HDF"):
            return _checked(read_h5(path))
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if "model.weights.h5" in names:
                    _check_zip(archive, path.stat().st_size)
                    with tempfile.TemporaryDirectory() as folder:
                        inside = archive.extract("model.weights.h5", folder)
                        return _checked(read_h5(Path(inside)))
                if names and all(name.endswith(".npy") for name in names):
                    _check_zip(archive, path.stat().st_size)
                    with np.load(path, allow_pickle=False) as arrays:
                        return _checked({name: arrays[name] for name in arrays.files})
        elif start[8:9] == b"{":
            from safetensors.numpy import load_file

            return _checked(load_file(path))
        return _checked(read_torch(path))
    except DataError as error:
        if str(path) in str(error):
            raise
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # every library has its own kinds for a damaged file
        reason = printable(" ".join(str(error).split())[:300]) or type(error).__name__
        raise DataError(f"{path}: damaged: {reason}. Fix: another file") from error


def _check_zip(archive: zipfile.ZipFile, size: int) -> None:
    infos = archive.infolist()
    if len({info.filename for info in infos}) != len(infos):
        raise ValueError("two members have the same name")
    if sum(info.file_size for info in infos) > _MAX_COMPRESSION * size:
        raise ValueError("its members are compressed beyond belief")


def _checked(value: object) -> Flat:
    """The weights in a file, if their names can be shown to people and their values are numbers."""
    arrays = unwrap(value)
    for key, array in arrays.items():
        if len(key) > _MAX_KEY or not key.isprintable():
            raise ValueError(f"an array has the name {short(key)}")
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise ValueError(f"{key} has the type {short(str(array.dtype))}, which is no number")
    return arrays


def write_safetensors(path: Path, arrays: Flat, metadata: dict[str, str]) -> None:
    """Writes a .safetensors file in one step."""
    from safetensors.numpy import save

    data = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata)
    replace_file(path, data)
