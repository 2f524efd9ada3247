"""Exact evaluation of a split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from classic_cnns.data.loaders import ResidentLoader
from classic_cnns.errors import ConfigError
from classic_cnns.loading import LoadedRun
from classic_cnns.metrics import EvalMetrics
from classic_cnns.steps import eval_on_resident, eval_step
from classic_cnns.train_state import TrainState


def create_evaluate(
    model: nn.Module, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[..., dict[str, float] | None]:
    """A function of (state, loader, stop=None) that evaluates a whole split; compiled once per
    shape.

    It returns {"loss", "accuracy", "accuracy_top5"}; every image counts once, whatever the batch
    size. `stop`, a function, is called before each batch; when it is true, the result is None.
    """
    step = functools.partial(eval_step, model=model, mean=mean, std=std)
    add = jax.jit(functools.partial(eval_on_resident, step=step))
    empty = jax.jit(EvalMetrics.empty)

    def evaluate(
        state: TrainState, loader: ResidentLoader, stop: Callable[[], bool] | None = None
    ) -> dict[str, float] | None:
        sums = empty()
        for index, mask in loader.eval_indices():
            if stop and stop():
                return None
            sums = add(state, sums, loader.data, index, mask)
        sums = jax.device_get(sums)
        assert int(sums.accuracy.count) == loader.size, "an image was lost or counted twice"
        return {name: float(value) for name, value in sums.compute().items()}

    return evaluate


def evaluate_run(run: LoadedRun, loader: ResidentLoader, num_classes: int) -> dict[str, float]:
    """Loss, accuracy and top-5 accuracy of a loaded run on a split, with the run's preprocessing.

    Raises:
        ConfigError: the data has other classes, or images of another size, than the network.
    """
    wanted, found = run.preprocessing["image_shape"], list(loader.data["image"].shape[1:])
    if num_classes != len(run.classes):
        raise ConfigError(
            f"the network has {len(run.classes)} classes, the data {num_classes}. Fix: its own data"
        )
    if found != wanted:
        raise ConfigError(f"the network takes {wanted}, the images are {found}. Fix: image_size")
    mean, std = run.preprocessing["mean"], run.preprocessing["std"]
    if run.preprocessing.get("channel_order") == "BGR":
        loader.data["image"] = loader.data["image"][..., ::-1]
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=run.variables["params"],
        batch_stats=run.variables["batch_stats"],
        opt_state=(),
    )
    values = create_evaluate(run.model, mean=mean, std=std)(state, loader)
    assert values is not None
    return values
