"""Datasets: `create_dataset(source)` returns splits, class names, image shape and statistics."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from classic_cnns.data import sources
from classic_cnns.errors import ConfigError, DataError, nearest

SOURCES = (
    "digits",
    "cifar10",
    "cifar100",
    "mnist",
    "fashion_mnist",
    "folder",
    "images_set",
    "fake",
)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (N, H, W, C) uint8 with labels (N,) int32 in 0…classes−1."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def counts(self, num_classes: int) -> list[int]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=num_classes).tolist()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Everything that training needs to know about its data.

    Attributes:
        source: one of `SOURCES`.
        train, val, test: disjoint splits; test is None when the source has none.
        classes: names, in the order of the labels.
        mean, std: per channel, for pixels on the scale 0…1.
        fingerprint: SHA-256 over all pixels and labels in order.
        note: how the splits came about, for people.
    """

    source: str
    train: Split
    val: Split
    test: Split | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    note: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


def create_dataset(
    source: str,
    *,
    dir: str = "",
    image_size: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Loads a dataset into memory.

    Args:
        source: one of `SOURCES`.
        dir: where files are, or are downloaded to ("" = the user's cache directory). Needed by
            "folder" and "images_set".
        image_size: side in pixels that images are squashed to; 0 = the source's own (32 for digits,
            224 for "folder", 112 for "images_set").
        val_fraction: share of train, class by class, that becomes val where the source has no val.
        test_fraction: the same for test, only where the source is not split at all.
        seed: of the split.

    Raises:
        ConfigError: unknown source, or a setting out of range.
        DataError: data that is missing, damaged or unusable.
    """
    if source not in SOURCES:
        raise ConfigError(f'unknown data.source "{source}". Fix: {nearest(source, SOURCES)}')
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < value < 1:
            raise ConfigError(f"data.{name} is {value}. Fix: a share between 0 and 1")
    directory = Path(dir).expanduser() if dir else sources.default_dir(source)
    statistics = source
    if source in ("folder", "images_set"):
        if not dir:
            raise ConfigError(
                "data.dir is empty. Fix: --config.data.dir=DIR, a folder with a sub-folder a class"
            )
        size = image_size or (112 if source == "images_set" else 224)
        splits, classes = sources.photos(directory, size)
        statistics = "folder"
    elif source == "digits":
        splits, classes = sources.digits(image_size or 32), sources.CLASSES[source]
    elif source == "fake":
        splits, classes = sources.fake(image_size or 32), sources.CLASSES["digits"]
    else:
        splits, classes = sources.official(source, directory), sources.CLASSES[source]
        if image_size:
            splits = {s: (sources.resize_images(i, image_size), y) for s, (i, y) in splits.items()}
    given = sorted(splits)
    note = "splits of the source"
    if "all" in splits:
        rest, test = stratified_split(*splits["all"], test_fraction, seed)
        splits = {"train": rest, "test": test}
        note = (
            f"test ({test_fraction:.0%}) and val ({val_fraction:.0%}) "
            f"drawn class by class with seed {seed}"
        )
    if "val" not in splits:
        splits["train"], splits["val"] = stratified_split(*splits["train"], val_fraction, seed)
        if given != ["all"]:
            note = f"val is {val_fraction:.0%} of train, drawn class by class with seed {seed}"
    if "test" not in splits:
        note += "; there is no test split, so results are those of val"
    made = {name: Split(*arrays) for name, arrays in splits.items()}
    _check_labels(made, len(classes))
    mean, std = sources.STATISTICS[statistics]
    return Dataset(
        source=source,
        train=made["train"],
        val=made["val"],
        test=made.get("test"),
        classes=classes,
        mean=mean,
        std=std,
        fingerprint=_fingerprint(made),
        note=note,
    )


def stratified_split(
    images: np.ndarray, labels: np.ndarray, fraction: float, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Draws `fraction` of every class (at least one image); both parts keep the order of the input.

    Returns:
        ((images, labels) of the rest, (images, labels) of the part drawn).

    Raises:
        DataError: a class has a single image.
    """
    drawn = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(f"class {label} has one image, which cannot be split. Fix: add images")
        rng = np.random.Generator(np.random.Philox(key=[seed, label]))
        count = max(1, round(fraction * len(members)))
        drawn[rng.permutation(members)[:count]] = True
    return (images[~drawn], labels[~drawn]), (images[drawn], labels[drawn])


def _check_labels(splits: dict[str, Split], num_classes: int) -> None:
    for name, split in splits.items():
        wrong = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
        if len(wrong):
            i = wrong[0]
            raise DataError(
                f"label {split.labels[i]} of {name}[{i}] is outside 0..{num_classes - 1}. Fix: "
                "the labels"
            )


def _fingerprint(splits: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(f"{name}{splits[name].images.shape}".encode())
        digest.update(np.ascontiguousarray(splits[name].images).data)
        digest.update(np.ascontiguousarray(splits[name].labels).data)
    return digest.hexdigest()
