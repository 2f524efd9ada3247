"""The directory of a run: claimed once, locked while in use, readable by itself.

config.json        every field of the config
run.json           versions, git commit, data fingerprint, classes, preprocessing, each continuation
split.json         images of the splits that were drawn, where the source has no such splits
metrics.jsonl/.csv, tensorboard/, curves.png, result.json
checkpoints/
traceback.txt      of an error that nobody foresaw
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from classic_cnns.errors import ClassicCNNsError, WorkdirError, gone
from classic_cnns.manifest import LARGEST, sync

DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"  # in XLA_FLAGS before JAX starts
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def claim(parent: Path, name: str) -> Path:
    """Makes and returns the first free directory parent/name-1, parent/name-2, …; safe against
    races.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = parent / f"{name}-{number}"
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        raise WorkdirError(
            f"{parent}: {error.strerror}. Fix: --workdir=DIR where you may write"
        ) from error


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds a directory, made when missing, for one process; the kernel lets go when the process
    dies.

    Raises:
        WorkdirError: somebody else holds it, or the directory cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a+")
    except OSError as error:
        raise WorkdirError(
            f"{workdir}: {error.strerror} (user id {os.getuid()}). Fix: --workdir=DIR where you "
            "may write"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise WorkdirError(
                f"{workdir} is in use by {holder}. Fix: another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}\n")
        file.flush()
        yield


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file in one step: it is there whole or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    sync(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Names of classes may hold bytes that are no UTF-8; "\udcff" is what JSON calls them.
    replace_file(path, text.encode(errors="backslashreplace"))


def read_json(path: Path, **fields: type) -> dict[str, Any]:
    """A JSON file of a run, which holds an object.

    Args:
        path: of the file.
        fields: that it must have, with their types.

    Raises:
        WorkdirError: missing, malformed, or without one of the fields.
    """
    if not path.is_file():
        raise WorkdirError(f"{path} is missing. Fix: give the directory of a run")
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MiB")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        if _is_deep(value):
            raise ValueError("nested too deep")
        wrong = [name for name, kind in fields.items() if type(value.get(name)) is not kind]
        if wrong:
            raise ValueError(f"missing or of the wrong type: {', '.join(wrong)}")
    except (OSError, ValueError, RecursionError) as error:
        raise WorkdirError(
            f"{path}: {error}. Fix: restore the file, or another --workdir"
        ) from error
    return value


def _is_deep(value: Any, levels: int = 50) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_deep(part, levels - 1) for part in parts)


@contextlib.contextmanager
def reporting(workdir: Path) -> Iterator[None]:
    """Tells an error which run it ended, as `error.workdir`; an unexpected one leaves its traceback
    in traceback.txt.

    Raises:
        WorkdirError: a file of the run could not be written.
    """
    try:
        yield
    except Exception as error:
        error.workdir = workdir  # type: ignore[attr-defined]
        if isinstance(error, ClassicCNNsError):
            raise
        if isinstance(error, OSError) and Path(str(error.filename)).is_relative_to(workdir):
            if not workdir.is_dir():
                raise gone(workdir) from error
            raise WorkdirError(
                f"{error.filename}: {error.strerror}. Fix: the disk; the same command goes on from "
                "the last checkpoint"
            ) from error
        with contextlib.suppress(OSError):
            (workdir / "traceback.txt").write_text(
                traceback.format_exc(), errors="backslashreplace"
            )
        raise


def write_weights(path: Path, variables: Any) -> None:
    """weights.txt: name, shape and all values of every variable, for reading."""
    import jax
    import numpy as np

    with path.open("w") as file, np.printoptions(threshold=sys.maxsize, linewidth=100):
        for key, value in jax.tree_util.tree_flatten_with_path(variables)[0]:
            name = jax.tree_util.keystr(key, simple=True, separator="/")
            file.write(f"{name}\n{value.shape}\n{np.asarray(value)}\n\n")


def last_alive(workdir: Path) -> float:
    """When the run last wrote a metric, in seconds since 1970; 0 if never."""
    try:
        return (workdir / "metrics.jsonl").stat().st_mtime
    except OSError:
        return 0.0


def versions() -> dict[str, str]:
    """Of the libraries that decide what is computed."""
    return {name: metadata.version(name) for name in LIBRARIES}


def describe_run() -> dict[str, Any]:
    """Versions, machine, git commit and command, for run.json."""
    import jax

    return {
        "command": " ".join(sys.argv),
        "started": time.strftime("%F %T %z"),
        "python": sys.version.split()[0],
        "versions": versions(),
        "git": _git(),
        "platform": platform.platform(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "deterministic": DETERMINISTIC in os.environ.get("XLA_FLAGS", ""),
    }


def _git() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
            or None
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
