"""Images that are there twice: the same bytes, or pictures that look the same.

A picture is 128 bits: of its 9×9 grey version, whether each pixel is brighter than its neighbour on
the left and than the one above ("dHash", N. Krawetz, 2013, in both directions). Two that differ in
at most `BOUND` bits look the same: one is a resized, recompressed or slightly retouched copy.

Pairs are found by buckets. Of 8 bands of 16 bits, a pair that differs in at most 7 bits has at
least one band in common, so only images that share a band are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import cv2
import numpy as np

from classic_cnns.data.layout import Finding

BOUND = 7  # bits of 128; one band of 16 bits must stay the same
FLAT = 4.0  # grey levels of deviation below which the bits are those of noise


@dataclasses.dataclass(frozen=True)
class Copies:
    """Files that hold the same picture.

    Attributes:
        exact: whether even their bytes are the same.
        files: (split, class, path inside the folder) of each.
    """

    exact: bool
    files: tuple[tuple[str, str, str], ...]

    @property
    def labels(self) -> int:
        """In how many classes they are."""
        return len({label for _, label, _ in self.files})

    @property
    def splits(self) -> int:
        """In how many splits they are."""
        return len({split for split, _, _ in self.files})


def find_copies(
    digests: list[bytes], bits: list[np.ndarray | None], places: list[tuple[str, str, str]]
) -> list[Copies]:
    """Groups of files, those with different labels first, then those in several splits.

    Args:
        digests: of the content of each file; b"" = not to be compared.
        bits: see `picture_bits`.
        places: see `Copies`.
    """
    here = [i for i, digest in enumerate(digests) if digest]
    number: dict[bytes, int] = {}
    content = np.array([number.setdefault(digests[i], len(number)) for i in here], np.int64)
    first = np.unique(content, return_index=True)[1].tolist()
    seen: dict[bytes, int] = {}  # picture → the first content that shows it
    pairs = []
    for key, i in enumerate(first):
        picture = bits[here[i]]
        if picture is not None:
            pairs.append((key, seen.setdefault(picture.tobytes(), key)))
    different = np.array([np.frombuffer(picture, np.uint64) for picture in seen]).reshape(-1, 2)
    similar = np.array(list(seen.values()), np.int64)[similar_pairs(different)]
    together = np.concatenate([np.array(pairs, np.int64).reshape(-1, 2), similar])
    copies = [
        Copies(len(set(content[group].tolist())) == 1, tuple(places[here[i]] for i in group))
        for group in groups(content, together)
    ]
    return sorted(copies, key=lambda c: (c.labels == 1, c.splits == 1))


def about_copies(copies: list[Copies]) -> Iterator[Finding]:
    """What copies do to training and to its results."""

    def files(chosen: list[Copies]) -> tuple[tuple[str, str], ...]:
        return tuple(
            (name, f"group {number}") for number, c in enumerate(chosen, 1) for *_, name in c.files
        )

    if chosen := [c for c in copies if c.labels > 1]:
        text = f"{_groups(chosen)}: the network is told two things. Fix: keep each in one class."
        yield Finding("warning", "the same picture with different labels", text, files(chosen))
    if chosen := [c for c in copies if c.splits > 1]:
        text = (
            f"{_groups(chosen)}: what is measured has been trained on, so results look better than "
            "they are. Fix: keep each in one split."
        )
        yield Finding("warning", "the same picture in several splits", text, files(chosen))
    if chosen := [c for c in copies if c.labels == c.splits == 1]:
        text = f"{_groups(chosen)}: they count more than once"
        if chosen[0].files[0][0] == "all":
            text += ", and may be drawn into train and test"
        yield Finding("advice", "the same picture twice in a class", f"{text}.", files(chosen))


def _groups(copies: list[Copies]) -> str:
    exact = sum(c.exact for c in copies)
    return f"{exact} with the same bytes, {len(copies) - exact} that look the same"


def picture_bits(pixels: np.ndarray) -> np.ndarray | None:
    """The bits of a picture.

    Args:
        pixels: (H, W, 3) uint8.

    Returns:
        (2,) uint64, or None for one without content, such as a white page.
    """
    small = cv2.resize(pixels, (9, 9), interpolation=cv2.INTER_AREA)
    grey = small.astype(np.int32) @ np.array([299, 587, 114], np.int32)
    if grey.std() < 1000 * FLAT:
        return None
    across, down = grey[:8, 1:] > grey[:8, :8], grey[1:, :8] > grey[:8, :8]
    return np.packbits(np.stack([across, down])).view(np.uint64)


def similar_pairs(bits: np.ndarray, bound: int = BOUND) -> np.ndarray:
    """All pairs of pictures that differ in at most `bound` bits.

    Args:
        bits: (N, 2) uint64, no two the same.
        bound: 0 to 7.

    Returns:
        (P, 2) integers i < j, in rising order.
    """
    found = [pairs for band in range(8) for pairs in _pairs_of_band(bits, band, bound)]
    if not found:
        return np.empty((0, 2), np.int64)
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _pairs_of_band(bits: np.ndarray, band: int, bound: int) -> Iterator[np.ndarray]:
    """Sorted by band, the members of a bucket are neighbours: compare each with the next, with the
    next but one, and so on, until no bucket is that large.
    """
    key = bits.view(np.uint16).reshape(len(bits), 8)[:, band]
    order = np.argsort(key, kind="stable")
    key, bits = key[order], bits[order]
    at = np.arange(len(bits))
    distance = 1
    while len(at):
        at = at[at + distance < len(bits)]
        at = at[key[at] == key[at + distance]]
        apart = np.bitwise_count(bits[at] ^ bits[at + distance]).sum(1, dtype=np.int64)
        near = at[apart <= bound]
        yield order[np.stack([near, near + distance], axis=1)]
        distance += 1


def groups(keys: np.ndarray, pairs: np.ndarray) -> list[np.ndarray]:
    """Connected members, for example copies of copies.

    Args:
        keys: (N,) integers; equal ones belong together.
        pairs: (P, 2) of keys that belong together, too.

    Returns:
        The numbers 0…N−1 of each group of two and more, in rising order.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(keys):
        return []
    size = int(keys.max()) + 1
    graph = coo_array((np.ones(len(pairs), bool), tuple(pairs.T)), shape=(size, size))
    component = connected_components(graph, directed=False)[1][keys]
    order = np.argsort(component, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    return sorted((part for part in parts if len(part) > 1), key=lambda part: int(part[0]))
