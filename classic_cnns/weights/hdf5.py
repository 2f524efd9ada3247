"""Keras' HDF5 files of weights: .h5 of Keras 1 and 2, .weights.h5 and the inside of .keras.

Read and written without Keras.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

_MAX_DEPTH = 10  # groups within groups
_MAX_OBJECTS = 20_000  # ResNet-152 has 2,500
_MAX_SECONDS = 20  # of processor time
_OLD_WORDS = {"_W_1": "kernel", "_b_1": "bias", "_W": "kernel", "_b": "bias"}
_KINDS = {
    2: ("kernel", "bias"),
    1: ("kernel",),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
}


def read_h5(path: Path) -> dict[str, np.ndarray]:
    """Arrays by "layer/variable".

    Nothing but this file is opened: links and data in other files are errors. All arrays together
    have no more bytes than the file. The HDF5 library loops or crashes on some damage, so a child
    process goes through the structure first.

    Raises:
        ValueError, OSError, RuntimeError, KeyError: not such a file, damaged or hostile.
    """
    child = [sys.executable, "-P", __file__, str(path.absolute()), str(_MAX_SECONDS)]
    code = subprocess.run(child, capture_output=True).returncode
    if code < 0:
        out_of_time = code in (-signal.SIGXCPU, -signal.SIGKILL)
        end = "finds no end of it" if out_of_time else "crashes on it"
        raise ValueError(f"the HDF5 library {end}")
    with h5py.File(path, "r") as root:
        return _read(root, _Reader(path.stat().st_size))


def write_h5(path: Path, arrays: dict[str, np.ndarray], version: str = "3") -> None:
    """Writes a file that `load_weights` of a network of keras.applications takes, in one step.

    Keras goes by the order of its layers, not by their names: that of conv1_bn after conv1_conv,
    and of a block's projection (0) between its second and third convolution.

    Args:
        path: ends in .weights.h5 for the format of Keras 3, else .h5 for the one before, which
            Keras 3 reads too.
        arrays: by "layer/variable", see `with_biases`.
        version: of Keras, which the older format names.
    """
    from classic_cnns.manifest import sync  # here, since the child does without the package

    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        layer, word = key.split("/")
        layers.setdefault(layer, {})[word] = array
    temporary = path.with_name(f".{path.name}.tmp")
    with h5py.File(temporary, "w") as file:
        used: dict[str, int] = {}
        names = sorted(layers, key=_place)
        for name in names:
            words = _KINDS[len(layers[name])]
            values = [np.ascontiguousarray(layers[name][word]) for word in words]
            if not path.name.endswith(".weights.h5"):
                group = file.create_group(f"{name}/{name}")
                file[name].attrs["weight_names"] = [f"{name}/{word}" for word in words]
                for word, value in zip(words, values, strict=True):
                    group[word] = value
                continue
            dense = "dense" if values[0].ndim == 2 else "conv2d"
            kind = "batch_normalization" if "gamma" in words else dense
            number = used[kind] = used.get(kind, -1) + 1
            group = file.create_group(f"layers/{kind}{f'_{number}' if number else ''}/vars")
            group.attrs["name"] = name
            for i, value in enumerate(values):
                group[str(i)] = value
        if not path.name.endswith(".weights.h5"):
            file.attrs.update(layer_names=names, keras_version=version, backend="jax")
    sync(temporary)
    os.replace(temporary, path)


def with_biases(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keras' ResNets have a bias in every convolution, which ours fold into the mean: zeros."""
    zeros = {
        f"{key.removesuffix('kernel')}bias": np.zeros(array.shape[-1], np.float32)
        for key, array in arrays.items()
        if key.endswith("/kernel")
    }
    return zeros | arrays


