"""Finished checkpoints on a disk: which there are, which are sound, and what is in them."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from classic_cnns import manifest as manifest_lib
from classic_cnns.errors import ClassicCNNsWarning, WorkdirError
from classic_cnns.manifest import MANIFEST


class SavedCheckpoints:
    """The checkpoints in a directory; making one changes nothing there.

    Args:
        directory: of a run's checkpoints.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(os.path.abspath(directory))

    def steps(self) -> list[int]:
        """Finished steps, oldest first."""
        return [step for step in self._candidates()[0] if (self._path(step) / MANIFEST).is_file()]

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _candidates(self) -> tuple[list[int], list[str]]:
        """Directories that look like a step, oldest first, and the names of strangers."""
        steps, strangers = [], []
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            number = re.fullmatch("0|[1-9][0-9]{0,17}", path.name)
            if number and path.is_dir() and not path.is_symlink() and os.listdir(path):
                steps.append(int(path.name))
            elif path.name != "rejected" and not path.name.startswith("."):
                strangers.append(path.name)
        return sorted(steps), sorted(strangers)

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a finished step.

        Raises:
            WorkdirError: it is not as it was written.
        """
        try:
            return manifest_lib.read(self._path(step))
        except ValueError as error:
            raise self._unusable(step, str(error)) from error

    def newest(self) -> int | None:
        """The newest step whose files are all as they were written; others are moved aside.

        Returns:
            The step, or None when nothing has been saved yet.

        Raises:
            WorkdirError: there are checkpoints but none is usable.
        """
        steps, strangers = self._candidates()
        for name in strangers:
            _warn(f"{self.directory / name} ignored: not a checkpoint")
        rejected: dict[int, str] = {}
        for step in reversed(steps):
            reason = self.damage(step)
            if reason is None:
                for bad, why in rejected.items():
                    _warn(f"checkpoint {bad} rejected: {why}; using {step}")
                return step
            rejected[step] = reason
            target = self.directory / "rejected" / str(step)
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                shutil.rmtree(target)
            os.replace(self._path(step), target)
        if rejected:
            reasons = "; ".join(f"{step}: {why}" for step, why in rejected.items())
            raise WorkdirError(
                f"no usable checkpoint in {self.directory} ({len(rejected)} rejected, see "
                f"{self.directory / 'rejected'}: {reasons}). "
                "Fix: restore one, or start over in a new --workdir"
            )
        return None

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
        step = self.newest()
        return None if step is None else (step, *self._load(step, abstract))

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Host arrays and notes of one step.

        Raises:
            WorkdirError: its files are not as they were written, or of another model.
        """
        self._check(step)
        return self._load(step, abstract)

    def _load(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        manifest = self.manifest(step)
        saved, wanted = manifest["shapes"], manifest_lib.shapes(abstract)
        differences = [
            f"{name}: {saved.get(name, 'nothing')} saved, {wanted.get(name, 'nothing')} expected"
            for name in sorted(set(wanted) | set(saved))
            if saved.get(name) != wanted.get(name)
        ]
        if differences:
            raise WorkdirError(
                f"checkpoint {step} in {self.directory} is of another model "
                f"({len(differences)} differences: {'; '.join(differences[:20])}). "
                "Fix: the model and optimiser it was made with, or another --workdir"
            )
        like = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), abstract)
        return self._orbax(step, like), manifest["notes"]

    def read(self, step: int) -> dict[str, Any]:
        """Everything in one step as nested dictionaries of arrays, whatever it was saved from.

        Raises:
            WorkdirError: its files are not as they were written.
        """
        self._check(step)
        return self._orbax(step)

    def _orbax(self, step: int, *like: Any) -> Any:
        from orbax.checkpoint import v1 as ocp

        try:
            return ocp.load(self._path(step) / "state", *like)
        except Exception as error:
            versions = self.manifest(step)["run"].get("versions", {})
            version = metadata.version("orbax-checkpoint")
            raise self._unusable(
                step,
                f"orbax {version} cannot read what orbax "
                f"{versions.get('orbax-checkpoint', '?')} wrote ({type(error).__name__})",
            ) from error

    def damage(self, step: int) -> str | None:
        """What is wrong with a step's files, or None: compares every byte with the manifest."""
        return manifest_lib.damage(self._path(step), step)

    def _check(self, step: int) -> None:
        reason = self.damage(step)
        if reason:
            raise self._unusable(step, reason)

    def _unusable(self, step: int, reason: str) -> WorkdirError:
        return WorkdirError(
            f"checkpoint {step} in {self.directory}: {reason}. Fix: restore it, or train again"
        )


def _warn(message: str) -> None:
    warnings.warn(message, ClassicCNNsWarning, stacklevel=3)
