"""What the training loop itself costs on the host, beyond the jitted call.

    python benchmarks/dispatch.py

Times what train.py does for each step around a jitted function that only counts.
"""

import statistics
import time

import jax
import numpy as np

from classic_cnns.data import Split
from classic_cnns.data.loaders import ResidentLoader
from classic_cnns.durations import next_event
from classic_cnns.logging import Display
from classic_cnns.sharding import create_mesh
from classic_cnns.timing import Clock

STEPS = 5000


def main():
    split = Split(np.zeros((50_000, 2, 2, 1), np.uint8), np.zeros(50_000, np.int32))
    loader = ResidentLoader(split, 128, seed=0, mesh=create_mesh())
    count = jax.jit(lambda total, index: total + 1, donate_argnums=0)
    display, clock = Display(STEPS, "plain"), Clock(128)
    fixed = loader.train(0)
    loop, bare = [], []
    for _ in range(7):
        total = jax.numpy.zeros(())
        start = time.perf_counter()
        for step in range(STEPS):
            stop = min(next_event(step, every) for every in (390.625, 390.625, 50))
            with clock.waiting(1, total):
                index = loader.train(step, 1)
            with jax.transfer_guard("disallow"):
                total = count(total, index)
            clock.count(1, 1, total)
            display.advance(step)
            assert stop > step
        jax.block_until_ready(total)
        loop.append((time.perf_counter() - start) / STEPS)
        total = jax.numpy.zeros(())
        start = time.perf_counter()
        for _ in range(STEPS):
            total = count(total, fixed)
        jax.block_until_ready(total)
        bare.append((time.perf_counter() - start) / STEPS)
    extra = [(a - b) * 1e6 for a, b in zip(loop, bare, strict=True)]
    print(f"loop {statistics.median(loop) * 1e6:.1f} µs a step")
    print(f"call {statistics.median(bare) * 1e6:.1f} µs")
    spread = f"{min(extra):.1f} to {max(extra):.1f}"
    print(f"overhead {statistics.median(extra):.1f} µs ({spread}), n = 7")


if __name__ == "__main__":
    main()
