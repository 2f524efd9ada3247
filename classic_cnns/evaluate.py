"""Exact evaluation of a split."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from classic_cnns.data.loaders import Loader
from classic_cnns.data.mixing import Batch
from classic_cnns.dispatch import fetch
from classic_cnns.errors import ClassicCNNsWarning, ConfigError
from classic_cnns.loading import LoadedRun
from classic_cnns.metrics import EvalMetrics
from classic_cnns.sharding import replicate
from classic_cnns.steps import eval_step
from classic_cnns.train_state import TrainState


def create_evaluate(
    model: nn.Module,
    flip: bool = False,
    shift: int = 0,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Callable[..., dict[str, Any] | None]:
    """A function of (state, loader, stop=None) that evaluates a whole split; the network is
    compiled once per shape of a batch, however many images a split has.

    It returns {"loss", "accuracy", "accuracy_top5", "balanced_accuracy"} and "recall", a list with
    that of each class; every image counts once, whatever the batch size. `stop`, a function, is
    called before each batch; when it is true, the result is None. For `flip` and
    `shift` see `eval_step`.
    """

    def one(state: TrainState, batch: Batch) -> EvalMetrics:
        return eval_step(state, batch, model=model, mean=mean, std=std, flip=flip, shift=shift)

    def add(sums: EvalMetrics, state: TrainState, batch: Batch) -> EvalMetrics:
        return sums.merge(one(state, batch))

    gather, compiled, empty = jax.jit(fetch), jax.jit(add), None

    def evaluate(
        state: TrainState, loader: Loader, stop: Callable[[], bool] | None = None
    ) -> dict[str, Any] | None:
        nonlocal empty
        sums = None
        for item in loader.evaluation():
            if stop and stop():
                return None
            batch = gather(loader.data, item) if loader.data else item
            if empty is None:
                shapes = jax.eval_shape(one, state, batch)
                empty = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
            if sums is None:
                sums = replicate(empty, loader.mesh)
            before, sums = sums, compiled(sums, state, batch)
            jax.block_until_ready(before)  # so that `stop` is asked while the device computes
        sums = jax.device_get(sums)
        counted = int(sums.accuracy.count)
        assert jax.process_count() > 1 or counted == loader.readable, "an image was lost"
        return sums.summary()

    return evaluate


def evaluate_run(
    run: LoadedRun, loader: Loader, classes: Sequence[str], flip: bool = False, shift: int = 0
) -> dict[str, Any]:
    """What `create_evaluate` says of a loaded run on a split, with the run's mean and deviation.

    Names of classes are compared where both have any, and other ones are warned of.

    Raises:
        ConfigError: the data has another number of classes, or images of another size, than the
            network.
    """
    preprocess = run.preprocess
    if len(classes) != len(run.classes):
        raise ConfigError(
            f"the network has {len(run.classes)} classes, the data {len(classes)}. Fix: its own "
            "data"
        )
    if loader.data and loader.data["image"].shape[1:] != tuple(preprocess.image_shape):
        raise ConfigError(
            f"the network takes images of {preprocess.image_shape}, the data has "
            f"{loader.data['image'].shape[1:]}. Fix: load_dataset, which prepares them"
        )
    pairs = list(zip(run.classes, classes, strict=True))
    other = [f"{a!r} is {b!r}" for a, b in pairs if a != b and not (a.isdigit() or b.isdigit())]
    if other:
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        warnings.warn(
            f"classes of the network and of the data are compared by number, and have other names: "
            f"{', '.join(other[:5])}{more}",
            ClassicCNNsWarning,
            stacklevel=2,
        )
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=run.variables["params"],
        batch_stats=run.variables["batch_stats"],
        opt_state=(),
    )
    mean, std = preprocess.mean, preprocess.std
    evaluate = create_evaluate(run.model, flip, shift, mean=mean, std=std)
    values = evaluate(state, loader)
    assert values is not None
    return values
