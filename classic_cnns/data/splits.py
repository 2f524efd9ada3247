"""Splits: labelled images in memory, mapped from a file, or still encoded."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
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
        origin: what the names are of, where they are none of files: other data, another text.
    """

    names: list[str]
    read: Callable[[str], bytes]
    origin: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, indices: np.ndarray) -> Encoded:
        """Some of them, in the order asked for."""
        return Encoded([self.names[i] for i in indices], self.read, self.origin)

    def names_in(self, root: Path) -> list[str]:
        """Names of files relative to a folder that holds them, others as they are."""
        prefix = f"{root}{os.sep}"
        return [name.removeprefix(prefix) for name in self.names]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some images of an array that is mapped from a file; they stay there until asked for."""

    array: np.ndarray
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self.rows), *self.array.shape[1:])

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.array[self.rows[index]]


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with labels (N,) int32 in 0…classes−1.

    Attributes:
        images: (N, H, W, C) uint8, in memory or mapped, or encoded.
        labels: of each.
    """

    images: Any  # np.ndarray | Rows | Encoded
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def encoded(self) -> bool:
        """Whether the images are still files."""
        return isinstance(self.images, Encoded)

    @property
    def mapped(self) -> bool:
        """Whether the images are in a file, decoded."""
        return isinstance(self.images, (np.memmap, Rows))

    def counts(self, num_classes: int) -> list[int]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=num_classes).tolist()

    def subset(self, indices: np.ndarray) -> Split:
        """Some of them, in the order asked for."""
        return Split(self.images[indices], self.labels[indices])

    def without(self, indices: list[int]) -> Split:
        """All but some of them."""
        rest = np.setdiff1d(np.arange(len(self)), indices)
        if indices and self.mapped:
            return Split(Rows(self.images, rest), self.labels[rest])
        return self.subset(rest) if indices else self


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Everything that training needs to know about its data.

    Attributes:
        source: see `SOURCES`.
        train, val, test: disjoint splits; test is None when the source has none.
        classes: names, in the order of the labels.
        preprocess: what images go through, with the mean and deviation of their channels.
        fingerprint: SHA-256 over all pixels and labels in order, or over names (in the folder) and
            labels while the images are encoded: other pixels under an old name are not noticed.
        note: how the splits came about, for people.
        warnings: what was passed over, for people.
        drawn: members of each split that the source does not have, as in a `split_file`.
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
    drawn: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

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


def fingerprint(splits: dict[str, Split], root: Path) -> str:
    """See `Dataset.fingerprint`; names are relative to `root`, so that a folder may move."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        images, labels = splits[name].images, splits[name].labels
        if isinstance(images, Encoded):
            names = "\n".join([name, *images.names_in(root)])
            digest.update(names.encode(errors="surrogateescape"))
        else:
            digest.update(f"{name}{images.shape}".encode())
            for start in range(0, len(labels), 1024):
                digest.update(np.ascontiguousarray(images[start : start + 1024]).data)
        digest.update(np.ascontiguousarray(labels).data)
    return digest.hexdigest()
