"""MANIFEST.json of a checkpoint: what belongs to it, and whether that is still as it was written.

The manifest is the commit mark: it is written last, lists the SHA-256 of every other file, and
carries its own. What it says is checked by type before it is used, so that a malformed one is a
sentence and not a crash.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax

from classic_cnns.errors import WorkdirError

MANIFEST = "MANIFEST.json"
FORMAT = 1
LARGEST = 64 << 20  # bytes; far above any real one, far below what would fill the memory
FIELDS = {
    "format": int,
    "step": int,
    "notes": dict,
    "run": dict,
    "saved": dict,
    "shapes": dict,
    "files": dict,
}


def render(manifest: dict[str, Any]) -> bytes:
    """The bytes of the file, with the SHA-256 of everything else in it as the last field."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps(body | {"sha256": digest}, indent=1) + "\n").encode()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing or not as it was written; the text says what is wrong.
        WorkdirError: another version of this package wrote it, in another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"incomplete (no {MANIFEST})")
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MiB")
        data = path.read_bytes()
        manifest = json.loads(data)
        sealed = isinstance(manifest, dict) and render(manifest) == data
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST}: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST}: not an object")
    written = manifest.get("format")
    if sealed and type(written) is int and written != FORMAT:  # else a flipped bit would do it
        other = "a newer" if written > FORMAT else "an older"
        raise WorkdirError(
            f"{folder}: written in format {written}, this version of classic_cnns reads format "
            f"{FORMAT}. Fix: {other} version, the one that wrote it"
        )
    wrong = [name for name, kind in FIELDS.items() if type(manifest.get(name)) is not kind]
    if wrong:
        raise ValueError(f"{MANIFEST}: missing or of the wrong type: {', '.join(wrong)}")
    if not sealed:
        raise ValueError(f"{MANIFEST}: SHA-256 differs")
    return manifest


def damage(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, or None: compares every byte with the manifest."""
    try:
        manifest = read(folder)
        expected = manifest["files"]
        if manifest["step"] != step:
            return f"{MANIFEST} is of step {manifest['step']}"
        actual = list_files(folder) - {MANIFEST}
    except ValueError as error:
        return str(error)
    for name in sorted(set(expected) | actual):
        if name not in actual:
            return f"{name}: missing"
        if name not in expected:
            return f"{name}: not in {MANIFEST}"
        if sha256(folder / name) != expected[name]:
            return f"{name}: SHA-256 differs"
    return None


def list_files(folder: Path) -> set[str]:
    """Relative paths of all files.

    Raises:
        ValueError: something in it is neither a file nor a directory, a link for example.
    """
    names = set()
    for path in folder.iterdir():
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ValueError(f"{path.name}: not a regular file")
        names |= {f"{path.name}/{n}" for n in list_files(path)} if path.is_dir() else {path.name}
    return names


def sha256(path: Path) -> str:
    """Of a file's content; "unreadable: …" where that cannot be had."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def sync_tree(folder: Path) -> None:
    """Waits until every file in a folder and every name of one is on the disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Waits until one file, or the names in one directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def shapes(tree: Any) -> dict[str, str]:
    """Name of every leaf → "float32(3, 3, 64, 64)"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): f"{a.dtype}{a.shape}"
        for p, a in leaves
    }
