"""A folder of images: DIR/train/CLASS/*, DIR/val/CLASS/* and perhaps DIR/test/CLASS/*, or
DIR/CLASS/*.

Nothing is ever written to the folder.
"""

from __future__ import annotations

import concurrent.futures
import os
from pathlib import Path

import numpy as np

from classic_cnns.data.decode import decode_image
from classic_cnns.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}

Listing = dict[str, list[Path]]  # class name → its files


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
        names = sorted(e.name for e in entries if e.is_dir() and not _hidden(e.name))
    for name in names:
        with os.scandir(directory / name) as entries:
            listing[name] = sorted(
                Path(e.path)
                for e in entries
                if e.name.lower().endswith(EXTENSIONS) and not _hidden(e.name) and not e.is_dir()
            )
    return listing


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
            f"{directory}: no images found (looked for {' '.join(EXTENSIONS)}). {layout}"
        )
    problems = []
    if len(base) == 1:
        problems.append(f'only one class, "{next(iter(base))}": there is nothing to learn')
    for split, listing in splits.items():
        empty = [name for name, files in listing.items() if not files]
        if empty:
            problems.append(f"classes without images in {split}: {', '.join(empty)}")
        unknown = sorted(set(listing) - set(base))
        if unknown:
            problems.append(f"classes in {split} that train lacks: {', '.join(unknown)}")
        absent = sorted(set(base) - set(listing))
        if absent:
            problems.append(f"classes in train that {split} lacks: {', '.join(absent)}")
    if problems:
        raise DataError(
            f"{directory}: {'; '.join(problems)}. {layout}, with the same classes in each"
        )


def load(listing: Listing, size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Decodes every file with all cores.

    Returns:
        Images (N, size, size, channels) uint8 and labels (N,) int32, class by class.

    Raises:
        DataError: names every file that cannot be decoded, with the reason.
    """
    files = [file for members in listing.values() for file in members]
    labels = np.repeat(np.arange(len(listing)), [len(m) for m in listing.values()])
    images = np.empty((len(files), size, size, channels), np.uint8)
    bad: list[str] = []

    def one(i: int) -> None:
        try:
            images[i] = decode_image(files[i], size, size, channels)
        except ValueError as error:
            bad.append(f"{files[i]}: {error}")

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, range(len(files))))
    if bad:
        shown = "\n  ".join(sorted(bad)[:20])
        more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise DataError(
            f"{len(bad)} of {len(files)} files cannot be decoded:\n  {shown}{more}\nFix: replace "
            "or remove them"
        )
    return images, labels.astype(np.int32)
