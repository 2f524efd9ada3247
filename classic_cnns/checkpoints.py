"""Checkpoints that are complete or not there: orbax writes, this file decides what counts.

    checkpoints/700/            one step, finished: renamed into place after everything below was
        written state/                  orbax
        MANIFEST.json           step, metrics, caller's notes, shapes, and the SHA-256 of every file
    checkpoints/.tmp-800/       being written, or left by a kill: removed at the next start
    checkpoints/rejected/       steps whose files do not match their manifest: kept, never used

orbax alone restores flipped bits without a word, counts any numeric directory as a step and deletes
in place; hence the manifest, the renames and the order of deletion.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from classic_cnns.errors import WorkdirError

MANIFEST = "MANIFEST.json"


class Checkpoints:
    """The checkpoints of one run: the newest two, and those the caller wants to keep.

    Args:
        directory: made when missing; left-overs of a killed save or deletion are removed.
        read_only: leave everything as it is.
    """

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        self.directory = Path(os.path.abspath(directory))
        if not read_only:
            self._tidy()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def _tidy(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for entry in self.directory.iterdir():
                if entry.name.startswith((".tmp-", ".old-")):
                    shutil.rmtree(entry)
        except OSError as error:
            raise WorkdirError(
                f"{self.directory}: {error.strerror}. Fix: another --workdir"
            ) from error

    def steps(self) -> list[int]:
        """Finished steps, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(
            int(e.name)
            for e in self.directory.iterdir()
            if e.name.isdigit() and (e / MANIFEST).is_file()
        )

    def save(self, step: int, tree: Any, notes: dict[str, Any], keep: set[int]) -> None:
        """Copies the tree to the host, then writes it in the background.

        Args:
            step: number of the checkpoint; saving one that exists does nothing.
            tree: of arrays.
            notes: kept in the manifest (JSON).
            keep: steps to leave beside this one and the one before it; all others are deleted
                once this one is finished.

        Raises:
            WorkdirError: the save before this one failed.
        """
        self.wait()
        if step in self.steps():
            return
        keep = {*keep, step, *self.steps()[-1:]}
        # A copy of what is on a device, since the caller donates it; host arrays are left alone.
        host = jax.tree.map(lambda a: a if isinstance(a, np.ndarray) else np.array(a), tree)
        self._pending = self._pool.submit(self._write, step, host, notes, keep)

    def wait(self) -> None:
        """Returns when everything is on disk, or raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            raise WorkdirError(
                f"a checkpoint could not be written to {self.directory}: {error}. "
                "Fix: make room, or another --workdir"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a finished step."""
        return json.loads((self.directory / str(step) / MANIFEST).read_text())

    def restore_newest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest step whose files are all as they were written.

        Args:
            abstract: tree of the saved structure with `jax.ShapeDtypeStruct` leaves.

        Returns:
            (step, tree of host arrays, notes), or None when nothing has been saved yet.

        Raises:
            WorkdirError: there are checkpoints but none is usable, or the newest is of another
                model.
        """
        candidates = sorted(
            (int(e.name) for e in self.directory.iterdir() if e.name.isdigit()), reverse=True
        )
        for step in candidates:
            reason = self.damage(step)
            if reason is None:
                return step, *self.restore(step, abstract)
            warnings.warn(f"checkpoint {step} rejected: {reason}", stacklevel=2)
            rejected = self.directory / "rejected"
            rejected.mkdir(exist_ok=True)
            target = rejected / str(step)
            if target.exists():
                shutil.rmtree(target)
            os.replace(self.directory / str(step), target)
        if candidates:
            raise WorkdirError(
                f"no usable checkpoint in {self.directory} ({len(candidates)} rejected, see "
                "rejected/). "
                "Fix: restore one, or start over in a new --workdir"
            )
        return None

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Host arrays and notes of one step.

        Raises:
            WorkdirError: its files are not as they were written, or of another model.
        """
        from orbax.checkpoint import v1 as ocp

        self._check(step)
        manifest = self.manifest(step)
        wanted = _shapes(abstract)
        differences = [
            f"{name}: {manifest['shapes'].get(name, 'nothing')} saved, "
            f"{wanted.get(name, 'nothing')} expected"
            for name in sorted(set(wanted) | set(manifest["shapes"]))
            if manifest["shapes"].get(name) != wanted.get(name)
        ]
        if differences:
            shown = "; ".join(differences[:20])
            raise WorkdirError(
                f"checkpoint {step} in {self.directory} is of another model ({len(differences)} "
                "differences: "
                f"{shown}). Fix: the model and optimiser it was made with, or another --workdir"
            )
        like = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), abstract)
        return ocp.load(self.directory / str(step) / "state", like), manifest["notes"]

    def read(self, step: int) -> dict[str, Any]:
        """Everything in one step as nested dictionaries of arrays, whatever it was saved from.

        Raises:
            WorkdirError: its files are not as they were written.
        """
        from orbax.checkpoint import v1 as ocp

        self._check(step)
        return ocp.load(self.directory / str(step) / "state")

    def _check(self, step: int) -> None:
        reason = self.damage(step)
        if reason:
            raise WorkdirError(f"checkpoint {step} in {self.directory}: {reason}. Fix: train again")

    def damage(self, step: int) -> str | None:
        """What is wrong with a step's files, or None: compares every byte with the manifest."""
        folder = self.directory / str(step)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            expected: dict[str, str] = manifest["files"]
            if manifest["step"] != step:
                return f"{MANIFEST} is of step {manifest['step']}"
        except FileNotFoundError:
            return f"incomplete (no {MANIFEST})"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{MANIFEST}: {error}"
        actual = _files(folder)
        for name in sorted(set(expected) | set(actual)):
            if name not in actual:
                return f"{name}: missing"
            if name not in expected:
                return f"{name}: not in {MANIFEST}"
            if _sha256(folder / name) != expected[name]:
                return f"{name}: SHA-256 differs"
        return None

    def _write(self, step: int, tree: Any, notes: dict[str, Any], keep: set[int]) -> None:
        from orbax.checkpoint import v1 as ocp

        temporary = self.directory / f".tmp-{step}"
        try:
            temporary.mkdir()
            ocp.save(temporary / "state", tree)
            files = {name: _sha256(temporary / name) for name in _files(temporary)}
            manifest = {"step": step, "notes": notes, "shapes": _shapes(tree), "files": files}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for name in _files(temporary) | {MANIFEST}:
                _sync(temporary / name)
            _sync(temporary)
            os.replace(temporary, self.directory / str(step))
            _sync(self.directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in set(self.steps()) - keep:
            doomed = self.directory / f".old-{old}"
            os.replace(self.directory / str(old), doomed)
            shutil.rmtree(doomed)


def _files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.is_dir() and path.relative_to(folder) != Path(MANIFEST)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shapes(tree: Any) -> dict[str, str]:
    """Name of every leaf → "float32(3, 3, 64, 64)"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): f"{a.dtype}{a.shape}"
        for p, a in leaves
    }
