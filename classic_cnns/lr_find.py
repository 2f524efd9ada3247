"""The learning-rate range test: L. N. Smith, "Cyclical Learning Rates for Training Neural
Networks", WACV 2017, section 3.3, with an exponential rise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classic_cnns.dispatch import fetch
from classic_cnns.errors import ConfigError
from classic_cnns.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """Losses of a range test, and what follows from them.

    Attributes:
        rates, losses, smooth: (N,) floats; N is smaller than asked for where the loss diverged.
        steepest: rate at which the smoothed loss falls fastest over the logarithm of the rate.
        tenth: a tenth of the rate of divergence; None where it did not diverge.
    """

    rates: np.ndarray
    losses: np.ndarray
    smooth: np.ndarray
    steepest: float
    tenth: float | None

    @property
    def suggestion(self) -> float:
        """The smaller of the two, with two digits."""
        return float(f"{min(self.steepest, self.tenth or math.inf):.1e}")

    @property
    def fell(self) -> bool:
        """Whether the smoothed loss came down by a twentieth at all."""
        return bool(self.smooth.min() < 0.95 * self.smooth[0])


def rising(low: float, high: float, steps: int) -> optax.Schedule:
    """The rate from `low` at step 0 to `high` at step `steps` − 1, by the same factor each step.

    Raises:
        ConfigError: not 0 < low < high, or fewer than ten steps.
    """
    if not 0 < low < high < math.inf or steps < 10:
        raise ConfigError(
            f"a range test from {low:g} to {high:g} in {steps} steps. Fix: --from above 0 and "
            "below --to, --steps of 10 or more"
        )
    return lambda step: low * (high / low) ** (jnp.asarray(step, jnp.float32) / (steps - 1))


def range_test(
    step: Callable[..., Any],
    state: TrainState,
    items: Iterator[dict[str, jax.Array]],
    data: dict[str, jax.Array],
    schedule: optax.Schedule,
    steps: int,
) -> RangeTest:
    """Trains a copy of the state while the rate rises; stops early where the loss diverges.

    Args:
        step: `train_step` with its settings bound and an optimiser that follows `schedule`.
        state: left as it is.
        items, data: batches, see `dispatch.fetch`.
        schedule: see `rising`.
        steps: of the test.
    """

    @jax.jit
    def one(state: TrainState, data: Any, item: Any) -> tuple[TrainState, jax.Array]:
        new, out = step(state, fetch(data, item))
        return new, out["loss"].mean()

    losses, smooth, average = [], [], 0.0
    for number in range(steps):
        state, value = one(state, data, next(items))
        loss = float(value)
        if not math.isfinite(loss):
            break
        average = 0.9 * average + 0.1 * loss
        losses.append(loss)
        smooth.append(average / (1 - 0.9 ** (number + 1)))  # as if it had begun long ago
        if diverged(smooth):
            break
    if len(losses) < 5:
        raise ConfigError(
            f"the loss diverged at step {len(losses)}, rate {float(schedule(len(losses))):.3g}. "
            "Fix: a smaller --from"
        )
    rates = np.array([float(schedule(i)) for i in range(len(losses))])
    tenth = None if len(losses) == steps else float(schedule(len(losses) - 1)) / 10
    return conclude(rates, np.array(losses), np.array(smooth), tenth)


def diverged(smooth: list[float]) -> bool:
    """Whether the smoothed loss is four times its least, or, after a fall by a tenth, has come half
    of the way back: a network that died stays at ln(classes), which need not be four times.
    """
    start, least, now = smooth[0], min(smooth), smooth[-1]
    return now > 4 * least or (least < 0.9 * start and now > (start + least) / 2)


def conclude(
    rates: np.ndarray, losses: np.ndarray, smooth: np.ndarray, tenth: float | None
) -> RangeTest:
    """The steepest descent, left of the least loss; the first five steps do not count."""
    slopes = np.gradient(smooth, np.log(rates))
    first = min(5, len(slopes) - 2)
    last = max(int(np.argmin(smooth)), first) + 1
    steepest = float(rates[first + int(np.argmin(slopes[first:last]))])
    return RangeTest(rates, losses, smooth, steepest, tenth)
