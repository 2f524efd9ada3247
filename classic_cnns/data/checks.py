"""What is in a folder of images and what is wrong with it, found in one pass over its files.

Nothing is written. Every file is decoded as training would, but scaled down where its format
allows, so that a file is damaged here if it is damaged there.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from classic_cnns.data import advise, duplicates
from classic_cnns.data.decode import ImageFile, read_file
from classic_cnns.data.layout import Finding, relative, survey

EXTENSIONS_OF = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "TIFF": (".tif", ".tiff"),
}


ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclasses.dataclass(frozen=True)
class Report:
    """All there is to say about a folder.

    Attributes:
        directory: as it was given.
        counts: images by split ("all" if there are none) and class; damaged ones count.
        total_bytes: of all images.
        widths, heights: smallest, median and largest, in pixels, upright.
        aspects: images by width / height, see `advise.ASPECTS`.
        formats, modes: images by file format and by kind of colour, in Pillow's words.
        findings: errors first.
        copies: groups of duplicates, those with different labels first, then those in several
            splits.
        examples: some files of each class.
        seconds: that it took.
    """

    directory: str
    counts: dict[str, dict[str, int]]
    total_bytes: int
    widths: tuple[int, int, int]
    heights: tuple[int, int, int]
    aspects: dict[str, int]
    formats: dict[str, int]
    modes: dict[str, int]
    findings: tuple[Finding, ...]
    copies: tuple[duplicates.Copies, ...]
    examples: dict[str, tuple[str, ...]]
    seconds: float

    @property
    def images(self) -> int:
        """Number of all images."""
        return sum(sum(classes.values()) for classes in self.counts.values())

    @property
    def refused(self) -> bool:
        """Whether training refuses the folder."""
        return any(finding.level == "error" for finding in self.findings)


@dataclasses.dataclass(frozen=True, slots=True)
class _Facts:
    """Of one file, see `Report`; with a reason if it cannot be decoded."""

    reason: str = ""
    size: int = 0
    digest: bytes = b""
    height: int = 0
    width: int = 0
    format: str = ""
    mode: str = ""
    moving: bool = False
    bits: np.ndarray | None = None


def check_folder(
    directory: Path,
    *,
    find_copies: bool = True,
    workers: int = 0,
    progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> Report:
    """Looks at everything in a folder of images.

    Args:
        directory: with a folder a class, or with train, val and test that have.
        find_copies: whether to look for duplicates.
        workers: threads; 0 = one a core.
        progress: called with a text and a total; returns a function to call with what was done.

    Raises:
        DataError: it is not a directory.
    """
    started = time.monotonic()
    splits, findings = survey(directory)
    members = [
        (split, label, path)
        for split, listing in splits.items()
        for label, paths in listing.items()
        for path in paths
    ]
    advance = progress("checking", len(members)) if progress else None
    facts = list(_all_facts([path for *_, path in members], workers, advance))
    places = [(split, label, relative(path, directory)) for split, label, path in members]
    names = [name for *_, name in places]
    counts = {s: {label: len(paths) for label, paths in li.items()} for s, li in splits.items()}
    good = [f for f in facts if not f.reason]
    aspects = advise.aspects(np.array([f.width / f.height for f in good]))
    findings += _damaged(facts, names)
    findings += _surprising(facts, names)
    findings += advise.about_counts(counts)
    findings += advise.about_shapes(aspects, np.array([(f.height, f.width) for f in good]))
    copies = []
    if find_copies:
        copies = duplicates.find_copies([f.digest for f in facts], [f.bits for f in facts], places)
    findings += duplicates.about_copies(copies)
    order = ("error", "warning", "advice")
    return Report(
        directory=str(directory),
        counts=counts,
        total_bytes=sum(f.size for f in facts),
        widths=_spread([f.width for f in good]),
        heights=_spread([f.height for f in good]),
        aspects=aspects,
        formats=dict(collections.Counter(f.format for f in good).most_common()),
        modes=dict(collections.Counter(f.mode for f in good).most_common()),
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.level))),
        copies=tuple(copies),
        examples=_examples(facts, places),
        seconds=round(time.monotonic() - started, 2),
    )


def _all_facts(
    paths: list[str], workers: int, advance: Callable[[int], None] | None
) -> Iterator[_Facts]:
    def some(start: int) -> list[_Facts]:
        part = [_look_at(path) for path in paths[start : start + 32]]
        if advance:
            advance(len(part))
        return part

    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for part in pool.map(some, range(0, len(paths), 32)):
            yield from part


def _look_at(path: str) -> _Facts:
    try:
        data = read_file(path)
    except (ValueError, OSError) as error:
        return _Facts(reason=getattr(error, "strerror", None) or str(error))
    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        image = ImageFile(data)
        format, mode, moving = image.kind()
        divisor = image.divisor(27, 27)  # three times what the bits are made of
        with image.in_turn(divisor):
            bits = duplicates.picture_bits(image.pixels(3, divisor))
    except ValueError as error:
        return _Facts(reason=str(error), size=len(data), digest=digest)
    return _Facts(
        size=len(data),
        digest=digest,
        height=image.height,
        width=image.width,
        format=format,
        mode=mode,
        moving=moving,
        bits=bits,
    )


def _damaged(facts: list[_Facts], names: list[str]) -> Iterator[Finding]:
    empty = [(n, "") for n, f in zip(names, facts, strict=True) if f.reason == "empty file"]
    bad = [
        (n, f.reason)
        for n, f in zip(names, facts, strict=True)
        if f.reason and f.reason != "empty file"
    ]
    fix = "Fix: replace or remove them, or --config.data.on_bad_image=skip."
    if empty:
        yield Finding("error", "empty files", f"They hold nothing. {fix}", tuple(empty))
    if bad:
        yield Finding("error", "files that cannot be decoded", fix, tuple(bad))


def _surprising(facts: list[_Facts], names: list[str]) -> Iterator[Finding]:
    pairs = [(n, f) for n, f in zip(names, facts, strict=True) if not f.reason]
    wrong = [(n, f"is {f.format}") for n, f in pairs if not _fits(n, f.format)]
    if wrong:
        text = "Training goes by the content; other programs may not. Fix: rename them."
        yield Finding("warning", "names of another format", text, tuple(wrong))
    moving = [(n, f.format) for n, f in pairs if f.moving]
    if moving:
        yield Finding("advice", "several pictures in a file", "The first one counts.",
                      tuple(moving))  # fmt: skip
    through = [(n, f.mode) for n, f in pairs if f.mode in ALPHA]
    if through:
        text = "Pixels with an alpha channel are laid over white."
        yield Finding("advice", "transparency", text, tuple(through))


def _fits(name: str, format: str) -> bool:
    return name.lower().endswith(EXTENSIONS_OF.get(format, f".{format.lower()}"))


def _examples(
    facts: list[_Facts], places: list[tuple[str, str, str]], most: int = 8
) -> dict[str, tuple[str, ...]]:
    """Undamaged files of each class, from the beginning to the end of it."""
    members: dict[str, list[str]] = {}
    for fact, (_, label, name) in zip(facts, places, strict=True):
        if not fact.reason:
            members.setdefault(label, []).append(name)
    return {
        label: tuple(
            names[i] for i in np.linspace(0, len(names) - 1, min(most, len(names)), dtype=int)
        )
        for label, names in members.items()
    }


def _spread(values: list[int]) -> tuple[int, int, int]:
    if not values:
        return 0, 0, 0
    return min(values), round(float(np.median(values))), max(values)
