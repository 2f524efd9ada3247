"""Which images make up a step: a function of (seed, step), by arithmetic on indices.

Nothing is stored: the order of ten million images takes no memory, any step can be asked for at
once, and neither workers, devices nor hosts can change it.
"""

from __future__ import annotations

import dataclasses

import numpy as np


def permute(position: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0…size−1, different for every (seed, epoch), at some positions.

    Rounds of steps that each permute the numbers of b bits (a multiplication by an odd number, an
    addition, a shifted xor), b the fewest that hold `size`; a result beyond `size` goes through
    again until it is inside, which keeps it a permutation.

    Args:
        position: integers in 0…size−1, any shape.
        size: of the set.
        seed, epoch: choose the permutation.

    Returns:
        int64, of the shape of `position`.
    """
    bits = max(2, int(size - 1).bit_length())
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    rounds = rng.integers(0, 1 << 63, (6, 2), np.uint64)
    mask, shift = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    out = position.astype(np.uint64)
    todo = np.ones(out.shape, bool)
    while todo.any():
        x = out[todo]
        for factor, offset in rounds:
            x = (x * (factor | np.uint64(1)) + offset) & mask
            x ^= x >> shift
        out[todo] = x
        todo = out >= size
    return out.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Order:
    """The images of every training step.

    Training images come in a stream of epochs, each a new permutation, cut into batches without
    regard to epochs: over E epochs every image is seen E times, and nothing is dropped.

    Attributes:
        size: number of images.
        batch_size: images of a step, over all hosts.
        seed: chooses the permutations.
        members: for a balanced order: numbers of the images, class after class; None for the plain
            one.
        starts: where each class begins in `members`, with its length at the end.
    """

    size: int
    batch_size: int
    seed: int
    members: np.ndarray | None = None
    starts: np.ndarray | None = None

    @classmethod
    def balanced(cls, labels: np.ndarray, batch_size: int, seed: int) -> Order:
        """An order in which every class is equally frequent; each class goes through its images
        in permutations of its own, so that small classes come again sooner.
        """
        counts = np.bincount(labels)
        counts = counts[counts > 0]
        return cls(
            len(labels), batch_size, seed,
            members=np.argsort(labels, kind="stable").astype(np.int32),
            starts=np.concatenate([[0], np.cumsum(counts)]),
        )  # fmt: skip

    def step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the images of one step, and how often the whole set was gone through before
        each: two arrays (batch_size,) int32.
        """
        index, epoch = self.steps(step, 1)
        return index[0], epoch[0]

    def steps(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The same of `count` steps at once, which takes little more time than one: two arrays
        (count, batch_size) int32.
        """
        shape = count, self.batch_size
        position = start * self.batch_size + np.arange(count * self.batch_size, dtype=np.int64)
        epoch, offset = np.divmod(position, self.size)
        index = np.empty(len(position), np.int64)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            index[here] = permute(offset[here], self.size, self.seed, e)
        if self.members is not None and self.starts is not None:
            index = self._balance(position - offset + index)
        return index.astype(np.int32).reshape(shape), epoch.astype(np.int32).reshape(shape)

    def _balance(self, slot: np.ndarray) -> np.ndarray:
        """Slot s serves class s mod C with the (s div C)-th image of that class."""
        assert self.members is not None
        assert self.starts is not None
        number, label = np.divmod(slot, len(self.starts) - 1)
        out = np.empty(len(slot), np.int64)
        for c in np.unique(label).tolist():
            start, count = int(self.starts[c]), int(self.starts[c + 1] - self.starts[c])
            here = label == c
            turn, place = np.divmod(number[here], count)
            chosen = np.empty(len(turn), np.int64)
            for t in np.unique(turn).tolist():
                same = turn == t
                chosen[same] = permute(place[same], count, self.seed, (c + 1) << 32 | t)
            out[here] = self.members[start + chosen]
        return out
