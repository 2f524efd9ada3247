"""Exact evaluation of a split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from classic_cnns.data.loaders import ResidentLoader
from classic_cnns.metrics import EvalMetrics
from classic_cnns.steps import eval_on_resident, eval_step
from classic_cnns.train_state import TrainState


def create_evaluate(
    model: nn.Module, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[[TrainState, ResidentLoader], dict[str, float]]:
    """A function of (state, loader) that evaluates a whole split; compiled once per shape.

    It returns {"loss", "accuracy", "accuracy_top5"}; every image counts once, whatever the batch
    size.
    """
    step = functools.partial(eval_step, model=model, mean=mean, std=std)
    add = jax.jit(functools.partial(eval_on_resident, step=step))
    empty = jax.jit(EvalMetrics.empty)

    def evaluate(state: TrainState, loader: ResidentLoader) -> dict[str, float]:
        sums = empty()
        for index, mask in loader.eval_indices():
            sums = add(state, sums, loader.data, index, mask)
        sums = jax.device_get(sums)
        assert int(sums.accuracy.count) == loader.size, "an image was lost or counted twice"
        return {name: float(value) for name, value in sums.compute().items()}

    return evaluate
