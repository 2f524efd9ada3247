"""How fast a network trains and infers here."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classic_cnns.data import Split
from classic_cnns.data.loaders import ResidentLoader
from classic_cnns.dispatch import JitStep, Progress, train_on
from classic_cnns.fit_batch import peak_bytes
from classic_cnns.models import create_model
from classic_cnns.models.macs import count_macs
from classic_cnns.sharding import create_mesh, replicate
from classic_cnns.steps import eval_step, train_step
from classic_cnns.timing import DISPATCH_SECONDS, dispatch_sizes
from classic_cnns.train_state import create_train_state

CHANNEL: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def training(
    model: Any, image_size: int, batch_size: int
) -> tuple[JitStep, list[Any], ResidentLoader, int, int]:
    """What a training on images in memory compiles: here a batch of noise, SGD, momentum.

    Returns:
        The step, its first two arguments [state, progress], the loader that gives the others (its
        `data` and items), and the sizes of `timing.dispatch_sizes`.
    """
    mesh, tx, shape = create_mesh(1), optax.sgd(1e-3, momentum=0.9), (image_size, image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *shape), np.uint8)
    split = Split(images, np.zeros(batch_size, np.int32))
    state = create_train_state(model, tx, shape, seed=0, mesh=mesh)
    most, room = dispatch_sizes(0, True, model.impl)
    step = functools.partial(train_step, model=model, tx=tx, **CHANNEL)
    jit = JitStep(functools.partial(train_on, step=step), loops=room > 0)
    loader = ResidentLoader(split, batch_size, seed=0, mesh=mesh)
    return jit, [state, replicate(Progress.empty(), mesh)], loader, most, room


def measure(
    name: str, *, image_size: int, batch_size: int, dtype: Any, seconds: float = 3.0
) -> dict[str, Any]:
    """Training and evaluation of a network with 1000 classes (10 below 64 px) on one device.

    Steps are those of a training on images in memory, normalisation and metrics included, with SGD
    and momentum, as many in one call of the device as there.

    Args:
        name: of the network.
        image_size: side in pixels.
        batch_size: images.
        dtype: of the computation.
        seconds: that each of the two is timed, at least five calls.

    Returns:
        "train" and "eval" {"images_per_sec" (the median), "min", "max", "n" (calls),
        "gmacs_per_sec"}, "steps_per_call" (of training), "first_step" and "first_eval" (seconds,
        compiling or loading included), "step_bytes" (by the compiler's account), "parameters",
        "gmacs" (of one image, forward). Training counts as three times forward.
    """
    model: Any = create_model(name, 10 if image_size < 64 else 1000, dtype=dtype)
    jit, tree, loader, most, room = training(model, image_size, batch_size)
    state, batch = tree[0], {**loader.data, "mask": jnp.ones(batch_size, jnp.float32)}
    gmacs = count_macs(model, (image_size, image_size, 3)) / 1e9
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    infer = jax.jit(functools.partial(eval_step, model=model, **CHANNEL))

    start = time.perf_counter()
    jax.block_until_ready(infer(state, batch))
    first_eval = time.perf_counter() - start
    evaluated = _speed(lambda: infer(state, batch), batch_size, gmacs, seconds)
    start = time.perf_counter()
    count = 1 if room else most
    compiled = jit.lower(*tree, loader.data, loader.train(0, count, room)).compile()

    def train() -> Any:
        item = loader.train(0, count, room)
        tree[:] = compiled(*jit.split(tree[0]), tree[1], loader.data, item)
        return tree

    jax.block_until_ready(train())
    first_step = time.perf_counter() - start
    if room:
        start = time.perf_counter()
        jax.block_until_ready(train())
        fitting = min(DISPATCH_SECONDS, seconds / 5) / (time.perf_counter() - start)
        count = min(most, max(1, int(fitting)))
    trained = _speed(train, batch_size * count, 3 * gmacs, seconds)
    return {
        "model": name,
        "image_size": image_size,
        "batch_size": batch_size,
        "dtype": np.dtype(dtype).name,
        "parameters": parameters,
        "gmacs": gmacs,
        "train": trained,
        "eval": evaluated,
        "steps_per_call": count,
        "first_step": first_step,
        "first_eval": first_eval,
        "step_bytes": peak_bytes(compiled),
    }


def _speed(
    call: Callable[[], Any], images: int, gmacs: float, seconds: float
) -> dict[str, float | int]:
    """Times calls one by one, after one that does not count."""
    jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    median = images / statistics.median(times)
    return {
        "images_per_sec": median,
        "min": images / max(times),
        "max": images / min(times),
        "n": len(times),
        "gmacs_per_sec": median * gmacs,
    }
