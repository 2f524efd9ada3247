"""A finished or unfinished run as something to compute with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from classic_cnns import config as config_lib
from classic_cnns import rundir
from classic_cnns.data.preprocess import Preprocess
from classic_cnns.data.splits import Dataset, Split
from classic_cnns.errors import ClassicCNNsError, ConfigError, WorkdirError
from classic_cnns.saved import SavedCheckpoints


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A network with its weights and what it needs to be used.

    Attributes:
        model: the linen module.
        variables: {"params", "batch_stats"} as NumPy arrays.
        classes: names, in the order of the logits.
        preprocess: what images go through, see `data.Preprocess`.
        step: of the checkpoint.
        name: of the network, see `list_models`.
    """

    model: nn.Module
    variables: dict[str, Any]
    classes: tuple[str, ...]
    preprocess: Preprocess
    step: int
    name: str


def load(
    workdir: str | Path, which: Literal["best", "latest"] = "best", *, ema: bool = False
) -> LoadedRun:
    """Reads a run directory; nothing else is needed, and nothing in it is executed.

    Args:
        workdir: of a run.
        which: the checkpoint with the highest validation accuracy, or the newest.
        ema: the moving averages of the weights, and the best of those.

    Raises:
        WorkdirError: not a run, no checkpoint, or a damaged one, or one without averages.
    """
    workdir = Path(workdir).expanduser().absolute()
    info = rundir.read_json(workdir / "run.json", classes=list, preprocessing=dict)
    saved = rundir.read_json(workdir / "config.json", model=dict)
    with _reading(workdir / "run.json or config.json"):
        preprocess = Preprocess.from_dict(info["preprocessing"])
        model = config_lib.model_from(
            ConfigDict(saved),
            len(info["classes"]),
            preprocess.image_shape,
            **info.get("model_fields", {}),
        )
    checkpoints = SavedCheckpoints(workdir / "checkpoints")
    steps = checkpoints.steps()
    if not steps:
        raise WorkdirError(f"{workdir} has no finished checkpoint. Fix: train for an epoch")
    step = steps[-1]
    if which == "best":
        with _reading(checkpoints.directory / str(step) / "MANIFEST.json"):
            notes = checkpoints.manifest(step)["notes"]
            best = notes.get("best_ema", {"step": 0}) if ema else notes["best"]
            step = int(best["step"]) or step
    state = checkpoints.read(step)["state"]
    if ema and not state.get("ema"):
        raise WorkdirError(f"{workdir} has no averaged weights. Fix: train with config.ema_decay")
    state = state["ema"] if ema else state
    return LoadedRun(
        model=model,
        variables={"params": state["params"], "batch_stats": state.get("batch_stats") or {}},
        classes=tuple(info["classes"]),
        preprocess=preprocess,
        step=step,
        name=saved["model"]["name"],
    )


@contextlib.contextmanager
def _reading(what: Path | str) -> Iterator[None]:
    """Names the file where something in it is missing or of a wrong type."""
    try:
        yield
    except ClassicCNNsError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise WorkdirError(
            f"{what} is malformed ({type(error).__name__}: {error}). Fix: restore it"
        ) from error


def load_dataset(
    workdir: str | Path, run: LoadedRun, source: str = "", dir: str = "", **settings: Any
) -> Dataset:
    """The data of a run, or other data, gone through the run's own preprocessing.

    Args:
        workdir: of the run.
        run: see `load`.
        source: see `create_dataset`; "" = what the run was trained on, with its splits, which
            the run's own source and directory mean, too.
        dir: where it is; "" = as in the run.
        **settings: of `create_dataset`, over those of the run.

    Returns:
        The data, with training images as large as the others, and the labels of classes that the
        run knows in another order changed to its numbers.

    Raises:
        ConfigError: neither the run nor the caller says which data.
    """
    saved = rundir.read_json(Path(workdir).expanduser() / "config.json")
    data: Any = saved.get("data") if isinstance(saved.get("data"), dict) else {}
    own = not source or (source, dir or data.get("dir")) == (data.get("source"), data.get("dir"))
    if not own:
        config = ConfigDict({"data": {"source": source, "balance": "none"}, "seed": 0})
    elif data:
        config = ConfigDict(saved)
    else:
        raise ConfigError("these weights come without data. Fix: --data=cifar10, say")
    if dir:
        config.data.dir = dir
    split = Path(workdir).expanduser() / "split.json"
    if own and split.is_file():
        settings = {"split_file": str(split)} | settings
    settings = {"train_margin": 1.0} | settings
    dataset = config_lib.dataset_from(config, preprocess=run.preprocess, **settings)
    if dataset.classes != run.classes and sorted(dataset.classes) == sorted(run.classes):
        theirs = np.array([run.classes.index(name) for name in dataset.classes], np.int32)
        parts: dict[str, Any] = {
            k: Split(s.images, theirs[s.labels]) for k, s in dataset.splits.items()
        }
        dataset = dataclasses.replace(dataset, classes=run.classes, **parts)
    return dataset
