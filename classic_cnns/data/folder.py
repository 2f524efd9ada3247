"""A folder of images: DIR/train/CLASS/*, DIR/val/CLASS/* and perhaps DIR/test/CLASS/*, or
DIR/CLASS/*.

Nothing is ever written to the folder, and nothing but names is read before training.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from classic_cnns.data.decode import read_file
from classic_cnns.data.splits import Encoded, Split
from classic_cnns.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}

Listing = dict[str, list[str]]  # class name → paths of its files


def photos(directory: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Encoded images of each split, class by class, and the classes; see `scan`."""
    listings = scan(directory)
    classes = tuple(listings.get("train", listings.get("all", {})))
    splits = {}
    for split, listing in listings.items():
        names = [path for members in listing.values() for path in members]
        counts = [len(members) for members in listing.values()]
        labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        splits[split] = Split(Encoded(names, read_file), labels)
    return splits, classes


def scan(directory: Path) -> dict[str, Listing]:
    """Files of each class of each split; a flat folder is one split named "all".

    Hidden entries are passed over. Classes are in alphabetical order (by code point), as in
    torchvision.

    Raises:
        DataError: nothing there, one class, an empty class, or splits that disagree about the
            classes; every problem of the folder is in the message.
    """
    if not directory.is_dir():
        raise DataError(f"data.dir: {directory} is not a directory. Fix: --config.data.dir=DIR")
    found = {
        split: path
        for split, names in SPLIT_NAMES.items()
        for path in [next((directory / n for n in names if (directory / n).is_dir()), None)]
        if path
    }
    if found and "train" not in found:
        raise DataError(
            f"{directory} has {sorted(found)} but no train folder. Fix: add {directory}/train"
        )
    splits = {s: _classes(p) for s, p in (found or {"all": directory}).items()}
    _check(directory, splits)
    return splits


def _classes(directory: Path) -> Listing:
    listing: Listing = {}
    with os.scandir(directory) as entries:
        names = sorted(e.name for e in entries if _is_dir(e) and not _hidden(e.name))
    for name in names:
        with os.scandir(directory / name) as entries:
            listing[name] = sorted(
                e.path
                for e in entries
                if e.name.lower().endswith(EXTENSIONS) and not _hidden(e.name) and not _is_dir(e)
            )
    return listing


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _check(directory: Path, splits: dict[str, Listing]) -> None:
    base = splits.get("train", splits.get("all", {}))
    layout = (
        f"Fix: {directory}/CLASS/IMAGE, or {directory}/train/CLASS/IMAGE "
        f"and {directory}/val/CLASS/IMAGE"
    )
    if not any(base.values()):
        raise DataError(
            f"{directory}: no images found (looked for {' '.join(EXTENSIONS)}){_found(directory)}. "
            f"{layout}"
        )
    problems = []
    if len(base) == 1:
        problems.append(f"only one class, {next(iter(base))!r}: there is nothing to learn")
    for split, listing in splits.items():
        empty = [name for name, files in listing.items() if not files]
        if empty:
            problems.append(f"classes without images in {split}: {_names(empty)}")
        unknown = sorted(set(listing) - set(base))
        if unknown:
            problems.append(f"classes in {split} that train lacks: {_names(unknown)}")
        absent = sorted(set(base) - set(listing))
        if absent:
            problems.append(f"classes in train that {split} lacks: {_names(absent)}")
    if problems:
        raise DataError(
            f"{directory}: {'; '.join(problems)}. {layout}, with the same classes in each"
        )


def _names(names: list[str]) -> str:
    """Names on one line, odd characters escaped."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names)


def _found(directory: Path) -> str:
    """Where the images are instead, one level above or below."""
    for pattern, where in (("*", "directly in it"), ("*/*/*", "one level too deep")):
        for path in directory.glob(pattern):
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                return f"; there are images {where}"
    return ""
