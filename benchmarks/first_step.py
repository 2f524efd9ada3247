"""Time from nothing to the end of the first training step, for every network at 32 px, batch 32.

    python benchmarks/first_step.py [PATTERN]

Tracing, compiling and one step of the program of main.py, images in memory, cold (nothing compiled
before) and warm (by the cache on disk that main.py uses), with large pages as there. Each in a
process of its own, one run each.
"""

import json
import subprocess
import sys
import tempfile
import time

import jax

from classic_cnns import create_model, list_models
from classic_cnns.benchmark import training
from classic_cnns.compile_cache import collect_seldom, keep_compiled
from classic_cnns.large_pages import restart_with_large_pages


def first_step(name):
    """Seconds of tracing, of compiling or loading, and of the step."""
    train, tree, loader, _, room = training(create_model(name, 10), 32, 32)
    args = *tree, loader.data, loader.train(0, 1, room)
    jax.block_until_ready(args)
    start = time.perf_counter()
    lowered = train.lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ready = time.perf_counter()
    jax.block_until_ready(compiled(*train.split(args[0]), *args[1:]))
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
