"""Batches: from images that live on the devices, or streamed to them; one interface.

loader.train(step)   what step number `step` trains on
loader.evaluation()  every image once, in order, the last batch padded

Both give a dictionary for `dispatch.fetch(loader.data, item)`, the batch: "image", "label",
and for training "index" (which image) and "epoch" (how often the set was gone through before), for
evaluation "mask" (0 for padding). What a step trains on is a function of (seed, step) alone.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from classic_cnns.data.mixing import Batch
from classic_cnns.data.order import Order
from classic_cnns.data.preprocess import DRAWS, Preprocess, random_resized_crop
from classic_cnns.data.splits import Encoded, Split
from classic_cnns.errors import DataError
from classic_cnns.sharding import replicate, shard_batch, shard_parts

HostBatch = dict[str, np.ndarray]
ALIGNMENT = 64  # bytes, of memory that a CPU device takes without a copy
BLOCK = 16  # steps whose images are chosen at a time


class ResidentLoader:
    """The whole uint8 split on every device; a step is a gather by index inside the jitted step.

    Args:
        split: decoded.
        batch_size: over all hosts.
        seed: of the order.
        mesh: of the devices.
        balanced: every class equally often, see `Order.balanced`.

    Attributes:
        data: {"image": (N, H, W, C) uint8, "label": (N,) int32}, replicated over the mesh.
    """

    def __init__(
        self, split: Split, batch_size: int, *, seed: int, mesh: Mesh, balanced: bool = False
    ) -> None:
        self.size, self.batch_size, self.mesh = len(split), batch_size, mesh
        self.order = _order(split, batch_size, seed, balanced)
        self.data: Batch = replicate({"image": split.images, "label": split.labels}, mesh)
        self._step = _step_by_step(self.order)
        self.bad: dict[str, str] = {}
        self.readable = self.size  # images that an evaluation counts

    def train(self, step: int, count: int = 1, room: int = 0) -> Batch:
        """Item of one step, or of `count` steps with a leading axis. With `room` for so many steps
        that axis always has it, and "count" is in the item.
        """
        if room:
            whole = self.order.steps(step, room)  # those beyond the count are of no step's batch
            item = shard_batch(dict(zip(("index", "epoch"), whole, strict=True)), self.mesh, 1)
            return item | replicate({"count": np.int32(count)}, self.mesh)
        index, epoch = self._step(step) if count == 1 else self.order.steps(step, count)
        return shard_batch({"index": index, "epoch": epoch}, self.mesh, int(count > 1))

    def evaluation(self) -> Iterator[Batch]:
        """Items of every batch."""
        for start in range(0, self.size, self.batch_size):
            index, mask = _padded(start, self.batch_size, self.size)
            yield shard_batch({"index": index, "mask": mask}, self.mesh)


class StreamLoader:
    """Batches made by threads while the devices compute, and put on them ahead of time.

    Args:
        split: encoded, or an array that may be mapped from a file.
        batch_size: over all hosts.
        seed: of the order and the crops.
        mesh: of the devices.
        preprocess: of encoded images.
        crop_scale: for random-resized-crop in training, see `random_resized_crop`; () = none.
        workers: threads; 0 = one a core, or a single one where nothing is decoded. Each makes a
            batch by itself.
        on_bad_image: "error", or "skip": another image takes the place of one that cannot be
            decoded, always the same, and the loader counts and names it in `bad`.
        max_bad_fraction: share of the images up to which they may be skipped.
        total: images that this is a share of, those of all splits, say; 0 = of this split.
        host: (this process, number of processes): each makes its part of every batch.
        balanced: every class equally often, see `Order.balanced`.

    Attributes:
        data: empty, since a batch is whole when it comes.
        bad: reasons by name of the images that could not be decoded.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int,
        mesh: Mesh,
        preprocess: Preprocess,
        crop_scale: tuple[float, ...] = (),
        workers: int = 0,
        on_bad_image: Literal["error", "skip"] = "error",
        max_bad_fraction: float = 0.001,
        total: int = 0,
        host: tuple[int, int] | None = None,
        balanced: bool = False,
    ) -> None:
        self.split, self.size, self.batch_size = split, len(split), batch_size
        self.mesh, self.preprocess, self.seed = mesh, preprocess, seed
        self.crop_scale = tuple(crop_scale)
        self.workers = workers or (os.cpu_count() or 1 if split.encoded else 1)
        self.skip = on_bad_image == "skip"
        self.total = total or self.size
        self.max_bad = max_bad_fraction * self.total
        self.order = _order(split, batch_size, seed, balanced)
        self._step = _step_by_step(self.order)
        process, count = host or (jax.process_index(), jax.process_count())
        self.mine = slice(batch_size * process // count, batch_size * (process + 1) // count)
        self.data: Batch = {}
        self.bad: dict[str, str] = {}
        self._lock = threading.Lock()
        self._next, self._stream = -1, iter(())  # type: tuple[int, Iterator[Batch]]
        if split.encoded:
            _one_thread_a_call()

    @property
    def readable(self) -> int:
        """Images that an evaluation counts: all but those known to be bad."""
        names = self.split.images.names if self.bad else ()
        return self.size - sum(name in self.bad for name in names)

    def train(self, step: int, count: int = 1, room: int = 0) -> Batch:
        """Item of one step; steps asked for one after another are ready by then."""
        assert (count, room) == (1, 0), "streamed steps are dispatched one by one"
        if step != self._next:
            self._stream = self._ahead(self.train_batch, step, 1 << 40)
        self._next = step + 1
        return next(self._stream)

    def evaluation(self) -> Iterator[Batch]:
        """Items of every batch."""
        yield from self._ahead(self.eval_batch, 0, -(-self.size // self.batch_size))

    def train_batch(self, step: int) -> HostBatch:
        """This process's part of the batch of one step, as host arrays."""
        index, epoch = (array[self.mine].copy() for array in self._step(step))
        draws = None
        if self.crop_scale and self.split.encoded:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, step]))
            draws = rng.random((self.batch_size, DRAWS))[self.mine].tolist()
        images = self._images(index, draws)
        return {
            "image": images,
            "label": self.split.labels[index],
            "index": index,
            "epoch": epoch,
        }

    def eval_batch(self, number: int) -> HostBatch:
        """This process's part of one batch of evaluation; mask is 0 where an image is bad."""
        index, mask = _padded(number * self.batch_size, self.batch_size, self.size)
        index, mask = index[self.mine], mask[self.mine]
        images = self._images(index, None, mask)
        return {"image": images, "label": self.split.labels[index], "mask": mask}

    def _ahead(self, make: Callable[[int], HostBatch], start: int, stop: int) -> Iterator[Batch]:
        import grain

        options = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=self.workers + 1)
        numbers = grain.MapDataset.range(start, stop)
        batches = numbers.map(lambda number: shard_parts(make(int(number)), self.mesh))
        return iter(batches.to_iter_dataset(options))

    def _images(
        self, index: np.ndarray, draws: list[list[float]] | None, mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Pixels by number; where an image is bad, its mask becomes 0 or another stands in."""
        images = self.split.images
        if not isinstance(images, Encoded):
            out = _aligned((len(index), *images.shape[1:]))
            for row, number in enumerate(index.tolist()):
                out[row] = images[number]
            return out
        out = _aligned((len(index), *self.preprocess.image_shape))
        for row, number in enumerate(index.tolist()):
            for attempt in range(self.size):
                pixels = self._decode(
                    images, (number + attempt) % self.size, draws[row] if draws else None
                )
                if pixels is not None:
                    out[row] = pixels
                    index[row] = (number + attempt) % self.size
                    break
                if mask is not None:
                    mask[row], out[row] = 0, 0
                    break
        return out

    def _decode(self, images: Encoded, number: int, draws: list[float] | None) -> np.ndarray | None:
        name = images.names[number]
        if name in self.bad:
            return None
        try:
            data = images.read(name)
            if draws is None:
                return self.preprocess(data)
            height, _, channels = self.preprocess.image_shape
            return random_resized_crop(
                data,
                height,
                draws,
                channels=channels,
                scale=self.crop_scale,  # type: ignore[arg-type]
            )
        except (ValueError, OSError) as error:
            self._count(name, getattr(error, "strerror", None) or str(error))
        return None

    def _count(self, name: str, reason: str) -> None:
        if not self.skip:
            raise DataError(
                f"{name!r} cannot be decoded: {reason}. Fix: replace it, or "
                "--config.data.on_bad_image=skip"
            )
        with self._lock:
            self.bad[name] = reason
            if len(self.bad) > self.max_bad:
                listed = "; ".join(f"{n!r}: {r}" for n, r in sorted(self.bad.items())[:20])
                raise DataError(
                    f"{len(self.bad)} of {self.total} images cannot be decoded: {listed}. Fix: "
                    "replace them, or a larger data.max_bad_fraction"
                )


Loader = ResidentLoader | StreamLoader


def create_loader(split: Split, batch_size: int, **settings: Any) -> Loader:
    """A `StreamLoader` for encoded or mapped images, a `ResidentLoader` for those in memory.

    Args:
        split, batch_size: see the loaders.
        **settings: of `StreamLoader`; those that a `ResidentLoader` has no use for are left out.
    """
    if split.encoded or split.mapped:
        return StreamLoader(split, batch_size, **settings)
    used = {k: v for k, v in settings.items() if k in ("seed", "mesh", "balanced")}
    return ResidentLoader(split, batch_size, **used)


def _order(split: Split, batch_size: int, seed: int, balanced: bool) -> Order:
    if balanced:
        return Order.balanced(split.labels, batch_size, seed)
    return Order(len(split), batch_size, seed)


def _step_by_step(order: Order) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """`order.step`, with those of the same `BLOCK` kept: not to be written to."""
    block = functools.lru_cache(2)(lambda number: order.steps(BLOCK * number, BLOCK))

    def step(number: int) -> tuple[np.ndarray, np.ndarray]:
        index, epoch = block(number // BLOCK)
        return index[number % BLOCK], epoch[number % BLOCK]

    return step


def _padded(start: int, batch_size: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers from `start` on, and 0 for those beyond the end (which repeat the last one)."""
    index = np.arange(start, start + batch_size)
    mask = (index < size).astype(np.float32)
    return np.minimum(index, size - 1).astype(np.int32), mask


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 memory, not cleared, that a CPU device takes as it is: at other addresses it copies."""
    size = math.prod(shape)
    memory = np.empty(size + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + size].reshape(shape)


def _one_thread_a_call() -> None:
    """OpenCV would start threads of its own inside each of ours."""
    import cv2

    cv2.setNumThreads(1)
