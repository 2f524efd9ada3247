"""Datasets: `create_dataset(source)` returns splits, class names and preprocessing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from classic_cnns.data import cache as cache_lib
from classic_cnns.data import folder, sources, tfds_source
from classic_cnns.data.decode import resize_images
from classic_cnns.data.drawing import draw_splits
from classic_cnns.data.preprocess import Preprocess
from classic_cnns.data.splits import (
    Dataset,
    Encoded,
    Split,
    check_labels,
    fingerprint,
)
from classic_cnns.errors import ConfigError, DataError, nearest
from classic_cnns.memory import free_memory

__all__ = ["SOURCES", "Dataset", "Encoded", "Preprocess", "Split", "create_dataset"]

SOURCES = (
    "digits",
    "cifar10",
    "cifar100",
    "mnist",
    "fashion_mnist",
    "folder",
    "images_set",
    "csv",
    "npz",
    "tfds:NAME",
    "fake",
)
LARGEST_SIDE = 10_000  # pixels; such a batch of one would take more than a gigabyte
LOADERS = ("auto", "resident", "stream")


def create_dataset(
    source: str,
    *,
    dir: str = "",
    image_size: int = 0,
    resize: str = "squash",
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    splits: dict[str, str] | None = None,
    split_file: str = "",
    seed: int = 0,
    loader: str = "auto",
    resident_gb: float = 4.0,
    cache: str = "",
    workers: int = 0,
    on_bad_image: str = "error",
    max_bad_fraction: float = 0.001,
    train_margin: float = 1.0,
    preprocess: Preprocess | None = None,
    progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> Dataset:
    """Loads a dataset into memory, or prepares to stream it.

    Args:
        source: one of `SOURCES`.
        dir: where files are, or are downloaded to ("" = the user's cache directory). Needed by
            "folder" and "images_set" (a folder), "csv" and "npz" (a file).
        image_size: side in pixels of what the network takes; 0 = the source's own (32 for digits,
            224 for files, 112 for "images_set").
        resize: how files get that size: "squash", "crop" or "letterbox", see `Preprocess`.
        val_fraction: share of train, class by class, that becomes val where the source has no val.
        test_fraction: the same for test, only where the source is not split at all.
        splits: of tfds: for "train", "val" and "test" what tfds calls them, slices included
            ("train[:90%]"); by default its own train, validation and test.
        split_file: the split.json of a run, whose val and test are taken in place of drawing them;
            images that it does not name are train.
        seed: of the split.
        loader: "resident" keeps decoded images in memory, "stream" decodes while training, "auto"
            does the first where they fit.
        resident_gb: GiB that decoded images may take for "auto", which also leaves half of the free
            memory alone.
        cache: directory of decoded images ("default" = in the user's cache directory), so that each
            file is decoded once and for all; "" = none.
        workers: threads that decode; 0 = one a core.
        on_bad_image: "error", or "skip" files that cannot be decoded.
        max_bad_fraction: share of the files up to which they may be skipped.
        train_margin: sides of decoded training images, as a factor of image_size, for random
            crops from them.
        preprocess: of a run, in place of image_size, resize and the statistics of the source.
        progress: called with a text and a total; returns a function to call with what was done.

    Raises:
        ConfigError: unknown source, or a setting out of range.
        DataError: data that is missing, damaged or unusable.
    """
    _check_settings(source, locals())
    if preprocess is not None:
        image_size, resize = preprocess.image_shape[0], preprocess.mode
    found, classes, statistics, size, channels = _open(source, dir, image_size, splits)
    found, drawn, note = draw_splits(
        found, {"test": test_fraction, "val": val_fraction}, seed, classes, split_file, dir
    )
    if "test" not in found:
        note += "; there is no test split, so results are those of val"
    check_labels(found, len(classes))
    if preprocess is None:
        known = sources.STATISTICS.get(statistics)
        mean, std = known or _statistics(found["train"].images)
        preprocess = Preprocess((size, size, channels), mode=resize, mean=mean, std=std)
    elif preprocess.image_shape != (size, size, channels):
        raise ConfigError(
            f"the network takes {preprocess.image_shape}, {source} has {(size, size, channels)}. "
            "Fix: other data"
        )
    warnings: tuple[str, ...] = ()
    if found["train"].encoded:
        side = round(size * train_margin)
        stored = dataclasses.replace(preprocess, image_shape=(side, side, channels))
        shapes = {name: stored if name == "train" else preprocess for name in found}
        for place in (_cache_dir(cache), None) if cache else (None,):
            stay = _stays_encoded(found, shapes, loader, resident_gb, cached=place is not None)
            if stay:
                break
            try:
                found, more = cache_lib.decode_splits(
                    found,
                    shapes,
                    directory=place,
                    workers=workers,
                    skip=on_bad_image == "skip",
                    max_bad_fraction=max_bad_fraction,
                    progress=progress,
                )
                warnings += more
                break
            except OSError as error:
                why = error.strerror or error
                warnings += (f"no cache in {place}: {why}; going on without",)
        how = "decoded while training" if stay else "kept decoded"
        note += f"; {how}, {resize}"
    return Dataset(
        source=source,
        train=found["train"],
        val=found["val"],
        test=found.get("test"),
        classes=classes,
        preprocess=preprocess,
        fingerprint=fingerprint(found, sources.root_of(dir)),
        note=note,
        warnings=warnings,
        drawn=drawn,
    )


def _check_settings(source: str, given: dict[str, Any]) -> None:
    problems, fixes = [], []

    def wrong(name: str, problem: str, fix: str) -> None:
        problems.append(f"data.{name} is {problem}")
        fixes.append(f"data.{name}: {fix}")

    if source not in SOURCES and not source.startswith("tfds:"):
        wrong("source", f'"{source}", which is unknown', nearest(source, SOURCES))
    for name in ("val_fraction", "test_fraction"):
        if not 0 < given[name] < 1:
            wrong(name, f"{given[name]}", "a share between 0 and 1, for example 0.1")
    if not 0 <= given["max_bad_fraction"] < 1:
        wrong("max_bad_fraction", f"{given['max_bad_fraction']}", "0 or more, below 1")
    for name, values in (("loader", LOADERS), ("on_bad_image", ("error", "skip"))):
        if given[name] not in values:
            wrong(name, f'"{given[name]}", which is unknown', nearest(given[name], values))
    for name in ("image_size", "workers", "resident_gb"):
        if given[name] < 0:
            wrong(name, f"{given[name]}", "0 or more")
    if given["image_size"] > LARGEST_SIDE:
        wrong("image_size", f"{given['image_size']}", f"{LARGEST_SIDE} or less")
    if source in ("folder", "images_set", "csv", "npz") and not given["dir"]:
        folder = source in ("folder", "images_set")
        wrong("dir", "empty", "a folder with a sub-folder a class" if folder else "a file")
    if problems:
        raise ConfigError(f"{'; '.join(problems)}. Fix: {'; '.join(fixes)}")


def _open(
    source: str, dir: str, image_size: int, names: dict[str, str] | None
) -> tuple[sources.Splits, tuple[str, ...], str, int, int]:
    """Splits, classes, whose statistics, side, and channels."""
    directory = Path(dir).expanduser() if dir else sources.default_dir(source)
    if source in ("folder", "images_set"):
        found, classes = folder.photos(directory)
        return found, classes, "folder", image_size or (112 if source == "images_set" else 224), 3
    if source == "csv":
        found, classes = sources.table(directory)
        return found, classes, "folder", image_size or 224, 3
    if source.startswith("tfds:"):
        opened = tfds_source.open_tfds(source.removeprefix("tfds:"), dir, names or {})
        name = source.removeprefix("tfds:").split("/")[0].split(":")[0]
        unknown = "folder" if opened.channels == 3 else "mnist"
        statistics = name if name in sources.STATISTICS else unknown
        side = image_size or opened.side or 224
        return opened.splits, opened.classes, statistics, side, opened.channels
    if source == "digits":
        found, classes = sources.digits(image_size or 32), sources.CLASSES[source]
    elif source == "fake":
        found, classes = sources.fake(image_size or 32), sources.CLASSES["digits"]
    else:
        if source == "npz":
            found, classes = sources.arrays(directory)
        else:
            found, classes = sources.official(source, directory), sources.CLASSES[source]
        if image_size:
            found = {
                name: Split(resize_images(split.images, image_size), split.labels)
                for name, split in found.items()
            }
    if len(shapes := {split.images.shape[1:] for split in found.values()}) > 1:
        raise DataError(
            f"{source} has images of the shapes {', '.join(map(str, sorted(shapes)))}. Fix: "
            "data.image_size, and as many channels in all splits"
        )
    first = next(iter(found.values())).images
    if first.shape[1] != first.shape[2]:
        raise DataError(f"images of {first.shape[1:3]} are not square. Fix: data.image_size")
    return found, classes, source, first.shape[1], first.shape[3]


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel on the scale 0…1, of about five million pixels."""
    most = max(1, 5000 * 32**2 // math.prod(images.shape[1:3]))
    some = images[:: max(1, len(images) // most)] / 255
    mean, std = some.mean((0, 1, 2)), some.std((0, 1, 2))
    return tuple(mean.round(4).tolist()), tuple(np.maximum(std, 1e-3).round(4).tolist())


def _stays_encoded(
    found: sources.Splits,
    shapes: dict[str, Preprocess],
    loader: str,
    resident_gb: float,
    cached: bool,
) -> bool:
    """Whether images are decoded while training; raises DataError if they must fit and do not."""
    needed = sum(len(split) * math.prod(shapes[k].image_shape) for k, split in found.items())
    free = free_memory()
    if loader == "resident" and not cached and needed > free / 2:
        raise DataError(
            f"the decoded images need {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are "
            "free. Fix: --config.data.loader=stream, or a smaller data.image_size"
        )
    if loader == "auto":
        return not cached and needed > min(free / 2, resident_gb * 2**30)
    return loader == "stream" and not cached


def _cache_dir(cache: str) -> Path | None:
    if not cache:
        return None
    return sources.default_dir("decoded") if cache == "default" else Path(cache).expanduser()
