"""Time from nothing to the end of the first training step, for every network at 32 px, batch 32.

    python benchmarks/first_step.py [PATTERN]

Tracing, compiling and one step, without a persistent compilation cache; one run each, one process.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import optax

from classic_cnns import create_model, list_models
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import train_step
from classic_cnns.train_state import create_train_state


def main():
    batch = {"image": jnp.zeros((32, 32, 32, 3), jnp.uint8), "label": jnp.zeros(32, jnp.int32)}
    for name in list_models(sys.argv[1] if len(sys.argv) > 1 else "*"):
        model, tx = create_model(name, 10), optax.sgd(0.1, momentum=0.9)
        state = create_train_state(model, tx, (32, 32, 3), seed=0, mesh=create_mesh(1))
        jax.block_until_ready(state)
        step = functools.partial(train_step, model=model, tx=tx, mean=(0.5,) * 3, std=(0.25,) * 3)
        start = time.perf_counter()
        lowered = jax.jit(step).lower(state, batch)
        traced = time.perf_counter()
        compiled = lowered.compile()
        ready = time.perf_counter()
        jax.block_until_ready(compiled(state, batch))
        done = time.perf_counter()
        print(
            f"{name:16} trace {traced - start:5.1f} s  compile {ready - traced:5.1f} s"
            f"  step {done - ready:5.2f} s  all {done - start:5.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
