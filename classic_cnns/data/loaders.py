"""Which images make up a step: a function of (seed, step), for data that lives on the device."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from classic_cnns.data import Split
from classic_cnns.sharding import replicate, shard_batch

Batch = dict[str, jax.Array]


class ResidentLoader:
    """The whole uint8 split on every device; a step is a gather by index inside the jitted step.

    Training images come in a stream of epochs, each a new permutation, cut into batches without
    regard
    to epochs: over E epochs every image is seen E times, and nothing is dropped at an epoch's end.

    Attributes:
        data: {"image": (N, H, W, C) uint8, "label": (N,) int32}, replicated over the mesh.
    """

    def __init__(self, split: Split, batch_size: int, *, seed: int, mesh: Mesh) -> None:
        self.size = len(split)
        self.batch_size = batch_size
        self.seed = seed
        self.mesh = mesh
        self.data: Batch = replicate({"image": split.images, "label": split.labels}, mesh)
        self._epoch = -1
        self._order = np.empty(0, np.int32)

    def indices(self, step: int) -> np.ndarray:
        """Which images step number `step` trains on: (batch_size,) int32, a function of (seed,
        step).
        """
        start = step * self.batch_size
        out = np.empty(self.batch_size, np.int32)
        done = 0
        while done < self.batch_size:
            epoch, offset = divmod(start + done, self.size)
            part = self._permutation(epoch)[offset : offset + self.batch_size - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def train_indices(self, step: int, count: int = 1) -> jax.Array:
        """Indices of `count` steps from `step` on, on the devices: (batch,) or (count, batch)
        int32.
        """
        if count == 1:
            return shard_batch(self.indices(step), self.mesh)
        return shard_batch(
            np.stack([self.indices(step + i) for i in range(count)]), self.mesh, axis=1
        )

    def eval_indices(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Every image once, in order: pairs of indices and mask (batch,); the tail is padded, mask
        0.
        """
        for start in range(0, self.size, self.batch_size):
            index = np.arange(start, start + self.batch_size)
            mask = (index < self.size).astype(np.float32)
            index = np.minimum(index, self.size - 1).astype(np.int32)
            yield shard_batch(index, self.mesh), shard_batch(mask, self.mesh)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order, self._epoch = rng.permutation(self.size).astype(np.int32), epoch
        return self._order
