"""Whether a call may continue the run in a directory, and what is written down when it does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from classic_cnns import rundir
from classic_cnns.config import FREE, flatten
from classic_cnns.data.splits import Dataset, Split
from classic_cnns.errors import ClassicCNNsWarning, DataError, WorkdirError
from classic_cnns.metrics import EpochSums
from classic_cnns.saved import SavedCheckpoints

LENGTH = ("num_epochs", "num_steps")  # may grow with --extend


def way_of_data(workdir: str | Path | None, config: ConfigDict) -> dict[str, str]:
    """Arguments of `create_dataset` by which a run in a directory goes on streaming, or goes on
    with decoded images, as it began, whatever memory is free now: the two need not train alike.
    """
    path = Path(workdir or "").expanduser() / "run.json"
    streamed = rundir.read_json(path).get("streamed") if workdir and path.exists() else None
    if streamed is True:
        return {"loader": "stream", "cache": ""}
    return {"loader": "resident"} if streamed is False and config.data.loader == "auto" else {}


def check(
    workdir: Path, config: ConfigDict, dataset: Dataset, total_steps: int, *, extend: bool = False
) -> list[str] | None:
    """Compares a directory with what is to be trained in it; changes nothing.

    Args:
        workdir: may be missing.
        config: of this call.
        dataset: of this call.
        total_steps: length of this training.
        extend: whether it may be longer than the run in the directory was to be.

    Returns:
        None for a directory without a run; else the accepted differences of the configs, as
        "field: old → new".

    Raises:
        WorkdirError: the configs differ in a field that changes what is computed.
        DataError: the data have changed.
    """
    if not (workdir / "config.json").exists():
        return None
    info = rundir.read_json(workdir / "run.json", total_steps=int, data_fingerprint=str)
    old, new = flatten(rundir.read_json(workdir / "config.json")), flatten(config)
    free: list[str] = []
    length: list[str] = []
    fixed: list[str] = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key, "absent"), new.get(key, "absent")
        if a != b:
            kind = free if key in FREE else length if key in LENGTH else fixed
            kind.append(f"{key}: {a!r} → {b!r}")
    longer = extend and total_steps >= info["total_steps"]
    if fixed or (length and not longer):
        hints = ["the old values"]
        if free:
            hints[0] += f" ({', '.join(line.split(':')[0] for line in free)} may change)"
        if length and not fixed and total_steps >= info["total_steps"]:
            hints.append("--extend")
        raise WorkdirError(
            f"{workdir} holds a run with another config, which cannot be continued: "
            f"{'; '.join(sorted(length + fixed))}. Fix: {', or '.join(hints)}, or another --workdir"
        )
    if info["data_fingerprint"] != dataset.fingerprint:
        steps = SavedCheckpoints(workdir / "checkpoints").steps()
        what = _data_changes(info.get("data"), describe_data(dataset), info.get("classes"), dataset)
        raise DataError(
            f"dataset changed since step {steps[-1] if steps else 0} of {workdir}: {what}. "
            "Fix: restore the data, or another --workdir"
        )
    return free + length


def facts(config: ConfigDict, dataset: Dataset) -> dict[str, Any]:
    """What every manifest says about the run; "config" is a hash without `FREE` and `LENGTH`."""
    fields = {k: v for k, v in flatten(config).items() if k not in (*FREE, *LENGTH)}
    return {
        "config": _hash(fields),
        "data": dataset.fingerprint,
        "classes": _hash(dataset.classes),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "processes": jax.process_count(),
        "versions": rundir.versions(),
    }


def write_new(
    workdir: Path,
    config: ConfigDict,
    dataset: Dataset,
    total_steps: int,
    model_fields: dict[str, Any],
) -> None:
    """Writes run.json, split.json and, last, config.json, which makes the directory one of a run.

    `model_fields` are those of the network that the config does not say.
    """
    info = rundir.describe_run() | {
        "model": config.model.name,
        "model_fields": model_fields,
        "classes": list(dataset.classes),
        "preprocessing": dataclasses.asdict(dataset.preprocess),
        "id": uuid.uuid4().hex,  # a mirror holds one run
        "total_steps": total_steps,
        "data_fingerprint": dataset.fingerprint,
        "data": describe_data(dataset),
        "streamed": dataset.train.encoded,
    }
    rundir.write_json(workdir / "run.json", info)
    if dataset.drawn:
        rundir.write_json(workdir / "split.json", dataset.drawn)
    rundir.write_json(workdir / "config.json", config.to_dict())


def write_continued(
    workdir: Path, config: ConfigDict, step: int, changes: list[str], total_steps: int
) -> None:
    """Notes in run.json that the run went on, when and with what; updates config.json.

    The result of a run that is extended is kept as result-STEP.json.
    """
    info = rundir.read_json(workdir / "run.json", total_steps=int)
    entry = rundir.describe_run() | {"step": step, "changes": changes}
    if info["total_steps"] < total_steps and (workdir / "result.json").exists():
        os.replace(workdir / "result.json", workdir / f"result-{info['total_steps']}.json")
    info |= {"total_steps": total_steps, "continued": [*info.get("continued", []), entry]}
    rundir.write_json(workdir / "run.json", info)
    if changes:
        rundir.write_json(workdir / "config.json", config.to_dict())


def check_manifest(step: int, made_by: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares what a checkpoint says about its run with this run; see `facts`.

    Raises:
        WorkdirError: the config, the data or the classes are others.
    """
    others = [k for k in ("config", "data", "classes") if made_by.get(k) != now[k]]
    if others:
        raise WorkdirError(
            f"checkpoint {step} is of a run with another {' and '.join(others)}. Fix: the "
            "checkpoints that belong into this directory, or another --workdir"
        )
    old = made_by.get("versions")
    changed = [
        f"{name} {old.get(name, 'none')} → {version}"
        for name, version in now["versions"].items()
        if isinstance(old, dict) and old.get(name) != version
    ]
    if changed:
        warn(
            f"checkpoint {step} was made with other versions: {', '.join(changed)}; the run goes "
            "on, but not to the bit as it would have"
        )


