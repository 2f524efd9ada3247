"""How large a batch fits: asked of the compiler, nothing is run and nothing can crash."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from classic_cnns.dispatch import JitStep, fetch
from classic_cnns.memory import free_memory
from classic_cnns.task import Task
from classic_cnns.train_state import abstract_train_state


def step_bytes(task: Task, tx: optax.GradientTransformation, batch_size: int) -> int:
    """Bytes that a training step takes at its peak, by the compiler's own account.

    Counts the state, the images where they live on the device, the batch, and all that is between.

    Args:
        task, tx: see `task.task_from`.
        batch_size: images.
    """
    split, integer = task.dataset.train, jnp.int32
    item = {k: jax.ShapeDtypeStruct((batch_size,), integer) for k in ("index", "epoch")}
    if split.encoded or split.mapped:
        data: dict[str, Any] = {}
        shape = (batch_size, *task.dataset.image_shape)
        item |= {"image": jax.ShapeDtypeStruct(shape, jnp.uint8), "label": item["index"]}
    else:
        data = {
            "image": jax.ShapeDtypeStruct(split.images.shape, jnp.uint8),
            "label": jax.ShapeDtypeStruct((len(split),), integer),
        }
    state = abstract_train_state(task.model, tx, task.dataset.image_shape, ema=task.ema)
    step = task.step(tx)

    def one(state: Any, data: Any, item: Any) -> Any:
        new, out = step(state, fetch(data, item))
        return new, out["loss"].mean()

    return peak_bytes(JitStep(one).lower(state, data, item).compile())


def peak_bytes(compiled: Any) -> int:
    """Bytes of arguments, results and everything between, of a compiled function."""
    used = compiled.memory_analysis()
    total = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return int(total + used.temp_size_in_bytes)


def device_bytes() -> tuple[int, str]:
    """Memory that there is for a step, and what kind of memory that is."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]), device.device_kind
    return free_memory(), "free memory of this machine"
