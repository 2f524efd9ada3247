"""A copy of the training state that stays as it is while the training goes on."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from classic_cnns.errors import NonFiniteError


class Snapshot:
    """Copies trees on their device: the training step gives its own state's memory away.

    The copies go into the memory of those before them. On a CPU fresh memory costs ten times as
    much as the copying: 12 ms against 80 to 230 ms for ResNet-50 with momentum, 205 MB.
    """

    def __init__(self) -> None:
        self._copies: list[jax.Array] = []

    def take(self, tree: Any) -> Any:
        """The tree with device arrays copied, valid until the next call; host arrays as they are.

        Of an array that is replicated, the copy on one device.
        """
        leaves, structure = jax.tree.flatten(tree)
        arrays = [a.addressable_data(0) for a in leaves if isinstance(a, jax.Array)]
        old, self._copies = self._copies, []
        if [(a.shape, a.dtype) for a in old] != [(a.shape, a.dtype) for a in arrays]:
            old = []
        self._copies = _copy_into()(old, arrays)
        copies = iter(self._copies)
        merged = [next(copies) if isinstance(a, jax.Array) else a for a in leaves]
        return jax.tree.unflatten(structure, merged)


@functools.cache
def _copy_into() -> Any:
    def copy(old: list[jax.Array], new: list[jax.Array]) -> list[jax.Array]:
        del old  # only its memory is wanted
        return [jnp.copy(a) for a in new]

    return jax.jit(copy, donate_argnums=0, keep_unused=True)


def check_finite(tree: Any) -> None:
    """Raises NonFiniteError with the name of the first leaf that holds a NaN or an infinity.

    Args:
        tree: of host arrays.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not leaf.size or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        with np.errstate(invalid="ignore"):  # both are NaN where anything is
            ends = np.asarray([leaf.min(), leaf.max()], np.float32)
        if not np.isfinite(ends).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise NonFiniteError(f"{name} is not finite. Fix: a lower optimizer.learning_rate")
