"""Splits: labelled images in memory, mapped from a file, or still encoded."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from classic_cnns.data.preprocess import Preprocess
from classic_cnns.errors import DataError


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Images that are decoded when they are needed.

    Attributes:
        names: a path or other name of each, for people and for fingerprints.
        read: the bytes of the image with a name.
    """

    names: list[str]
    read: Callable[[str], bytes]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, indices: np.ndarray) -> Encoded:
        """Some of them, in the order asked for."""
        return Encoded([self.names[i] for i in indices], self.read)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with labels (N,) int32 in 0…classes−1.

    Attributes:
        images: (N, H, W, C) uint8, in memory or mapped, or encoded.
        labels: of each.
    """

    images: Any  # np.ndarray | Encoded
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def encoded(self) -> bool:
        """Whether the images are still files."""
        return isinstance(self.images, Encoded)

    def counts(self, num_classes: int) -> list[int]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=num_classes).tolist()

    def subset(self, indices: np.ndarray) -> Split:
        """Some of them, in the order asked for."""
        return Split(self.images[indices], self.labels[indices])

    def without(self, indices: list[int]) -> Split:
        """All but some of them."""
        rest = np.setdiff1d(np.arange(len(self)), indices)
        return self.subset(rest) if indices else self


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Everything that training needs to know about its data.

    Attributes:
        source: see `SOURCES`.
        train, val, test: disjoint splits; test is None when the source has none.
        classes: names, in the order of the labels.
        preprocess: what images go through, with the mean and deviation of their channels.
        fingerprint: SHA-256 over all pixels and labels in order, or over names and labels while the
            images are encoded.
        note: how the splits came about, for people.
        warnings: what was passed over, for people.
    """

    source: str
    train: Split
    val: Split
    test: Split | None
    classes: tuple[str, ...]
    preprocess: Preprocess
    fingerprint: str
    note: str
    warnings: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of what the network takes."""
        return self.preprocess.image_shape

    @property
    def splits(self) -> dict[str, Split]:
        """Those that exist, by name."""
        found = {"train": self.train, "val": self.val}
        return found | ({"test": self.test} if self.test else {})


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int, classes: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Draws `fraction` of every class (at least one image).

    Args:
        labels: (N,) integers.
        fraction: between 0 and 1.
        seed: decides which; the split is a function of the labels, the fraction and the seed.
        classes: names for errors.

    Returns:
        Indices of the rest and of the part drawn, both rising.

    Raises:
        DataError: names the classes of which a single image is left.
    """
    present, counts = np.unique(labels, return_counts=True)
    if (counts < 2).any():
        single = [classes[i] if classes else str(i) for i in present[counts < 2]]
        raise DataError(
            f"too few images to split these classes: {', '.join(map(repr, single))}. Fix: at least "
            "3 images of each, 2 where there is a test split"
        )
    drawn = np.zeros(len(labels), bool)
    for label, count in zip(present, counts, strict=True):
        members = np.flatnonzero(labels == label)
        rng = np.random.Generator(np.random.Philox(key=[seed, label]))
        drawn[rng.permutation(members)[: max(1, round(fraction * count))]] = True
    return np.flatnonzero(~drawn), np.flatnonzero(drawn)


def check_labels(splits: dict[str, Split], num_classes: int) -> None:
    """Raises DataError for a label outside 0…classes−1."""
    for name, split in splits.items():
        wrong = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
        if len(wrong):
            i = wrong[0]
            raise DataError(
                f"label {split.labels[i]} of {name}[{i}] is outside 0..{num_classes - 1}. Fix: "
                "the labels"
            )


def fingerprint(splits: dict[str, Split]) -> str:
    """See `Dataset.fingerprint`."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        images, labels = splits[name].images, splits[name].labels
        if isinstance(images, Encoded):
            digest.update("\n".join([name, *images.names]).encode(errors="surrogateescape"))
        else:
            digest.update(f"{name}{images.shape}".encode())
            digest.update(np.ascontiguousarray(images).data)
        digest.update(np.ascontiguousarray(labels).data)
    return digest.hexdigest()
