"""A second copy of a run on another disk, kept up in the background and good to go on from.

    DIR/config.json, run.json, metrics.jsonl, …     as in the run directory
    DIR/checkpoints/700/                            the newest and the best

Every file and every checkpoint appears in one step. A mirror that fails is a warning: the training
is worth more than its copy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from classic_cnns import manifest as manifest_lib
from classic_cnns import rundir
from classic_cnns.errors import ClassicCNNsWarning, Stopped, WorkdirError
from classic_cnns.manifest import MANIFEST
from classic_cnns.saved import SavedCheckpoints

FILES = (
    "run.json",
    "split.json",
    "metrics.jsonl",
    "metrics.csv",
    "curves.png",
    "result.json",
    "config.json",
)
SECONDS_AT_END = 300.0  # that the last copy may take


def fetch(mirror: str | Path, workdir: Path) -> Path:
    """Fills an empty run directory from a mirror, if there is a run in it.

    Returns:
        The mirror's absolute path.

    Raises:
        WorkdirError: it cannot be made, or holds another run than the directory.
    """
    mirror = Path(mirror).expanduser().absolute()
    if workdir.resolve() in (mirror.resolve(), *mirror.resolve().parents):
        raise WorkdirError(f"{mirror} is in the run itself. Fix: another --mirror")
    try:
        (mirror / "checkpoints").mkdir(parents=True, exist_ok=True)
        if not (mirror / "config.json").exists():
            return mirror
        if (workdir / "config.json").exists():
            ours, theirs = (rundir.read_json(d / "run.json") for d in (workdir, mirror))
            if ours.get("id") != theirs.get("id"):
                raise WorkdirError(f"{mirror} is the mirror of another run. Fix: another --mirror")
            return mirror
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        for step in SavedCheckpoints(mirror / "checkpoints").steps():
            _copy_step(mirror, workdir, step)
        _copy_files(mirror, workdir)  # config.json last: with it the directory is one of a run
    except OSError as error:
        raise WorkdirError(f"{mirror}: {error}. Fix: another --mirror") from error
    return mirror


@contextlib.contextmanager
def copying(workdir: Path, mirror: Path | None) -> Iterator[Callable[[], None] | None]:
    """Gives a function that starts a copy in the background; None without a mirror.

    While a copy is under way, calls ask for one more after it. At the end, a copy that is under way
    may finish, unless the training has failed.
    """
    if mirror is None:
        yield None
        return
    wanted, ending = threading.Event(), threading.Event()

    def work() -> None:
        failures = 0
        while wanted.wait():
            wanted.clear()
            last = ending.is_set()
            try:
                _update(workdir, mirror)
            except Exception as error:
                if wanted.is_set() and not last:
                    continue  # a checkpoint went away under it; the next copy is due anyway
                failures += 1
                warnings.warn(
                    f"mirror {mirror}: {error} (failure {failures})",
                    ClassicCNNsWarning,
                    stacklevel=1,
                )
            if last:
                return

    thread = threading.Thread(target=work, daemon=True, name="mirror")
    thread.start()
    try:
        yield wanted.set
    except BaseException as error:
        if not isinstance(error, Stopped):
            raise
        _end(thread, wanted, ending, mirror)
        raise
    else:
        _end(thread, wanted, ending, mirror)


def _end(
    thread: threading.Thread, wanted: threading.Event, ending: threading.Event, mirror: Path
) -> None:
    ending.set()
    wanted.set()
    thread.join(SECONDS_AT_END)
    if thread.is_alive():
        warnings.warn(f"mirror {mirror}: not complete", ClassicCNNsWarning, stacklevel=2)


def _update(workdir: Path, mirror: Path) -> None:
    checkpoints = SavedCheckpoints(workdir / "checkpoints")
    steps = checkpoints.steps()
    if steps:
        notes = checkpoints.manifest(steps[-1])["notes"]
        best = {notes[name]["step"] for name in ("best", "best_ema") if name in notes}
        keep = {steps[-1], *best} & set(steps)
        for step in sorted(keep):
            _copy_step(workdir, mirror, step)
        _copy_files(workdir, mirror)
        for old in set(SavedCheckpoints(mirror / "checkpoints").steps()) - keep:
            _remove(mirror, old)
    else:
        _copy_files(workdir, mirror)


def _copy_step(source: Path, target: Path, step: int) -> None:
    """Copies one checkpoint, unless it is there; of one that is, the notes may be newer."""
    a, b = (directory / "checkpoints" / str(step) for directory in (source, target))
    if (b / MANIFEST).exists():
        if (a / MANIFEST).read_bytes() != (b / MANIFEST).read_bytes():
            if manifest_lib.read(a)["files"] == manifest_lib.read(b)["files"]:
                rundir.replace_file(b.parent / f".tmp-{step}", (a / MANIFEST).read_bytes())
                os.replace(b.parent / f".tmp-{step}", b / MANIFEST)
                return
            _remove(target, step)
        else:
            return
    temporary = b.parent / f".tmp-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(a, temporary, symlinks=True)
        manifest_lib.sync_tree(temporary)
        os.replace(temporary, b)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(directory: Path, step: int) -> None:
    doomed = directory / "checkpoints" / f".old-{step}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(directory / "checkpoints" / str(step), doomed)
    shutil.rmtree(doomed)


def _copy_files(source: Path, target: Path) -> None:
    for name in FILES:
        if (source / name).exists():
            rundir.replace_file(target / name, (source / name).read_bytes())
