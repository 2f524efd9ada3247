"""A finished or unfinished run as something to compute with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
from ml_collections import ConfigDict

from classic_cnns import config as config_lib
from classic_cnns import rundir
from classic_cnns.errors import WorkdirError
from classic_cnns.saved import SavedCheckpoints


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A network with its weights and what it needs to be used.

    Attributes:
        model: the linen module.
        variables: {"params", "batch_stats"} as NumPy arrays.
        classes: names, in the order of the logits.
        preprocessing: "image_shape", "mean", "std" (pixels on the scale 0…1) and "resize".
        step: of the checkpoint.
    """

    model: nn.Module
    variables: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    step: int


def load(workdir: str | Path, which: Literal["best", "latest"] = "best") -> LoadedRun:
    """Reads a run directory; nothing else is needed, and nothing in it is executed.

    Args:
        workdir: of a run.
        which: the checkpoint with the highest validation accuracy, or the newest.

    Raises:
        WorkdirError: not a run, no checkpoint, or a damaged one.
    """
    workdir = Path(workdir).expanduser().absolute()
    info = rundir.read_json(workdir / "run.json")
    config = ConfigDict(rundir.read_json(workdir / "config.json"))
    height, width, channels = info["preprocessing"]["image_shape"]
    model = config_lib.model_from(config, len(info["classes"]), (height, width, channels))
    checkpoints = SavedCheckpoints(workdir / "checkpoints")
    steps = checkpoints.steps()
    if not steps:
        raise WorkdirError(f"{workdir} has no finished checkpoint. Fix: train for an epoch")
    step = steps[-1]
    if which == "best":
        step = checkpoints.manifest(step)["notes"]["best"]["step"] or step
    state = checkpoints.read(step)["state"]
    return LoadedRun(
        model=model,
        variables={"params": state["params"], "batch_stats": state.get("batch_stats") or {}},
        classes=tuple(info["classes"]),
        preprocessing=info["preprocessing"],
        step=step,
    )
