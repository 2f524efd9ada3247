"""Weights that a training starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from classic_cnns import loading, rundir, weights
from classic_cnns.data import Dataset
from classic_cnns.errors import ConfigError, DataError
from classic_cnns.models import create_model, resolve_name
from classic_cnns.saved import SavedCheckpoints
from classic_cnns.weights.convert import Report
from classic_cnns.weights.pretrained import is_tag

# Fields of the networks that the shapes of weights, or what they compute, depend on.
_FIELDS = (
    *("arch", "batch_norm", "bn_epsilon", "bottleneck_stride", "head", "shortcut", "stem"),
    "variant",
)
Path_ = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Start:
    """Weights to start from, or none.

    Attributes:
        source: as it was asked for; "" = none, everything is fresh.
        fields: of the network that the weights decide.
        mean, std: per channel (RGB), for pixels on the scale 0…1; what the weights were made for.
        variables: {"params", "batch_stats"} as NumPy arrays; None when a checkpoint follows them.
    """

    source: str = ""
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    variables: Any = None

    def normalize_as_before(self, dataset: Dataset) -> Dataset:
        """The dataset with the mean and std of the weights."""
        if not self.source:
            return dataset
        preprocess = dataclasses.replace(dataset.preprocess, mean=self.mean, std=self.std)
        return dataclasses.replace(dataset, preprocess=preprocess)

    def describe(self, report: Report) -> list[str]:
        """Lines of text for people."""
        if not self.source:
            return []
        numbers = [f"({', '.join(f'{v:.4g}' for v in values)})" for values in (self.mean, self.std)]
        lines = [
            f"pretrained {self.source}, images normalised with its mean {numbers[0]}, std "
            f"{numbers[1]}"
        ]
        return lines + (str(report).splitlines() if self.variables is not None else [])


def find_start(
    source: str, name: str, options: dict[str, Any], workdir: str | Path | None = None
) -> Start:
    """Reads the weights that a training asks for.

    Args:
        source: a tag of published weights, a weight file, a run directory, or "" for none.
        name: of the network that is trained.
        options: its fields that the training sets.
        workdir: of the training. Where it has a checkpoint already, nothing is read but what it
            says itself.

    Raises:
        ConfigError: the run directory is of another network.
        DataError, WorkdirError: see `load_weights` and `load`.
    """
    if not source:
        return Start()
    if workdir is not None:
        workdir = Path(workdir).expanduser().absolute()
        if SavedCheckpoints(workdir / "checkpoints").steps():
            info = rundir.read_json(workdir / "run.json")
            mean, std = (tuple(info["preprocessing"][key]) for key in ("mean", "std"))
            return Start(source, info.get("model_fields", {}), mean, std)
    path = Path(source).expanduser()
    if path.is_dir() and not is_tag(source):
        run = loading.load(path)
        model = resolve_name(rundir.read_json(path / "run.json")["model"])
        if model != resolve_name(name):
            raise ConfigError(
                f"model.pretrained: {path} is a {model}, and {name} is trained. Fix: "
                f"--config.model.name={model}, or other weights"
            )
    else:
        run, _ = weights.load_weights(source if is_tag(source) else path, name, **options)
    return _start(source, name, run)


def _start(source: str, name: str, run: loading.LoadedRun) -> Start:
    default = create_model(name)
    fields = {
        key: getattr(run.model, key)
        for key in _FIELDS
        if hasattr(run.model, key) and getattr(run.model, key) != getattr(default, key)
    }
    for key in ("stem", "head", "variant"):  # what "auto" meant for the images of that run
        if hasattr(run.model, key):
            stem_for: Any = run.model.stem_for  # type: ignore[attr-defined]
            fields[key] = stem_for(min(run.preprocess.image_shape[:2]))
    return Start(source, fields, run.preprocess.mean, run.preprocess.std, run.variables)


def adopt(start: Start, state: Any) -> tuple[dict[Path_, np.ndarray], Report]:
    """Chooses what a network takes of the weights.

    The classifier is left out when it has another number of classes, with the auxiliary
    classifiers; these also where only one side has them.

    Args:
        start: see `find_start`.
        state: of the training, with `variables`: abstract, from `abstract_train_state`.

    Returns:
        Arrays by path, ("params", "head", "kernel") and the like, and a report in our own names.

    Raises:
        DataError: lists everything else that does not fit.
    """
    if start.variables is None:
        return {}, Report("our", (), (), ())
    ours, theirs = (flatten_dict(dict(tree)) for tree in (state.variables, start.variables))
    outputs = [
        {p: a.shape[-1] for p, a in side.items() if p[1] == "head"} for side in (ours, theirs)
    ]
    same = outputs[0] == outputs[1]
    taken, problems = {}, []
    for path in ours.keys() | theirs.keys():
        here, there = (side.get(path) for side in (ours, theirs))
        shapes = [str(a.shape) if a is not None else "missing" for a in (there, here)]
        optional = path[1].startswith("aux")
        if optional and (not same or "missing" in shapes):
            continue
        if path[1] == "head" and not same:
            continue
        if shapes[0] == shapes[1]:
            taken[path] = theirs[path]
        else:
            problems.append(f"{_name(path)}: {shapes[0]} in the weights, {shapes[1]} here")
    if problems:
        shown = "\n  ".join(sorted(problems)[:30])
        raise DataError(
            f"model.pretrained: {len(problems)} arrays of {start.source} do not fit:\n  {shown}\n"
            "Fix: model.options and data.image_size as they were, images with as many channels, "
            "or other weights"
        )
    loaded, kept, dropped = (
        tuple(sorted(map(_name, paths)))
        for paths in (taken, ours.keys() - taken, theirs.keys() - taken)
    )
    return taken, Report("our", loaded, kept, dropped)


def _name(path: Path_) -> str:
    return "/".join(path[1:])
