"""One mesh over all devices with axis "data": batches are split along it, everything else is
replicated.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from classic_cnns.errors import ConfigError


def create_mesh(num_devices: int | None = None) -> Mesh:
    """A one-dimensional mesh over the first `num_devices` devices (all by default)."""
    return Mesh(np.array(jax.devices()[:num_devices]), ("data",))


def check_batch_size(batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """Raises ConfigError when a global batch, or each of its parts, cannot be split evenly over the
    mesh.
    """
    if parts < 1:
        raise ConfigError(f"accumulate_steps is {parts}. Fix: use 1 or more")
    n = mesh.size * parts
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}. Fix: use 1 or more")
    if batch_size % n:
        below, above = batch_size // n * n, (batch_size // n + 1) * n
        fix = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"batch_size {batch_size} cannot be split over {mesh.size} devices"
            f"{f' in {parts} parts' if parts > 1 else ''}. Fix: use {fix}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of parameters: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree of host arrays on every device."""
    return jax.device_put(tree, replicated(mesh))


def shard_batch(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Puts a tree of host arrays on the devices, split along one axis.

    With several processes it must be the same tree in each.
    """
    return jax.device_put(tree, _split(mesh, axis))


def shard_parts(tree: Any, mesh: Mesh) -> Any:
    """The same where each process has its own part of the first axis."""
    if jax.process_count() == 1:
        return shard_batch(tree, mesh)
    make = jax.make_array_from_process_local_data
    return jax.tree.map(lambda part: make(_split(mesh, 0), part), tree)


def _split(mesh: Mesh, axis: int) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
