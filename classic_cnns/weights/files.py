"""Weight files of every format as flat dictionaries of arrays, told apart by content."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from classic_cnns.errors import DataError
from classic_cnns.rundir import replace_file
from classic_cnns.weights.convert import Flat, unwrap
from classic_cnns.weights.torch_file import read_torch


def read_weights(path: str | Path) -> Flat:
    """Arrays by their keys in the file; PyTorch's counters and prefixes are gone, see `unwrap`.

    Reads .pth/.pt/.th (both formats), .safetensors, .npz (without objects), and Keras' .h5,
    .weights.h5 and .keras, whose keys become "layer/variable". Nothing in a file is executed.

    Raises:
        DataError: missing, damaged, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. Fix: the path")
    with path.open("rb") as file:
        start = file.read(10)
    try:
        if start.startswith(b"\x89HDF"):
            return _read_h5(path)
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if "model.weights.h5" in names:
                return _read_keras_zip(path)
            if names and all(name.endswith(".npy") for name in names):
                with np.load(path, allow_pickle=False) as arrays:
                    return unwrap({name: arrays[name] for name in arrays.files})
        elif start[8:9] == b"{":
            from safetensors.numpy import load_file

            return unwrap(load_file(path))
    except DataError:
        raise
    except Exception as error:  # every library has its own kinds for a damaged file
        raise DataError(f"{path}: damaged: {error}. Fix: another file") from error
    return unwrap(read_torch(path))


def write_safetensors(path: Path, arrays: Flat, metadata: dict[str, str]) -> None:
    """Writes a .safetensors file in one step."""
    from safetensors.numpy import save

    data = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata)
    replace_file(path, data)


def _read_h5(file: Any) -> Flat:
    import h5py

    with h5py.File(file, "r") as root:
        if "layers" in root or "_layer_checkpoint_dependencies" in root:
            return _keras3(root)
        group = root.get("model_weights", root)
        out: Flat = {}
        for layer in group:
            for key, array in _datasets(group[layer]):
                out[f"{layer}/{key}"] = array
        return unwrap(out)


def _datasets(group: Any) -> list[tuple[str, np.ndarray]]:
    """Variables of a layer in the old format: ".../kernel:0", or before it ".../layer_W_1:0"."""
    import h5py

    found: list[tuple[str, np.ndarray]] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            word = name.rsplit("/", 1)[-1].split(":")[0]
            word = next((new for old, new in _OLD_WORDS.items() if word.endswith(old)), word)
            found.append((word, np.asarray(item)))

    group.visititems(visit)
    return found


_OLD_WORDS = {"_W_1": "kernel", "_b_1": "bias", "_W": "kernel", "_b": "bias"}
_KINDS = {
    2: ("kernel", "bias"),
    1: ("kernel",),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
}


def _keras3(root: Any) -> Flat:
    """The format of Keras 3: layers/NAME/vars/NUMBER, in the order of the layer's variables."""
    layers = root["layers"] if "layers" in root else root["_layer_checkpoint_dependencies"]
    out: Flat = {}
    for saved in layers:
        variables = layers[saved].get("vars")
        if variables is None or not len(variables):
            continue
        name = str(variables.attrs.get("name", saved))
        words = _KINDS.get(len(variables))
        if words is None:
            raise DataError(f"layer {name} has {len(variables)} variables. Fix: another file")
        for i, word in enumerate(words):
            out[f"{name}/{word}"] = np.asarray(variables[str(i)])
    return unwrap(out)


def _read_keras_zip(path: Path) -> Flat:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("model.weights.h5")
        if info.file_size > 100 * info.compress_size:
            raise DataError(f"{path}: its weights are compressed beyond belief. Fix: another file")
        return _read_h5(io.BytesIO(archive.read(info)))