def _place(layer: str) -> list[int]:
    """Sorts the layers of Keras' VGG and ResNet as they follow each other."""
    if layer in ("fc1", "fc2", "predictions"):
        return [100, len(layer), int(layer[-1] == "2")]
    numbers = [int(n) for n in re.findall(r"\d+", layer)]
    kind = int(layer.endswith("_bn"))
    if len(numbers) < 3:  # conv1_bn, block3_conv2
        return [*numbers, kind]
    stage, block, part = numbers
    order = ((1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (3, 0), (0, 1), (3, 1))
    return [stage, block, order.index((part, kind))]


def _read(root: Any, reader: _Reader) -> dict[str, np.ndarray]:
    top = dict(reader.members(root))
    layers = top.get("layers", top.get("_layer_checkpoint_dependencies"))
    if isinstance(layers, h5py.Group):
        return reader.keras3(layers)
    return reader.keras2(top.get("model_weights", root))


class _Reader:
    """Reads datasets of one file within limits.

    Attributes:
        left: bytes that the arrays may still have.
        objects: that have been looked at.
        numbers: whether numbers are read, or only the structure around them.
    """

    def __init__(self, size: int, numbers: bool = True) -> None:
        self.left, self.numbers = size, numbers
        self.objects = 0

    def members(self, group: Any) -> Iterator[tuple[str, Any]]:
        """Names and objects of a group, if they are in this file."""
        if not isinstance(group, h5py.Group):
            raise ValueError("a dataset is where a group of layers belongs")
        for name in group:
            self.objects += 1
            if self.objects > _MAX_OBJECTS:
                raise ValueError(f"it has more than {_MAX_OBJECTS:,} groups and datasets")
            link = group.id.links.get_info(name.encode("utf-8", "surrogateescape"))
            if link.type != h5py.h5l.TYPE_HARD:  # known without following it
                raise ValueError("it has links to other places or files, which Keras never writes")
            yield name, group[name]

    def array(self, dataset: Any) -> np.ndarray:
        """All numbers of a dataset that are really there, uncompressed as Keras writes them."""
        if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "fiub":
            raise ValueError("a variable is not an array of numbers")
        if dataset.is_virtual or dataset.external:
            raise ValueError("an array is in another file")
        if dataset.nbytes > min(self.left, dataset.id.get_storage_size()):
            raise ValueError(
                f"an array of shape {dataset.shape} is compressed, or larger than the file"
            )
        self.left -= dataset.nbytes
        return np.asarray(dataset[()]) if self.numbers else np.zeros(0)

    def keras3(self, layers: Any) -> dict[str, np.ndarray]:
        """The format of Keras 3: layers/NAME/vars/NUMBER, in the order of the layer's variables."""
        out: dict[str, np.ndarray] = {}
        for saved, layer in self.members(layers):
            variables = dict(self.members(layer)).get("vars", {})
            found = dict(self.members(variables)) if len(variables) else {}
            if not found:
                continue
            name = variables.attrs.get("name", saved)
            if not isinstance(name, str):
                raise ValueError("the name of a layer is not text")
            words = _KINDS.get(len(found), ())
            if set(found) != {str(i) for i in range(len(words))}:
                raise ValueError(f"layer {name[:60]!r} has other variables than a network's")
            for i, word in enumerate(words):
                _add(out, f"{name}/{word}", self.array(found[str(i)]))
        return out

    def keras2(self, group: Any) -> dict[str, np.ndarray]:
        """The formats before: NAME/…/kernel:0, and before that NAME/…/layer_W_1:0."""
        out: dict[str, np.ndarray] = {}
        for layer, content in self.members(group):
            for path, dataset in self.datasets(content, 0):
                word = path.split(":")[0]
                ends = (new for old, new in _OLD_WORDS.items() if word.endswith(old))
                _add(out, f"{layer}/{next(ends, word)}", self.array(dataset))
        return out

    def datasets(self, group: Any, depth: int) -> Iterator[tuple[str, Any]]:
        """All datasets below a group, however deep, by the last part of their names."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"its groups are nested deeper than {_MAX_DEPTH} levels")
        for name, item in self.members(group):
            if isinstance(item, h5py.Group):
                yield from self.datasets(item, depth + 1)
            else:
                yield name, item


def _add(out: dict[str, np.ndarray], key: str, array: np.ndarray) -> None:
    if key in out:
        raise ValueError(f"{key[:60]!r} is there twice")
    out[key] = array


if __name__ == "__main__":  # the child: what it raises, its parent will raise again
    seconds, hard = int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or hard > seconds:  # else the user's own limit is the shorter
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with contextlib.suppress(Exception), h5py.File(sys.argv[1], "r") as file:
        _read(file, _Reader(Path(sys.argv[1]).stat().st_size, numbers=False))
