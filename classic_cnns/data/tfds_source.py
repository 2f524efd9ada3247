"""Datasets prepared by tensorflow-datasets, read without TensorFlow.

Reading array_record files needs no TensorFlow, preparing them does; that happens in a process of
its own, which needs the extra `tfds`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from classic_cnns.data.splits import Encoded, Split
from classic_cnns.errors import ConfigError, DataError

# What tfds calls our splits, first choice first.
_THEIRS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}


@dataclasses.dataclass(frozen=True)
class Opened:
    """Splits, class names, and the side (0 = it varies) and channels of the images."""

    splits: dict[str, Split]
    classes: tuple[str, ...]
    side: int
    channels: int


def open_tfds(name: str, data_dir: str, splits: dict[str, str]) -> Opened:
    """Opens a prepared dataset, or prepares it first where TensorFlow is installed.

    Args:
        name: of tfds, with a config if there is one: "cifar10", "imagenette/320px-v2".
        data_dir: where tfds keeps its data; "" = its own default.
        splits: what tfds calls "train", "val" and "test", slices included; by default its own.

    Returns:
        Encoded splits.

    Raises:
        ConfigError: no such split, or a dataset without images or labels.
        DataError: not prepared, and here is how.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except Exception as error:  # tfds has many kinds for an unknown name or a broken folder
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f'data.source "tfds:{name}": {reason}. Fix: a name of tensorflow.org/datasets/catalog'
        ) from error
    if not _prepared(builder):
        _prepare(name, data_dir, builder)
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    image, label = _keys(name, builder)
    wanted = splits or {
        ours: next(t for t in theirs if t in builder.info.splits)
        for ours, theirs in _THEIRS.items()
        if any(t in builder.info.splits for t in theirs)
    }
    unknown = sorted(set(wanted) - set(_THEIRS))
    if unknown or "train" not in wanted:
        raise ConfigError(f"data.splits has {sorted(wanted)}. Fix: train, val and test")
    opened = {}
    for ours, theirs in wanted.items():
        try:
            opened[ours] = _open_split(builder, theirs, image, label)
        except DataError:
            raise
        except ValueError as error:
            have = ", ".join(builder.info.splits)
            raise ConfigError(
                f'tfds:{name} has no split "{theirs}" ({error}). Fix: one of {have}'
            ) from error
    height, _, channels = builder.info.features[image].shape
    names = tuple(map(str, builder.info.features[label].names))
    return Opened(opened, names, height or 0, channels or 3)


def _prepared(builder: Any) -> bool:
    folder = builder.data_path
    return folder.exists() and any(".array_record" in path.name for path in folder.iterdir())


def _prepare(name: str, data_dir: str, builder: Any) -> None:
    where = ["--data_dir", data_dir] if data_dir else []
    command = ["build", name, "--file_format", "array_record", *where]
    by_hand = f"tfds {' '.join(command)}"
    if builder.data_path.exists():
        raise DataError(
            f"tfds:{name}: {builder.data_path} is not in the array_record format. Fix: remove it "
            f"and run {by_hand}, in an environment with tensorflow"
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"tfds:{name} is not prepared in {builder.data_path}. Fix: pip install "
            f"'classic_cnns[tfds]', or run in another environment with tensorflow: {by_hand}"
        )
    cli = "import sys; from tensorflow_datasets.scripts.cli.main import launch_cli; launch_cli()"
    result = subprocess.run([sys.executable, "-c", cli, *command], check=False)
    if result.returncode:
        raise DataError(f"tfds:{name} could not be prepared (see above). Fix: run {by_hand}")


def _keys(name: str, builder: Any) -> tuple[str, str]:
    keys = builder.info.supervised_keys or ("image", "label")
    features = builder.info.features
    if len(keys) != 2 or not all(key in features for key in keys):
        raise ConfigError(f"tfds:{name} has no images with labels. Fix: another dataset")
    image, label = keys
    if not hasattr(features[label], "names") or len(features[image].shape or ()) != 3:
        raise ConfigError(
            f"tfds:{name}: {image} → {label} is not a classification of images. Fix: another"
        )
    return image, label


def _open_split(builder: Any, split: str, image: str, label: str) -> Split:
    import tensorflow_datasets as tfds

    decoders = {image: tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split, decoders=decoders)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), 512):
        stop = min(start + 512, len(source))
        try:
            labels[start:stop] = [r[label] for r in source.__getitems__(range(start, stop))]
        except RuntimeError as error:
            raise DataError(
                f"{builder.data_path}: a damaged shard among examples {start} to {stop} of "
                f"{split}: {str(error).splitlines()[0]}. Fix: prepare the dataset again"
            ) from error

    def read(name: str) -> bytes:
        try:
            return bytes(source[int(name.rsplit(" ", 1)[1])][image])
        except RuntimeError as error:  # a damaged shard
            raise ValueError(str(error).splitlines()[0]) from error

    shards = sorted((p.name, p.stat().st_size) for p in Path(builder.data_path).iterdir())
    origin = f"{builder.info.full_name} {shards}"
    return Split(Encoded([f"{split} {i}" for i in range(len(source))], read, origin), labels)
