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

from classic_cnns.fit_batch import peak_bytes
from classic_cnns.models import create_model
from classic_cnns.models.macs import count_macs
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import JitStep, eval_step, train_step
from classic_cnns.train_state import TrainState, create_train_state

CHANNEL: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def measure(
    name: str, *, image_size: int, batch_size: int, dtype: Any, seconds: float = 3.0
) -> dict[str, Any]:
    """Training and evaluation of a network with 1000 classes (10 below 64 px) on one device.

    The step is the one of a training, normalisation included, with SGD and momentum.

    Args:
        name: of the network.
        image_size: side in pixels.
        batch_size: images.
        dtype: of the computation.
        seconds: that each of the two is timed, at least five steps.

    Returns:
        "train" and "eval" {"images_per_sec" (the median), "min", "max", "n", "gmacs_per_sec"},
        "first_step" and "first_eval" (seconds, compiling or loading included), "step_bytes" (by the
        compiler's account), "parameters", "gmacs" (of one image, forward). Training counts as three
        times forward.
    """
    model: Any = create_model(name, 10 if image_size < 64 else 1000, dtype=dtype)
    shape = (image_size, image_size, 3)
    tx = optax.sgd(1e-3, momentum=0.9)
    state = create_train_state(model, tx, shape, seed=0, mesh=create_mesh(1))
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (batch_size, *shape), np.uint8)),
        "label": jnp.zeros(batch_size, jnp.int32),
        "mask": jnp.ones(batch_size, jnp.float32),
    }
    gmacs = count_macs(model, shape) / 1e9
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    infer = jax.jit(functools.partial(eval_step, model=model, **CHANNEL))

    def step(state: TrainState, batch: Any) -> TrainState:
        return train_step(state, batch, model=model, tx=tx, **CHANNEL)[0]

    start = time.perf_counter()
    jax.block_until_ready(infer(state, batch))
    first_eval = time.perf_counter() - start
    evaluated = _speed(lambda: infer(state, batch), batch_size, gmacs, seconds)
    start = time.perf_counter()
    jit = JitStep(step)
    compiled = jit.lower(state, batch).compile()
    holder = [compiled(*jit.split(state), batch)]
    jax.block_until_ready(holder)
    first_step = time.perf_counter() - start

    def train() -> Any:
        holder[0] = compiled(*jit.split(holder[0]), batch)
        return holder[0]

    trained = _speed(train, batch_size, 3 * gmacs, seconds)
    return {
        "model": name,
        "image_size": image_size,
        "batch_size": batch_size,
        "dtype": np.dtype(dtype).name,
        "parameters": parameters,
        "gmacs": gmacs,
        "train": trained,
        "eval": evaluated,
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
