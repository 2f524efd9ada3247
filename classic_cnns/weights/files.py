"""Weight files of every format as flat dictionaries of arrays, told apart by content."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from classic_cnns.data import LARGEST_SIDE
from classic_cnns.data.preprocess import Preprocess
from classic_cnns.errors import DataError, printable
from classic_cnns.rundir import replace_file
from classic_cnns.weights.convert import Flat, unwrap
from classic_cnns.weights.hdf5 import read_h5
from classic_cnns.weights.program import short
from classic_cnns.weights.torch_file import read_torch

# Weights are noise and shrink by a tenth; what shrinks more than this is a bomb.
_MAX_COMPRESSION = 20
_MAX_KEY = 300  # characters
# Fields of every network that the user of a file chooses, not the file.
NO_OPTIONS = ("parent", "name", "num_classes", "dtype", "impl", "freeze_bn")
_ABOUT = "classic_cnns"  # key of what a .safetensors file of ours says of its network


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


@dataclasses.dataclass(frozen=True)
class About:
    """What a file of ours says of its network; see `LoadedRun`.

    Attributes:
        model: its name.
        options: its fields, where they are not those of the name.
        classes: their names.
        preprocess: what its images go through.
    """

    model: str
    options: dict[str, Any]
    classes: tuple[str, ...]
    preprocess: Preprocess


def read_about(path: str | Path) -> About | None:
    """What `write_safetensors` was told of the network; None of any other file.

    Raises:
        DataError: malformed.
    """
    with Path(path).open("rb") as file:
        if file.read(10)[8:9] != b"{":
            return None
    from safetensors import safe_open

    with safe_open(path, "numpy") as opened:
        text = (opened.metadata() or {}).get(_ABOUT)
    if text is None:
        return None
    try:
        told = json.loads(text)
        about = About(
            str(told["model"]),
            dict(told["options"]),
            tuple(map(str, told["classes"])),
            Preprocess.from_dict(told["preprocess"]),
        )
        if set(NO_OPTIONS) & set(about.options) or not all(map(_is_small, about.options.values())):
            raise ValueError("options")
        height, width, channels = about.preprocess.image_shape
        if not all(type(n) is int and 0 < n <= LARGEST_SIDE for n in (height, width, channels)):
            raise ValueError("image_shape")
        mean, std = (np.array(v, float) for v in (about.preprocess.mean, about.preprocess.std))
        if not (mean.shape == std.shape == (channels,) and (std > 0).all()):
            raise ValueError("mean or std")
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as e:
        raise DataError(
            f"{path}: what it says of its network is malformed ({short(str(e))}). Fix: another file"
        ) from e
    return about


def _is_small(value: Any) -> bool:
    """Whether a network with this in a field is one that can be built."""
    if isinstance(value, list):
        return len(value) <= 10 and all(map(_is_small, value))
    return isinstance(value, str) or (isinstance(value, int | float) and abs(value) <= 1000)


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


def write_safetensors(path: Path, arrays: Flat, about: About) -> None:
    """Writes a .safetensors file in one step, from which `read_about` gives back what it says."""
    from safetensors.numpy import save

    metadata = {"format": "pt", _ABOUT: json.dumps(dataclasses.asdict(about))}
    data = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata)
    replace_file(path, data)
