"""What follows when a training fails: another try, or a sentence that says what to change."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
from ml_collections import ConfigDict

from classic_cnns import rundir
from classic_cnns.checkpoints import Checkpoints
from classic_cnns.errors import DeviceMemoryError, NonFiniteError
from classic_cnns.resume import read_notes, warn

FIX = (
    "Fix: a lower optimizer.learning_rate, a longer schedule.warmup_epochs, "
    "optimizer.clip_norm=1, or on_divergence=rollback"
)


def non_finite(workdir: Path, what: str, images: list[int]) -> NonFiniteError:
    """The error for a step that was not finite; its images go to non_finite.json.

    Args:
        workdir: of the run.
        what: see `explain_non_finite`.
        images: numbers within the training split of the images of the step.
    """
    rundir.write_json(workdir / "non_finite.json", {"what": what, "train_images": images})
    shown = ", ".join(map(str, images[:8])) + (", …" if len(images) > 8 else "")
    return NonFiniteError(
        f"{what}, with images {shown} of train (all in non_finite.json). The last good checkpoint "
        f"stays. {FIX}"
    )


def roll_back(config: ConfigDict, error: NonFiniteError) -> Path:
    """Prepares another try from the newest sound checkpoint, with a lower learning rate.

    The count of rollbacks and the factor of the rate go into the notes of that checkpoint, so that
    a run that is stopped after this does the same when it is continued.

    Returns:
        The directory of the run.

    Raises:
        NonFiniteError: the given one, where this is not wanted or has been done often enough.
    """
    workdir: Path = error.workdir  # type: ignore[attr-defined]
    if config.on_divergence != "rollback":
        raise error
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.newest()
        if step is None:
            raise error
        notes = read_notes(step, checkpoints.manifest(step)["notes"])
        notes.rollbacks += 1
        notes.rate_scale *= config.rollback_factor
        if notes.rollbacks > config.max_rollbacks:
            raise NonFiniteError(f"after {config.max_rollbacks} rollbacks: {error}") from error
        checkpoints.save(step, {}, dataclasses.asdict(notes), keep=set())
    (workdir / "metrics.jsonl").touch()  # the time since the checkpoint is lost, see timing.py
    warn(
        f"{str(error).split('. ')[0]}. Back to step {step} with {notes.rate_scale:g} × the "
        f"learning rate (rollback {notes.rollbacks} of {config.max_rollbacks})"
    )
    return workdir


def out_of_memory(error: jax.errors.JaxRuntimeError, config: ConfigDict) -> DeviceMemoryError:
    """The error for a device that has no room for a step; any other error is raised as it is."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    devices = jax.device_count()
    smaller = max(1, config.batch_size // 2 // devices) * devices
    asked = re.search(r"allocat\w* ([\d.]+ ?[KMGT]i?B|\d+ bytes)", str(error))
    return DeviceMemoryError(
        f"out of device memory: {config.model.name} with {config.batch_size // devices} images of "
        f"{config.data.image_size or 'the source’s own'} px a device"
        f"{f', {asked[1]} were asked for' if asked else ''}. The last checkpoint stays. Fix: "
        f"--config.batch_size={smaller} in a new --workdir"
    )
