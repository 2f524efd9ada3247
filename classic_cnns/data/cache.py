"""Decoded images on disk: one file of uint8 pixels, made once, mapped into memory afterwards.

DIR/KEY/images.bin    (N, H, W, C) uint8
DIR/KEY/manifest.json shape, SHA-256 of each chunk of images, files that could not be decoded

KEY says which files (names, sizes, times of change, or origin), in which geometry. A cache is
written beside its place and renamed when it is whole; a build that was interrupted goes on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from classic_cnns.data.preprocess import Preprocess
from classic_cnns.data.splits import Encoded, Split
from classic_cnns.errors import DataError

CHUNK = 256  # images whose pixels share one checksum
VERSION = 2  # of the format and of what decoding yields

Progress = Callable[[str, int], Callable[[int], None]]


def decode_splits(
    splits: dict[str, Split],
    preprocess: dict[str, Preprocess],
    *,
    directory: Path | None,
    workers: int,
    skip: bool,
    max_bad_fraction: float,
    progress: Progress | None,
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Encoded splits as decoded ones, through the cache where there is a directory for it.

    Args:
        splits, preprocess: by name.
        directory: of all caches, or None.
        workers: see `decode_all`.
        skip, max_bad_fraction: see `report_bad`.
        progress: called with a text and a total; returns a function to call with what was done.

    Returns:
        The splits without the images that cannot be decoded, and warnings.

    Raises:
        DataError: see `report_bad`; over all splits at once.
        OSError: the cache cannot be made.
    """
    out: dict[str, Split] = {}
    reasons: dict[str, str] = {}
    for name, split in splits.items():
        images: Encoded = split.images
        advance = progress(f"decoding {name}", len(split)) if progress else None
        how: dict[str, Any] = {"workers": workers, "progress": advance}
        if directory is None:
            pixels, bad = decode_all(images, preprocess[name], **how)
        else:
            pixels, bad = open_cache(images, preprocess[name], directory, **how)[:2]
        reasons |= {images.names[i]: reason for i, reason in bad.items()}
        out[name] = Split(pixels, split.labels).without(list(bad))
    total = sum(map(len, splits.values()))
    return out, report_bad(reasons, total, limit=max_bad_fraction, skip=skip)


