"""Splits that a source does not have: drawn class by class, or as a file lists them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from classic_cnns.data.sources import root_of
from classic_cnns.data.splits import Split
from classic_cnns.errors import DataError, printable


def draw_splits(
    found: dict[str, Split],
    fractions: dict[str, float],
    seed: int,
    classes: tuple[str, ...],
    split_file: str,
    dir: str,
) -> tuple[dict[str, Split], dict[str, list[Any]], str]:
    """The splits with those drawn that the source lacks, the members of these, and where all of
    them come from, in words.

    Args:
        found: splits of a source; "all" where it has none.
        fractions: share of each split to draw, class by class: of test only where there is "all".
        seed: see `stratified_split`.
        classes: names, in the order of the labels.
        split_file: see `create_dataset`.
        dir: names of files are listed relative to it, or to the folder it is in.

    Raises:
        DataError: the file does not fit the images, or a class has too few.
    """
    base = "all" if "all" in found else "train"
    wanted = [n for n in fractions if n not in found and (n == "val" or base == "all")]
    path = Path(split_file).expanduser()
    listed = read_split(path) if split_file else {}
    note = _note(wanted, fractions, seed, listed, split_file)
    if not wanted:
        return found, {}, note
    members = Members(found[base], root_of(dir))
    left, drawn = np.arange(len(found[base])), {}
    for name in sorted(wanted, key=lambda name: name not in listed):  # first what is not drawn
        if name in listed:
            part = members.find(listed[name], name, path)
        else:
            labels = found[base].labels[left]
            part = left[stratified_split(labels, fractions[name], seed, classes)[1]]
        left = np.setdiff1d(left, part)
        drawn[name] = part
    empty = sorted(set(range(len(classes))) - set(found[base].labels[left].tolist()))
    if listed and empty:
        names = ", ".join(printable(classes[i]) for i in empty)
        raise DataError(f"{path} leaves nothing to train for {names}. Fix: another split file")
    rest = {name: split for name, split in found.items() if name != base}
    parts = {name: found[base].subset(part) for name, part in drawn.items()}
    listing = {name: members.of(part) for name, part in drawn.items()}
    return {"train": found[base].subset(left), **rest, **parts}, listing, note


def _note(
    wanted: list[str],
    fractions: dict[str, float],
    seed: int,
    listed: dict[str, list[Any]],
    split_file: str,
) -> str:
    by_chance = [f"{name} ({fractions[name]:.0%})" for name in wanted if name not in listed]
    by_file = [name for name in wanted if name in listed]
    unused = [name for name in listed if name not in wanted]
    ways = {
        f" drawn class by class with seed {seed}": by_chance,
        f" as in {split_file}": by_file,
        f" of {split_file} not used, as the source has its own": unused,
    }
    parts = [" and ".join(names) + how for how, names in ways.items() if names]
    return "; ".join(parts if wanted else ["splits of the source", *parts])


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int, classes: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Draws `fraction` of every class (at least one image).

    Args:
        labels: (N,) integers.
        fraction: between 0 and 1; of each class at least one image stays.
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
        some = min(count - 1, max(1, round(fraction * count)))
        drawn[rng.permutation(members)[:some]] = True
    return np.flatnonzero(~drawn), np.flatnonzero(drawn)


class Members:
    """Names or positions of images in a source, to say which of them a split has.

    Args:
        split: of the source.
        root: names of files are relative to it.
    """

    def __init__(self, split: Split, root: Path) -> None:
        self._names: list[str] | None = None
        if split.encoded:
            self._names = split.images.names_in(root)
        self._count = len(split)

    def of(self, indices: np.ndarray) -> list[Any]:
        """What images are called: a relative path, or a position where they are no files."""
        names = self._names
        return indices.tolist() if names is None else [names[i] for i in indices]

    def find(self, members: list[Any], name: str, path: Path) -> np.ndarray:
        """Indices of members, rising.

        Raises:
            DataError: some are not in the source; path is the file that lists them.
        """
        names = range(self._count) if self._names is None else self._names
        places = dict(zip(names, range(self._count), strict=True))
        absent = [m for m in members if m not in places]
        if absent:
            shown = ", ".join(printable(str(m)) for m in absent[:5])
            more = f" and {len(absent) - 5:,} more" if len(absent) > 5 else ""
            raise DataError(
                f"{path} puts into {name} what is not in the data: {shown}{more}. Fix: those "
                "images, or the split file of these data"
            )
        return np.array(sorted({places[m] for m in members}), np.int64)


def read_split(path: Path) -> dict[str, list[Any]]:
    """A split file: {"val": […], "test": […]}, each of paths in the folder, or of positions.

    Raises:
        DataError: missing, or not as above.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not found.keys() <= {"val", "test"}:
            raise ValueError('not an object with "val", "test" or both')
        for name, members in found.items():
            if not isinstance(members, list) or not members:
                raise ValueError(f"{name} is no list of images")
            if {type(m) for m in members} not in ({str}, {int}):
                raise ValueError(f"{name} has other things than paths or positions")
        if shared := set(found.get("val", ())) & set(found.get("test", ())):
            raise ValueError(f"{printable(str(min(shared)))} is in val and in test")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"data.split_file: {path}: {error}. Fix: the split.json of a run, or an empty field"
        ) from error
    return found
