"""What evaluations decide: which weights are the best, and when a run has had enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from classic_cnns.checkpoints import Checkpoints
from classic_cnns.resume import Notes, warn
from classic_cnns.sharding import replicate
from classic_cnns.train_state import TrainState

Evaluate = Callable[[TrainState], dict[str, Any] | None]


def evaluate_all(validate: Evaluate, state: TrainState) -> dict[str, Any] | None:
    """{"eval_loss", "eval_accuracy", …}, and "ema_eval_loss" and "ema_eval_accuracy" where the
    state has averages; None where it was interrupted.
    """
    values = validate(state)
    averaged = validate(state.averaged) if values and state.ema else None
    if values is None or (state.ema and averaged is None):
        return None
    return {f"eval_{k}": v for k, v in values.items()} | {
        f"ema_eval_{k}": averaged[k] for k in ("loss", "accuracy") if averaged
    }


def note(notes: Notes, record: dict[str, Any], early: Mapping[str, Any]) -> bool:
    """Keeps in `notes` what an evaluation says.

    Args:
        notes: changed.
        record: of the evaluation, with "step" and what `evaluate_all` gives.
        early: `config.early_stopping`.

    Returns:
        Whether the weights are the best so far.
    """
    step, improved = record["step"], record["eval_accuracy"] > notes.best["eval_accuracy"]
    if improved:
        notes.best = {"step": step, "eval_accuracy": record["eval_accuracy"]}
    if record.get("ema_eval_accuracy", -1.0) > notes.best_ema["eval_accuracy"]:
        notes.best_ema = {"step": step, "eval_accuracy": record["ema_eval_accuracy"]}
    if early["patience"]:
        metric, mode = early["metric"], early["mode"]
        less = mode == "min" or (mode == "auto" and metric.endswith("loss"))
        value = -record[metric] if less else record[metric]
        if notes.target is None or value > notes.target + early["min_delta"]:
            notes.target, notes.waited = value, 0
        else:
            notes.waited += 1
        if notes.waited >= early["patience"]:
            notes.ended = (
                f"{metric} has not improved on {abs(notes.target):.5g} in "
                f"{notes.waited} evaluations"
            )
    return improved


def conclude(
    best: dict[str, Any],
    step: int,
    state: TrainState,
    checkpoints: Checkpoints,
    abstract: dict[str, Any],
    mesh: Mesh,
    validate: Evaluate,
    test: Evaluate | None,
    averaged: bool = False,
) -> tuple[dict[str, Any], TrainState]:
    """The best state, and its numbers for the summary; the test split is seen once.

    Args:
        best: of the notes.
        step, state: the last; they take the place of the best where its checkpoint is damaged.
        checkpoints: of the run.
        abstract: tree that they hold.
        mesh: where the state is put.
        validate, test: evaluate a state on a split; they give None where they are interrupted.
        averaged: it is the averages that count; the names then begin with "ema_".
    """
    if best["step"] != step and (reason := checkpoints.damage(best["step"])):
        warn(f"the best checkpoint, {best['step']}, is {reason}; using {step}")
        values = validate(state.averaged if averaged else state)
        best = {"step": step, "eval_accuracy": values and values["accuracy"]}
    elif best["step"] != step:
        tree, _ = checkpoints.restore(best["step"], abstract)
        state = replicate(tree["state"], mesh)
    state = state.averaged if averaged else state
    summary = {"best_step": best["step"], "val_accuracy": best["eval_accuracy"]}
    values = test(state) if test else None
    summary |= {f"test_{k}": v for k, v in (values or {}).items() if k != "recall"}
    return {f"ema_{k}" if averaged else k: v for k, v in summary.items()}, state
