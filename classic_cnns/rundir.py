"""The directory of a run: claimed once, locked while in use, readable by itself.

config.json        every field of the config
run.json           versions, git commit, data fingerprint, classes, preprocessing, best step
metrics.jsonl/.csv, tensorboard/, curves.png, result.json
checkpoints/
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
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from classic_cnns.errors import WorkdirError

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
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, text.encode())


def read_json(path: Path) -> Any:
    """A JSON file of a run.

    Raises:
        WorkdirError: missing or malformed.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise WorkdirError(f"{path} is missing. Fix: give the directory of a run") from error
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{path}: {error}. Fix: restore the file, or another --workdir"
        ) from error


def write_weights(path: Path, variables: Any) -> None:
    """weights.txt: name, shape and all values of every variable, for reading."""
    import jax
    import numpy as np

    with path.open("w") as file, np.printoptions(threshold=sys.maxsize, linewidth=100):
        for key, value in jax.tree_util.tree_flatten_with_path(variables)[0]:
            name = jax.tree_util.keystr(key, simple=True, separator="/")
            file.write(f"{name}\n{value.shape}\n{np.asarray(value)}\n\n")


def describe_run(argv: list[str]) -> dict[str, Any]:
    """Versions, machine, git commit and command, for run.json."""
    import jax

    return {
        "command": " ".join(argv),
        "started": time.strftime("%F %T %z"),
        "python": sys.version.split()[0],
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "git": _git(),
        "platform": platform.platform(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
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
