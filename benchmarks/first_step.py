"""Time from nothing to the end of the first training step, for every network at 32 px, batch 32.

    python benchmarks/first_step.py [PATTERN]

Tracing, compiling and one step of the program of main.py, images in memory, cold (nothing compiled
before) and warm (by the cache on disk that main.py uses), with large pages as there. Each in a
process of its own, one run each.
"""

import functools
import json
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import optax

from classic_cnns import create_model, list_models
from classic_cnns.compile_cache import collect_seldom, keep_compiled
from classic_cnns.data import Split
from classic_cnns.data.loaders import ResidentLoader
from classic_cnns.large_pages import restart_with_large_pages
from classic_cnns.sharding import create_mesh, replicate
from classic_cnns.steps import JitStep, Progress, train_on, train_step
from classic_cnns.timing import dispatch_sizes
from classic_cnns.train_state import create_train_state


def first_step(name):
    """Seconds of tracing, of compiling or loading, and of the step."""
    split = Split(np.zeros((32, 32, 32, 3), np.uint8), np.zeros(32, np.int32))
    model, tx, mesh = create_model(name, 10), optax.sgd(0.1, momentum=0.9), create_mesh(1)
    state = create_train_state(model, tx, (32, 32, 3), seed=0, mesh=mesh)
    loader = ResidentLoader(split, 32, seed=0, mesh=mesh)
    room = dispatch_sizes(0, True, model.impl)[1]
    args = replicate(Progress.empty(), mesh), loader.data, loader.train(0, 1, room)
    jax.block_until_ready((state, args))
    step = functools.partial(train_step, model=model, tx=tx, mean=(0.5,) * 3, std=(0.25,) * 3)
    train = JitStep(functools.partial(train_on, step=step), loops=room > 0)
    start = time.perf_counter()
    lowered = train.lower(state, *args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ready = time.perf_counter()
    jax.block_until_ready(compiled(*train.split(state), *args))
    done = time.perf_counter()
    return traced - start, ready - traced, done - ready


def main():
    if sys.argv[1:2] == ["--child"]:
        restart_with_large_pages()
        collect_seldom()
        keep_compiled(sys.argv[2])
        print(json.dumps(first_step(sys.argv[3])))
        return
    for name in list_models(sys.argv[1] if len(sys.argv) > 1 else "*"):
        totals = []
        with tempfile.TemporaryDirectory() as directory:
            for kind in ("cold", "warm"):
                command = [sys.executable, __file__, "--child", directory, name]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                trace, make, step = json.loads(out.splitlines()[-1])
                totals.append(trace + make + step)
                print(
                    f"{name:16} {kind}: trace {trace:5.1f} s  compile {make:5.1f} s"
                    f"  step {step:5.2f} s  all {totals[-1]:5.1f} s",
                    flush=True,
                )
        print(f"{name:16} warm is {totals[1] / totals[0]:.2f} of cold", flush=True)


if __name__ == "__main__":
    main()