@dataclasses.dataclass
class Notes:
    """What a checkpoint remembers beside its arrays.

    Attributes:
        total: steps that the training was to have; 0 = nobody says.
        epoch_sums: of the epoch so far.
        best: step and validation accuracy of the best evaluation, the earliest of equals.
        best_ema: the same for the averaged weights.
        target: value that early stopping wants improved, negative where less is better.
        waited: evaluations in a row that have not.
        ended: why the training ended before its last step, or "".
        unevaluated: whether the evaluation that is due at this step was interrupted.
        rollbacks: done so far.
        rate_scale: factor of the learning rate that they left.
    """

    total: int = 0
    epoch_sums: EpochSums = dataclasses.field(default_factory=EpochSums)
    best: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"step": 0, "eval_accuracy": -1.0}
    )
    best_ema: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"step": 0, "eval_accuracy": -1.0}
    )
    target: float | None = None
    waited: int = 0
    ended: str = ""
    unevaluated: bool = False
    rollbacks: int = 0
    rate_scale: float = 1.0


def read_notes(step: int, notes: dict[str, Any], total: int = 0) -> Notes:
    """Notes from a manifest.

    Args:
        step: of the checkpoint.
        notes: of its manifest.
        total: steps that the training is to have now. Where those are more than it was to have, a
            training that was stopped early goes on, with all its patience.

    Raises:
        WorkdirError: something is missing or of the wrong type.
    """
    try:
        best, ema = (
            {"step": int(b["step"]), "eval_accuracy": float(b["eval_accuracy"])}
            for b in (notes["best"], notes["best_ema"])
        )
        extended = 0 < int(notes.get("total", 0)) < total
        return Notes(
            total=total,
            epoch_sums=EpochSums(**{k: float(v) for k, v in notes["epoch_sums"].items()}),
            best=best,
            best_ema=ema,
            target=None if notes["target"] is None else float(notes["target"]),
            waited=0 if extended else int(notes["waited"]),
            ended="" if extended else str(notes["ended"]),
            unevaluated=bool(notes["unevaluated"]),
            rollbacks=int(notes["rollbacks"]),
            rate_scale=float(notes["rate_scale"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WorkdirError(
            f"checkpoint {step}: its notes are not those of a training ({error!r}). Fix: restore "
            "it, or another --workdir"
        ) from error


def forget_unsaved(notes: Notes, checkpoints: SavedCheckpoints) -> None:
    """The best are then those that the newest checkpoint knows of, which are on the disk."""
    steps = checkpoints.steps()
    saved = read_notes(steps[-1], checkpoints.manifest(steps[-1])["notes"]) if steps else Notes()
    notes.best, notes.best_ema = saved.best, saved.best_ema


def warn(message: str) -> None:
    """For people; training goes on."""
    warnings.warn(message, ClassicCNNsWarning, stacklevel=2)


def describe_data(dataset: Dataset) -> dict[str, dict[str, list[Any]]]:
    """{split: {class: [images, digest]}}, to say later what has changed."""
    return {name: _describe_split(split, dataset) for name, split in dataset.splits.items()}


def _describe_split(split: Split, dataset: Dataset) -> dict[str, list[Any]]:
    labels = np.asarray(split.labels)
    out: dict[str, list[Any]] = {}
    for number, name in enumerate(dataset.classes):
        members = np.flatnonzero(labels == number)
        digest = hashlib.sha256()
        for member in members.tolist():
            if split.encoded:
                digest.update(os.fsencode(split.images.names[member]))
            else:
                digest.update(np.ascontiguousarray(split.images[member]).data)
        out[name] = [len(members), digest.hexdigest()[:16]]
    return out


def _data_changes(old: Any, new: Any, old_classes: Any, dataset: Dataset) -> str:
    if old_classes != list(dataset.classes):
        return f"classes {old_classes} → {list(dataset.classes)}"
    found = []
    for split in sorted(set(old or ()) | set(new)):
        before, after = (d.get(split, {}) for d in (old or {}, new))
        for name in dataset.classes if old else ():
            (a, x), (b, y) = before.get(name, (0, "")), after.get(name, (0, ""))
            if a != b:
                found.append(f"{split}/{name} has {b} images, had {a}")
            elif x != y:
                found.append(f"{split}/{name} has other images or another order")
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return "; ".join(found[:5]) + more if found else "images, labels or their order"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
