"""Which weights of a run are the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from classic_cnns.checkpoints import Checkpoints
from classic_cnns.resume import Notes, warn
from classic_cnns.sharding import replicate
from classic_cnns.train_state import TrainState


def best_state(
    notes: Notes,
    step: int,
    state: TrainState,
    checkpoints: Checkpoints,
    abstract: dict[str, Any],
    mesh: Mesh,
    validate: Callable[[TrainState], dict[str, Any] | None],
) -> tuple[dict[str, Any], TrainState]:
    """The state with the highest validation accuracy, and its step and accuracy.

    Args:
        notes: with `best`.
        step, state: the last; they take the place of the best where its checkpoint is damaged.
        checkpoints: of the run.
        abstract: tree that they hold.
        mesh: where the state is put.
        validate: evaluates a state on the validation split; None where it is interrupted.
    """
    best = notes.best
    if best["step"] == step:
        return best, state
    if reason := checkpoints.damage(best["step"]):
        warn(f"the best checkpoint, {best['step']}, is {reason}; using {step}")
        values = validate(state)
        return {"step": step, "eval_accuracy": values and values["accuracy"]}, state
    tree, _ = checkpoints.restore(best["step"], abstract)
    return best, replicate(tree["state"], mesh)