def decode_all(
    images: Encoded,
    preprocess: Preprocess,
    *,
    out: np.ndarray | None = None,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
    start: int = 0,
    stop: int | None = None,
    unread: list[OSError] | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Decodes images with all cores.

    Args:
        images: what to decode.
        preprocess: their geometry.
        out: (N, H, W, C) uint8 to fill; by default a new array.
        workers: threads; 0 = one a core.
        progress: called with the number of images that have just been done.
        start, stop: a part of them.
        unread: gets the errors of reading, which may be others next time.

    Returns:
        The array, and the reason for each image that could not be decoded, by number.
    """
    unread = [] if unread is None else unread
    stop = len(images) if stop is None else stop
    if out is None:
        out = np.empty((len(images), *preprocess.image_shape), np.uint8)
    bad: dict[int, str] = {}

    def some(first: int) -> None:
        last = min(first + 16, stop)
        for i in range(first, last):
            try:
                out[i] = preprocess(images.read(images.names[i]))
            except (ValueError, OSError) as error:
                out[i] = 0
                unread.extend([error] if isinstance(error, OSError) else [])
                bad[i] = getattr(error, "strerror", None) or str(error)
        if progress:
            progress(last - first)

    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        list(pool.map(some, range(start, stop, 16)))
    return out, dict(sorted(bad.items()))


def open_cache(
    images: Encoded,
    preprocess: Preprocess,
    directory: Path,
    *,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, dict[int, str], str]:
    """Decoded images, from the cache if it is there and as it was written, else made now.

    Args:
        images, preprocess, workers, progress: see `decode_all`.
        directory: of all caches.

    Returns:
        (N, H, W, C) uint8 mapped read-only; bad files as in `decode_all`; what was done, in words.

    Raises:
        OSError: no room, no permission, or a file that cannot be read.
    """
    key = cache_key(images, preprocess)
    place = directory / key
    shape = (len(images), *preprocess.image_shape)
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory / f".{key}.lock"):
        done = "decoded earlier"
        problem = _damage(place, shape) if place.is_dir() else "absent"
        if problem:
            done = "decoded now" if problem == "absent" else f"decoded again ({problem})"
            shutil.rmtree(place, ignore_errors=True)
            _build(images, preprocess, place, shape, workers, progress)
    manifest = json.loads((place / "manifest.json").read_text())
    pixels = np.memmap(place / "images.bin", np.uint8, "r", shape=shape)
    return pixels, {int(i): reason for i, reason in manifest["bad"].items()}, f"{done}: {place}"


def cache_key(images: Encoded, preprocess: Preprocess) -> str:
    """Sixteen hexadecimal digits; other files or another geometry give others. An OSError is raised
    for a name that is of no file, of images without an origin.
    """
    digest = hashlib.sha256(
        f"{VERSION} {preprocess.image_shape} {preprocess.mode} {preprocess.resize} "
        f"{preprocess.interpolation}".encode()
    )
    if preprocess.mode == "letterbox":
        digest.update(str(preprocess.mean).encode())
    digest.update(images.origin.encode())
    for name in images.names:
        digest.update(os.fsencode(name))
        if not images.origin:
            stat = os.stat(name)
            digest.update(f" {stat.st_size} {stat.st_mtime_ns}".encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _build(
    images: Encoded,
    preprocess: Preprocess,
    place: Path,
    shape: tuple[int, ...],
    workers: int,
    progress: Callable[[int], None] | None,
) -> None:
    building = place.with_name(f".{place.name}.building")
    building.mkdir(exist_ok=True)
    journal = building / "journal.jsonl"
    try:
        with (building / "images.bin").open("a+b") as file:
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape, dtype=np.int64)) or 1)
        pixels = np.memmap(building / "images.bin", np.uint8, "r+", shape=shape)
        done = _finished_chunks(journal, pixels)
        with journal.open("a") as log, concurrent.futures.ThreadPoolExecutor(1) as beside:

            def record(chunk: int, part: np.ndarray, bad: dict[int, str]) -> None:
                done[chunk] = {"chunk": chunk, "sha256": _sha256(part), "bad": bad}
                print(json.dumps(done[chunk]), file=log, flush=True)

            recorded = []  # each chunk while the next one is decoded
            for chunk, start in enumerate(range(0, shape[0], CHUNK)):
                stop = min(start + CHUNK, shape[0])
                if chunk in done:
                    if progress:
                        progress(stop - start)
                    continue
                unread: list[OSError] = []
                _, bad = decode_all(
                    images, preprocess, out=pixels, workers=workers, progress=progress,
                    start=start, stop=stop, unread=unread,
                )  # fmt: skip
                if unread:
                    raise unread[0]
                recorded.append(beside.submit(record, chunk, pixels[start:stop], bad))
            for future in recorded:
                future.result()
        # Not flushed to the disk: what a power cut takes away is found missing at the next start.
        entries = [done[chunk] for chunk in sorted(done)]
        bad = {i: reason for e in entries for i, reason in e["bad"].items()}
        sums = [e["sha256"] for e in entries]
        manifest = {"shape": shape, "chunk": CHUNK, "sha256": sums, "bad": bad}
        (building / "manifest.json").write_text(json.dumps(manifest))
        journal.unlink()
        os.replace(building, place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            shutil.rmtree(building, ignore_errors=True)
        raise


def _finished_chunks(journal: Path, pixels: np.ndarray) -> dict[int, dict[str, Any]]:
    """Chunks of an interrupted build whose pixels are as they were written."""
    done: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(OSError, ValueError, KeyError):
        for line in journal.read_text().splitlines():
            entry = json.loads(line)
            start = entry["chunk"] * CHUNK
            if _sha256(pixels[start : start + CHUNK]) == entry["sha256"]:
                done[entry["chunk"]] = entry
    return done


def _damage(place: Path, shape: tuple[int, ...]) -> str:
    """What is wrong with a finished cache, or ""; reads every byte once, with all cores."""
    try:
        manifest = json.loads((place / "manifest.json").read_text())
        expected: list[str] = manifest["sha256"]
        if manifest["shape"] != list(shape) or manifest["chunk"] != CHUNK:
            return "its manifest is of other images"
        if (place / "images.bin").stat().st_size != int(np.prod(shape, dtype=np.int64)):
            return "images.bin is cut short"
        pixels = np.memmap(place / "images.bin", np.uint8, "r", shape=shape)
        parts = (pixels[s : s + CHUNK] for s in range(0, shape[0], CHUNK))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            actual = list(pool.map(_sha256, parts))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if actual == expected else "images.bin has changed since it was written"


def _sha256(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.data).hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the others wait and then find the cache made."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def report_bad(bad: dict[str, str], total: int, *, limit: float, skip: bool) -> tuple[str, ...]:
    """A warning about files that could not be decoded, or nothing.

    Args:
        bad: reasons by name.
        total: number of files.
        limit: share of them up to which they may be skipped.
        skip: whether they may be skipped at all.

    Raises:
        DataError: names the files and the reasons.
    """
    if not bad:
        return ()
    lines = [f"{name!r}: {reason}" for name, reason in bad.items()]
    shown = "\n  ".join(lines[:20])
    more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
    text = f"{len(bad)} of {total} files cannot be decoded:\n  {shown}{more}"
    if not skip:
        raise DataError(f"{text}\nFix: replace or remove them, or --config.data.on_bad_image=skip")
    if len(bad) > limit * total:
        raise DataError(f"{text}\nFix: replace them, or a larger data.max_bad_fraction ({limit:g})")
    return (f"{text}\nThey are left out.",)
