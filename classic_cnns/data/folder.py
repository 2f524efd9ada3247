"""A folder of images: DIR/train/CLASS/*, DIR/val/CLASS/* and perhaps DIR/test/CLASS/*, or
DIR/CLASS/*.

Nothing is ever written to the folder, and nothing but names is read before training.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from classic_cnns.data.decode import read_file
from classic_cnns.data.splits import Encoded, Split
from classic_cnns.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
JUNK = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
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

    Hidden entries, and folders that systems make (`JUNK`), are passed over. Classes are in
    alphabetical order (by code point), as in torchvision.

    Raises:
        DataError: nothing there, one class, an empty class, a link that leads nowhere in place of
            one, or splits that disagree about the classes; every problem of the folder is in the
            message.
    """
    splits, problems = list_splits(directory)
    if problems:
        raise problems[0]
    return splits


def list_splits(directory: Path) -> tuple[dict[str, Listing], list[DataError]]:
    """Like `scan`, but what is wrong is returned, beside all that could be listed.

    Raises:
        DataError: it is not a directory.
    """
    if not directory.is_dir():
        raise DataError(f"data.dir: {directory} is not a directory. Fix: --config.data.dir=DIR")
    found = find_splits(directory)
    unreadable = _dangling(directory / name for names in SPLIT_NAMES.values() for name in names)
    splits = {
        split: _classes(path, unreadable) for split, path in (found or {"all": directory}).items()
    }
    return splits, list(_problems(directory, splits, unreadable))


def find_splits(directory: Path) -> dict[str, Path]:
    """Folders of the splits; nothing where the classes are directly in the folder."""
    places = {
        split: next((directory / n for n in names if (directory / n).is_dir()), None)
        for split, names in SPLIT_NAMES.items()
    }
    return {split: path for split, path in places.items() if path}


def _dangling(paths: Iterable[Path]) -> list[str]:
    """Links that lead nowhere, or to themselves."""
    return [
        f"{visible(str(p))}: a link that leads nowhere"
        for p in paths
        if p.is_symlink() and not os.path.exists(p)
    ]


def _classes(directory: Path, unreadable: list[str]) -> Listing:
    entries = [e for e in _entries(directory, unreadable) if not hidden(e.name)]
    names = [e.name for e in entries if is_dir(e)]
    links = [Path(e.path) for e in entries if e.is_symlink()]
    unreadable += _dangling(p for p in links if not p.name.lower().endswith(EXTENSIONS))
    return {
        name: [
            e.path
            for e in _entries(directory / name, unreadable)
            if e.name.lower().endswith(EXTENSIONS) and not hidden(e.name) and not is_dir(e)
        ]
        for name in names
    }


def _entries(directory: Path, unreadable: list[str]) -> list[os.DirEntry[str]]:
    """In alphabetical order; a folder that cannot be listed is noted."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda e: e.name)
    except OSError as error:
        unreadable.append(f"{_names([str(directory)])}: {error.strerror}")
        return []


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or leads to one."""
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def hidden(name: str) -> bool:
    """Whether an entry is none of the data."""
    return name.startswith(".") or name in JUNK


def _problems(
    directory: Path, splits: dict[str, Listing], unreadable: list[str]
) -> Iterator[DataError]:
    if unreadable:
        yield DataError(
            f"folders that cannot be read: {'; '.join(unreadable)}. Fix: permissions, or the links"
        )
    if "train" not in splits and "all" not in splits:
        yield DataError(
            f"{directory} has {sorted(splits)} but no train folder. Fix: add {directory}/train"
        )
        return
    base = splits.get("train", splits.get("all", {}))
    layout = (
        f"Fix: {directory}/CLASS/IMAGE, or {directory}/train/CLASS/IMAGE "
        f"and {directory}/val/CLASS/IMAGE"
    )
    if not any(base.values()):
        yield DataError(
            f"{directory}: no images found (looked for {' '.join(EXTENSIONS)}){_found(directory)}. "
            f"{layout}"
        )
        return
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
        yield DataError(
            f"{directory}: {'; '.join(problems)}. {layout}, with the same classes in each"
        )


def visible(name: str) -> str:
    """A name on one line; in quotes and with escapes where one would not see what it is."""
    return name if name.isprintable() and name == name.strip() else repr(name)


def images(count: int) -> str:
    """A number of images in words."""
    return f"{count:,} image{'s' * (count != 1)}"


def _names(names: list[str]) -> str:
    return ", ".join(map(visible, names))


def _found(directory: Path) -> str:
    """Where the images are instead, one level above or below."""
    for pattern, where in (("*", "directly in it"), ("*/*/*", "one level too deep")):
        for path in directory.glob(pattern):
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                return f"; there are images {where}"
    return ""
