"""Checkpoints that are complete or not there: orbax writes, this file decides what counts.

    checkpoints/700/            one step, finished: renamed into place when all of it was written
        state/                  orbax
        MANIFEST.json           step, notes, shapes, the run, and the SHA-256 of every file
    checkpoints/.tmp-800/       being written, or left by a kill: removed at the next start
    checkpoints/.old-600/       being deleted, likewise
    checkpoints/rejected/       steps whose files do not match their manifest: kept, never used

orbax alone restores flipped bits without a word, counts any numeric directory as a step and deletes
in place; hence the manifest, the renames and the order of deletion.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from classic_cnns import manifest as manifest_lib
from classic_cnns.errors import ClassicCNNsWarning, NonFiniteError, Stopped, WorkdirError, gone
from classic_cnns.manifest import MANIFEST
from classic_cnns.saved import SavedCheckpoints
from classic_cnns.snapshot import Snapshot, check_finite

SECONDS_AFTER_ERROR = 8.0  # that a save may still take when the training has failed


class Checkpoints(SavedCheckpoints):
    """The checkpoints of one run: the newest two, and those the caller wants to keep.

    Args:
        directory: made when missing; left-overs of a killed save or deletion are removed.
        run: facts about the run that go into every manifest.
        on_saved: called in the background after each save.

    Attributes:
        missed: the last step that was to be saved, where there was no room for it.
        seconds: that the last save took.
    """

    def __init__(
        self,
        directory: Path,
        *,
        run: dict[str, Any] | None = None,
        on_saved: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(directory)
        self.run, self.on_saved = run or {}, on_saved
        self.missed: int | None = None
        self.seconds = 0.0
        self._tidy()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._step = -1
        self._snapshot = Snapshot()

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

    def prepare(self, tree: Any) -> None:
        """Takes the memory for copies of a tree like this, which is slow the first time; warns of
        a disk without room for two.
        """
        self._snapshot.take(tree)
        needed = 2 * sum(a.nbytes for a in jax.tree.leaves(tree))
        self.seconds = needed / 1e8
        free = self._free()
        if free < needed:
            warnings.warn(
                f"{self.directory}: {megabytes(free)} free, two checkpoints need about "
                f"{megabytes(needed)}. Fix: free space, or another --workdir",
                ClassicCNNsWarning,
                stacklevel=2,
            )

    def save(
        self,
        step: int,
        tree: Any,
        notes: dict[str, Any],
        keep: set[int],
        seconds: dict[str, float] | None = None,
    ) -> None:
        """Copies the tree on its device, then writes it in the background.

        Where the disk is too full, that is a warning, and `missed` is the step.

        Args:
            step: number of the checkpoint; of one that exists, only the notes are replaced.
            tree: of arrays.
            notes: kept in the manifest (JSON).
            keep: steps to leave beside this one and the one before it; all others are deleted
                once this one is finished.
            seconds: how the run's time was spent until now; kept beside the notes.

        Raises:
            WorkdirError: the save before this one failed.
            NonFiniteError: the tree of the save before this one was not finite.
        """
        self.wait()
        self._step = step
        if (self._path(step) / MANIFEST).exists():
            self._pending = self._pool.submit(self._annotate, step, notes)
            return
        needed = sum(a.nbytes for a in jax.tree.leaves(tree))
        free = self._free()
        if free < needed:
            self._miss(f"needs about {megabytes(needed)}, {megabytes(free)} free")
            return
        keep = {*keep, step, *self.steps()[-1:]}
        saved = {"at": time.time(), "seconds": seconds or {}}
        tree = self._snapshot.take(tree)
        self._pending = self._pool.submit(self._write, step, tree, notes, keep, saved)

    def poll(self) -> None:
        """Raises what went wrong in the background, if anything did; never waits."""
        if self._pending and self._pending.done():
            self.wait()

    def wait(self, timeout: float | None = None) -> None:
        """Returns when everything is on disk, or raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result(timeout)
        except NonFiniteError:
            raise
        except Exception as error:
            if not self.directory.is_dir():
                raise gone(self.directory) from error
            if not _is_full(error):
                raise WorkdirError(
                    f"checkpoint {self._step} could not be written to {self.directory}: "
                    f"{' '.join(str(error).split())[:300] or type(error).__name__}. "
                    "Fix: the disk, or another --workdir"
                ) from error
            self._miss(f"no space left, {megabytes(self._free())} free")
        else:
            self.missed = None

    def _free(self) -> int:
        try:
            return shutil.disk_usage(self.directory).free
        except OSError as error:
            raise WorkdirError(
                f"{self.directory}: {error.strerror}; was it removed during the training? Fix: "
                "start again with another --workdir"
            ) from error

    def _miss(self, why: str) -> None:
        self.missed = self._step
        warnings.warn(
            f"checkpoint {self._step} not saved: {self.directory}: {why}. Fix: free space; the "
            "next checkpoint is tried again",
            ClassicCNNsWarning,
            stacklevel=3,
        )

    def finish(self) -> None:
        """Waits, and raises WorkdirError where the last checkpoint asked for is missing."""
        self.wait()
        if self.missed is not None:
            raise WorkdirError(
                f"checkpoint {self.missed}, the last one, is not saved: no space left in "
                f"{self.directory}. Fix: free space; the same command continues from the "
                "checkpoint before it"
            )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and not issubclass(kind, Stopped)
        try:
            self.wait(SECONDS_AFTER_ERROR if failed else None)
        except (WorkdirError, NonFiniteError):
            if not failed:  # else what failed first is the message
                raise
        finally:
            self._pool.shutdown(wait=not failed, cancel_futures=True)

    def _write(
        self, step: int, tree: Any, notes: dict[str, Any], keep: set[int], saved: dict[str, Any]
    ) -> None:
        from orbax.checkpoint import v1 as ocp

        start = time.monotonic()
        tree = jax.tree.map(np.asarray, tree)
        check_finite(tree)
        temporary = self.directory / f".tmp-{step}"
        try:
            temporary.mkdir()
            context = ocp.Context()
            context.memory.deepcopy_host_arrays = False  # it returns when all is written
            with context, _own_reports_only():
                ocp.save(temporary / "state", tree)
            names = sorted(manifest_lib.list_files(temporary))
            manifest = {
                "format": manifest_lib.FORMAT,
                "step": step,
                "notes": notes,
                "run": self.run,
                "saved": saved,
                "shapes": manifest_lib.shapes(tree),
                "files": {name: manifest_lib.sha256(temporary / name) for name in names},
            }
            (temporary / MANIFEST).write_bytes(manifest_lib.render(manifest))
            manifest_lib.sync_tree(temporary)
            os.replace(temporary, self._path(step))
            manifest_lib.sync(self.directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in set(self.steps()) - keep:
            doomed = self.directory / f".old-{old}"
            os.replace(self._path(old), doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        self.seconds = time.monotonic() - start
        if self.on_saved:
            self.on_saved()

    def _annotate(self, step: int, notes: dict[str, Any]) -> None:
        """Replaces the notes of a finished step, in one step."""
        temporary = self.directory / f".tmp-{step}"  # outside, where the next start removes it
        try:
            temporary.mkdir()
            new = temporary / MANIFEST
            new.write_bytes(manifest_lib.render(self.manifest(step) | {"notes": notes}))
            manifest_lib.sync(new)
            os.replace(new, self._path(step) / MANIFEST)
            manifest_lib.sync(self._path(step))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if self.on_saved:
            self.on_saved()


@contextlib.contextmanager
def _own_reports_only() -> Iterator[None]:
    """Without the tracebacks orbax logs of errors that it raises as well."""

    def wanted(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    logger = logging.getLogger("absl")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def _is_full(error: Exception) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)


def megabytes(count: int) -> str:
    """For people."""
    return f"{count / 1e6:,.0f} MB"
