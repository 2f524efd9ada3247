"""How steps are sent to the device: with what is summed up beside them, several in one call, and
images that it has already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from classic_cnns.data.mixing import Batch
from classic_cnns.metrics import TrainMetrics
from classic_cnns.train_state import TrainState


@flax.struct.dataclass
class Progress:
    """Metrics since they were last reset, and whether every loss and gradient so far was finite."""

    metrics: TrainMetrics
    finite: jax.Array

    @classmethod
    def empty(cls) -> Progress:
        """Nothing summed yet."""
        return cls(metrics=TrainMetrics.empty(), finite=jnp.ones((), bool))


def train_on(
    state: TrainState,
    progress: Progress,
    data: Batch,
    item: Batch,
    *,
    step: Callable[..., Any],
) -> tuple[TrainState, Progress]:
    """Trains on one batch, or on several in one dispatch.

    From the first loss or gradient that is not finite on, state and metrics stay as they were
    before that step, so that it can be looked into.

    Args:
        state, progress: carried along; see `JitStep`.
        data, item: see `fetch`. Arrays of `item` are (batch, …), or (steps, batch, …) of which all
            steps are trained on or, with an int32 "count" in it, so many.
        step: `train_step` with its settings bound.
    """

    def one(carry: tuple[TrainState, Progress], item: Batch) -> tuple[Any, None]:
        state, progress = carry
        new_state, out = step(state, fetch(data, item))
        finite = progress.finite & out.pop("finite")
        skipped = out.pop("skipped", None)
        metrics = progress.metrics.merge(TrainMetrics.single_from_model_output(**out))
        if skipped is not None:
            metrics = jax.tree.map(lambda a, b: jnp.where(skipped, a, b), progress.metrics, metrics)
        new = new_state, Progress(metrics=metrics, finite=finite)
        old = state, progress.replace(finite=finite)  # type: ignore[attr-defined]
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b).astype(b.dtype), new, old), None

    def numbered(i: jax.Array, carry: tuple[TrainState, Progress]) -> Any:
        return one(carry, {k: item[k][i] for k in ("index", "epoch")})[0]

    if item["index"].ndim == 1:
        return one((state, progress), item)[0]
    if "count" in item:
        return jax.lax.fori_loop(0, item["count"], numbered, (state, progress))
    return jax.lax.scan(one, (state, progress), item)[0]


class JitStep:
    """`jax.jit` of a function whose first argument is a `TrainState`, which gives away its buffers.

    On CPU the parameters keep theirs, unless it `loops`: a new one that is written over the old
    holds up the gradients that read it (AlexNet at 32 px takes 1.5 times as long).
    """

    def __init__(self, step: Callable[..., Any], loops: bool = False) -> None:
        def whole(given: TrainState, kept: Any, *args: Any, **kwargs: Any) -> Any:
            state = given if kept is None else dataclasses.replace(given, params=kept)
            return step(state, *args, **kwargs)

        whole.__name__ = getattr(step, "__name__", "train")  # that of the program on disk
        self.jitted = jax.jit(whole, donate_argnums=0)
        self.keeps = jax.default_backend() == "cpu" and not loops

    def __call__(self, state: TrainState, *args: Any, **kwargs: Any) -> Any:
        """The step's result."""
        return self.jitted(*self.split(state), *args, **kwargs)

    def lower(self, state: TrainState, *args: Any) -> Any:
        """As of `jax.jit`; what it compiles to takes `split(state)` in place of the state."""
        return self.jitted.lower(*self.split(state), *args)

    def split(self, state: TrainState) -> tuple[TrainState, Any]:
        """The first two arguments of `jitted`: what is given away, and the parameters or None."""
        if not self.keeps:
            return state, None
        return dataclasses.replace(state, params={}), state.params


def fetch(data: Batch, item: Batch) -> Batch:
    """A batch: the item itself, with the rows of `data` that its "index" names, if there are any.

    Args:
        data: arrays over a whole split, or nothing; see the loaders.
        item: from a loader.
    """
    rows = {k: jnp.take(a, item["index"], axis=0, mode="clip") for k, a in data.items()}
    return {**rows, **item}
