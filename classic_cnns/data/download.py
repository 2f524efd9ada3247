"""Files from the network: resumed, checked, and moved into place in one step."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import io
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from classic_cnns.errors import DataError

TIMEOUT_S = 10  # for the connection and for every read
ANSWER_S = 14  # for the first answer; the time-out of a connection leaves out the look-up of names


@dataclasses.dataclass(frozen=True)
class Download:
    """One file on the network and its SHA-256, or the first digits of it."""

    url: str
    sha256: str

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[1]


def fetch(name: str, download: Download, directory: Path) -> Path:
    """Path of a verified download, from the directory if it is there, else from the network.

    Written to FILENAME.part beside it and renamed once its SHA-256 agrees. An interrupted download
    is continued by the next call, if the server can; several processes take turns.

    Raises:
        DataError: no network, or wrong content; says what to put where by hand.
    """
    path, part = directory / download.filename, directory / f"{download.filename}.part"
    digits = "starts with " if len(download.sha256) < 64 else ""
    by_hand = f"get {download.url} (SHA-256 {digits}{download.sha256}) and put it in {directory}"
    if path.is_file():
        return _checked(name, path, download)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        part.open("ab").close()
    except OSError as error:
        raise DataError(
            f"{name}: cannot write to {directory}: {error.strerror}. Fix: another directory "
            f"(data.dir for data), or {by_hand}"
        ) from error
    try:
        with _claim(part) as file:
            if path.is_file():  # by the process that had claimed it before
                part.unlink()
                return _checked(name, path, download)
            digest = _complete(download, file)
            if not digest.startswith(download.sha256):
                part.unlink()
                raise DataError(
                    f"{name}: {download.url} sent other content (SHA-256 {digest}). Fix: {by_hand}"
                )
            os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, DataError):
            raise
        kept = ""
        with contextlib.suppress(OSError):
            if part.stat().st_size:
                kept = f"run it again to continue after {part.stat().st_size / 1e6:.1f} MB, or "
            else:
                part.unlink()
        raise DataError(
            f"{name}: not in {directory} and not to be had: {error}. Fix: {kept}{by_hand}"
        ) from error
    return path


def _checked(name: str, path: Path, download: Download) -> Path:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(download.sha256):
        raise DataError(f"{name}: {path}: SHA-256 differs from the original's. Fix: delete it")
    return path


@contextlib.contextmanager
def _claim(part: Path) -> Iterator[io.BufferedRandom]:
    """The file, locked; waits for another process that writes it, which may rename or delete it."""
    while True:
        with part.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                    yield file
                    return


def _complete(download: Download, file: io.BufferedRandom) -> str:
    """Appends what is missing; SHA-256 of the whole."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    done = file.tell()
    if done and digest.hexdigest().startswith(download.sha256):
        return digest.hexdigest()  # whole, and killed before it was renamed
    try:
        response = _open(download.url, done)
    except urllib.error.HTTPError as error:
        if not done or error.code != 416:  # nothing there after what we have: it is another file
            raise
        response = _open(download.url, 0)
    with response:
        if done and not str(response.headers.get("Content-Range")).startswith(f"bytes {done}-"):
            file.truncate(0)  # the server sends all of it
            digest, done = hashlib.sha256(), 0
        shown = time.monotonic()
        total = done + int(response.headers.get("Content-Length") or 0)
        while block := response.read(1 << 20):
            file.write(block)
            digest.update(block)
            done += len(block)
            if time.monotonic() - shown > 1:
                shown = time.monotonic()
                of = f" of {total / 1e6:.0f}" if total else ""
                print(f"downloading {download.filename}: {done / 1e6:.0f}{of} MB", file=sys.stderr)
    file.flush()
    if done < total:
        raise OSError(f"connection ended after {done:,} of {total:,} bytes")
    return digest.hexdigest()


def _open(url: str, start: int) -> Any:
    """`urlopen` from a byte on, which fails for certain when nothing answers."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=TIMEOUT_S))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_S} s") from None
    if isinstance(answer, urllib.error.HTTPError):
        answer.close()
    if isinstance(answer, Exception):
        raise answer
    return answer
