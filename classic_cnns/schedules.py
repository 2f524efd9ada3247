"""Learning rates as functions of the step, by name; and the one that follows the validation loss.

Where a schedule has parts, they are shares of the training, so that a longer training keeps its
shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classic_cnns.errors import ConfigError, nearest

SCHEDULES = (
    "constant", "cosine", "cosine_restarts", "exponential", "linear", "multistep", "one_cycle",
    "plateau", "polynomial", "step",
)  # fmt: skip


def create_schedule(
    name: str,
    learning_rate: float | jax.Array,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    milestones: Sequence[float] = (0.5, 0.75),
    period: float = 0.3,
    factor: float = 0.1,
    final_factor: float = 0.0,
    power: float = 2.0,
) -> optax.Schedule:
    """Learning rate as a function of the step.

    With t from 0 at the end of the warm-up to 1 at the end of the training, and f = `final_factor`:

    * "constant": the peak. "plateau": the same; `scale_by_plateau` does the rest.
    * "cosine": peak · (f + (1 − f) · (1 + cos πt) / 2). "cosine_restarts": the same anew in every
      `period` (Loshchilov & Hutter 2017), rounded so that a whole number of equal ones follows the
      warm-up.
    * "linear": peak · (f + (1 − f) · (1 − t)). "polynomial": with (1 − t)^power.
    * "multistep": times `factor` at each of `milestones`. "step": times `factor` after each
      `period`. "exponential": as "step", but smoothly.
    * "one_cycle": linear up over the warm-up, or over 30 % of the training if there is none, then
      cosine down.

    Args:
        name: one of `SCHEDULES`.
        learning_rate: the peak; within a compiled function perhaps an argument of it.
        total_steps: length of the training in steps.
        warmup_steps: steps of linear rise from 0 to the peak, which count as part of the training.
        milestones: shares of `total_steps`, rising, between 0 and 1.
        period: share of `total_steps`.
        factor, final_factor, power: see above.

    Raises:
        ConfigError: unknown name, or settings out of range, all at once.
    """
    if name == "one_cycle" and not warmup_steps:
        warmup_steps = round(0.3 * total_steps)
    marks = list(milestones)
    problems = [
        text
        for wrong, text in (
            (
                name not in SCHEDULES,
                f'unknown schedule.name "{name}". Fix: {nearest(name, SCHEDULES)}',
            ),
            (
                not isinstance(learning_rate, jax.Array) and not 0 < learning_rate < math.inf,
                f"optimizer.learning_rate is {learning_rate}. Fix: a number above 0",
            ),
            (
                not 0 <= warmup_steps <= total_steps,
                f"the warm-up takes {warmup_steps} of {total_steps} steps. "
                "Fix: a shorter schedule.warmup_epochs",
            ),
            (
                not _rising_shares(marks) or (name == "multistep" and not marks),
                f"schedule.milestones is {tuple(marks)}. Fix: rising shares between 0 and 1",
            ),
            (not 0 < period <= 1, f"schedule.period is {period}. Fix: a share above 0, up to 1"),
            (not 0 < factor < 1, f"schedule.factor is {factor}. Fix: between 0 and 1"),
            (
                not 0 <= final_factor <= 1,
                f"schedule.final_factor is {final_factor}. Fix: 0 to 1",
            ),
            (not 0 < power < math.inf, f"schedule.power is {power}. Fix: a number above 0"),
        )
        if wrong
    ]
    if problems:
        raise ConfigError("; ".join(problems))
    rest = max(1, total_steps - warmup_steps)
    every = max(1, round(period * total_steps))
    if name in ("constant", "plateau"):
        main = optax.constant_schedule(learning_rate)
    elif name in ("multistep", "step"):
        drops = [round(m * total_steps) for m in marks]
        at = drops if name == "multistep" else range(every, total_steps, every)
        main = _drops(learning_rate, factor, [step - warmup_steps for step in at])
    elif name == "exponential":
        main = optax.exponential_decay(learning_rate, every, factor)
    elif name in ("linear", "polynomial"):
        end, power = final_factor * learning_rate, 1.0 if name == "linear" else power
        main = optax.polynomial_schedule(learning_rate, end, power, rest)
    elif name == "cosine_restarts":
        one, count = optax.cosine_decay_schedule(1.0, rest, final_factor), round(rest / every) or 1
        main = lambda step: learning_rate * one(step * count % rest)  # noqa: E731
    else:
        main = optax.cosine_decay_schedule(learning_rate, rest, final_factor)
    if not warmup_steps:
        return main
    rise = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    # The first step already moves: step k of the warm-up has (k + 1) / warmup_steps of
    # the peak rate.
    return optax.join_schedules([lambda step: rise(step + 1), main], [warmup_steps])


def _rising_shares(marks: list[Any]) -> bool:
    numbers = all(isinstance(m, (int, float)) and 0 < m < 1 for m in marks)
    return numbers and marks == sorted(marks)


def _drops(peak: float | jax.Array, factor: float, at: list[int]) -> optax.Schedule:
    """Times `factor` at each step of `at`; those before step 0 have happened by then."""
    return lambda step: peak * factor ** sum(jnp.asarray(step) >= mark for mark in at)


class PlateauState(NamedTuple):
    """Factor of the learning rate, lowest loss so far, evaluations since; scalars on the device."""

    scale: Any
    lowest: Any
    waited: Any


def scale_by_plateau() -> optax.GradientTransformation:
    """Multiplies updates by the scale that `note_evaluation` keeps in the state."""

    def init(params: Any) -> PlateauState:
        largest = jnp.finfo(jnp.float32).max  # no infinity: checkpoints hold none
        return PlateauState(jnp.ones(()), jnp.full((), largest), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: PlateauState, params: Any = None) -> tuple[Any, PlateauState]:
        return jax.tree.map(lambda u: u * state.scale, updates), state

    return optax.GradientTransformation(init, update)


def note_evaluation(opt_state: Any, loss: float, factor: float, patience: int) -> Any:
    """The optimiser's state after an evaluation; unchanged where it has no plateau in it.

    The rate is multiplied by `factor` at the `patience`-th evaluation in a row whose loss is not
    at least 0.01 % below the lowest before. What changes are NumPy scalars.
    """

    def one(state: Any) -> Any:
        if not _is_plateau(state):
            return state
        scale, lowest, waited = jax.device_get(state)
        better = loss < lowest * (1 - 1e-4)
        waited = 0 if better else waited + 1
        drop = waited >= patience
        return PlateauState(
            scale=np.float32(scale * factor if drop else scale),
            lowest=np.float32(loss if better else lowest),
            waited=np.int32(0 if drop else waited),
        )

    return jax.tree.map(one, opt_state, is_leaf=_is_plateau)


def plateau_scale(opt_state: Any) -> float:
    """What a plateau has left of the learning rate; 1 where there is none."""
    states = filter(_is_plateau, jax.tree.leaves(opt_state, is_leaf=_is_plateau))
    return float(np.prod([state.scale for state in states]))


def _is_plateau(node: Any) -> bool:
    return isinstance(node, PlateauState)
