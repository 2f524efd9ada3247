"""One part of what is measured on a GPU; gpu.sh runs them with time limits.

environment  versions and device
parity       logits and gradients against torchvision's, float32 (parity.py)
steps-32, steps-224  training steps of every network in bfloat16 beside torch.compile, and per cent
             of the compute and byte roofs measured in the same process
dispatch     one, sixteen and all hundred steps of an epoch in one call
accuracy     ResNet-18 on CIFAR-10 through main.py, 30 epochs

Each result enters the JSON file as soon as it is there, and what is in it is not measured again:
delete the file on another machine. --smoke is tiny and for a CPU.
"""

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from train_step import about, measure, our_model

from classic_cnns import create_model, list_models
from classic_cnns.compile_cache import keep_compiled
from classic_cnns.data import Split
from classic_cnns.data.loaders import ResidentLoader
from classic_cnns.dispatch import JitStep, Progress, train_on
from classic_cnns.models.macs import count_macs
from classic_cnns.sharding import create_mesh, replicate
from classic_cnns.steps import train_step
from classic_cnns.train_state import create_train_state

ROOT = Path(__file__).parents[1]
# Measured first, where time may not do for all; GoogLeNet comes last: both of its programs take
# minutes to compile.
FIRST = ["resnet50", "resnet18", "vgg16", "alexnet", "lenet5", "airbench94"]
PARITY = [
    "alexnet",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
    "googlenet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]


class Results:
    """{part: {item: result}} in a JSON file, written after every item."""

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()
        self.parts = json.loads(path.read_text()) if path.exists() else {}

    def measure(self, part, item, function):
        """Calls the function unless there is a result; an error is printed and left out."""
        if item in self.parts.get(part, {}):
            print(f"{part} {item}: there already")
            return True
        try:
            result = function()
        except Exception as error:  # the other items are worth having
            print(f"{part} {item} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
            return False
        with self.lock:
            self.parts.setdefault(part, {})[item] = result
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.parts, indent=1) + "\n")
            new.replace(self.path)
        return True


def environment():
    return about() | {"backend": jax.default_backend()}


def parity(name):
    """parity.py's lines for a network; in a process of its own, in full float32."""
    command = [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "parity.py", "--model", name]
    env = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    print(done.stdout, end="", flush=True)
    return done.stdout.splitlines()


def roof(smoke):
    """FLOP/s of a large bfloat16 matrix product, and bytes/s (read and written) of a large copy."""
    size, length = (512, 1 << 20) if smoke else (8192, 1 << 29)
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    long = jax.random.normal(jax.random.key(1), (length,), jnp.float32)
    product = _seconds(jax.jit(jnp.matmul), a, a)
    copy = _seconds(jax.jit(jnp.negative), long)
    return {"flop_per_sec": 2 * size**3 / product, "bytes_per_sec": 8 * length / copy}


def _seconds(function, *args):
    """Median over seven rounds of ten calls."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(10):
            out = function(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / 10)
    return statistics.median(times)


def step(name, side, limits, smoke):
    """The rows of train_step.py, ours with its per cent of both roofs."""
    batch = 2 if smoke else 1024 if side == 32 else 128
    peers = ("ours", "torch eager" if smoke else "torch compile")
    settings = {"rounds": 1, "seconds": 0.01} if smoke else {"rounds": 7, "seconds": 0.2}
    settings["warm"] = 0
    rows = measure(name, side=side, batch=batch, dtype="bfloat16", peers=peers, **settings)
    ours = rows[0]
    steps = ours["images_per_sec"] / batch
    macs = count_macs(our_model(name, 10 if side < 64 else 1000, "bfloat16"), (side, side, 3))
    ours["roof"] = limits
    # Training is three times forward; the bytes are the compiler's account.
    compute = 6 * macs * ours["images_per_sec"] / limits["flop_per_sec"]
    moved = (ours["bytes_accessed"] or float("nan")) * steps / limits["bytes_per_sec"]
    ours |= {"percent_of_compute_roof": 100 * compute, "percent_of_byte_roof": 100 * moved}
    print(f"{name:14} {100 * compute:.0f} % of the compute roof, {100 * moved:.0f} % of the bytes'")
    return rows


def dispatch(name, smoke):
    """Images/s with one, sixteen and all steps of an epoch of 12,800 images in one call."""
    count, batch, rounds = (32, 8, 1) if smoke else (12_800, 128, 5)
    epoch = count // batch
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    mesh = create_mesh(1)
    split = Split(images, np.arange(count, dtype=np.int32) % 10)
    loader = ResidentLoader(split, batch, seed=0, mesh=mesh)
    model = create_model(name, 10, dtype=jnp.bfloat16)
    tx = optax.sgd(0.01, momentum=0.9)
    one = functools.partial(train_step, model=model, tx=tx, mean=(0.5,) * 3, std=(0.25,) * 3)
    train = JitStep(functools.partial(train_on, step=one))
    state = create_train_state(model, tx, (32, 32, 3), seed=0, mesh=mesh)
    progress = replicate(Progress.empty(), mesh)
    speed = {}
    for turn in range(rounds + 1):  # the first compiles
        for per_call in (1, 2 if smoke else 16, epoch):
            calls = epoch // per_call
            start = time.perf_counter()
            for i in range(calls):
                item = loader.train(i * per_call, per_call)
                state, progress = train(state, progress, loader.data, item)
            jax.block_until_ready(state)
            if turn:
                images_per_sec = calls * per_call * batch / (time.perf_counter() - start)
                speed.setdefault(str(per_call), []).append(images_per_sec)
    medians = {per_call: statistics.median(values) for per_call, values in speed.items()}
    print(name, medians, flush=True)
    return {"images_per_sec_by_steps_a_call": medians, "rounds": rounds, "batch": batch}


def accuracy(smoke):
    """Trains by main.py's own command, or goes on with the run that its time limit stopped."""
    workdir = os.environ.get("WORKDIR", f"runs/gpu-{'lenet5' if smoke else 'resnet18'}")
    command = [sys.executable, "-W", "ignore", "main.py"]
    if smoke:
        command += ["--config=configs/lenet5.py:digits", "--config.num_steps=20"]
    else:
        command += ["--config=configs/resnet18.py", "--config.num_epochs=30"]
        command += [f"--config.data.dir={os.environ.get('DATA_DIR', '')}"]
    command += [f"--workdir={workdir}", f"--max_seconds={int(os.environ.get('LIMIT', 540)) - 60}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    found = re.search(r"RESULT (\{.*\})", done.stdout)
    if not found:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout[-200:]}")
    result = json.loads(found[1])
    print(result, flush=True)
    # The command is kept without what is particular to a machine.
    kept = [part for part in command[3:] if not part.startswith(("--workdir", "--config.data.dir"))]
    del result["workdir"]
    return {"command": " ".join(kept), **result}


def main():
    parts = ("environment", "parity", "steps-32", "steps-224", "dispatch", "accuracy")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    args = parser.parse_args()
    keep_compiled()  # also what XLA found out about each convolution, for the next network
    results, part, smoke = Results(args.out), args.part, args.smoke
    if part.startswith("steps"):
        side = int(part.partition("-")[2])
        small = ("lenet5", "_cifar", "airbench")
        names = [n for n in list_models() if side == 32 or not any(part in n for part in small)]
        rank = {n: i for i, n in enumerate(FIRST)}
        names.sort(key=lambda n: (n.startswith("googlenet"), rank.get(n, len(rank))))
        limits = roof(smoke)
        items = {n: functools.partial(step, n, side, limits, smoke) for n in names}
        items = {n: items[n] for n in ("lenet5", "resnet10") if n in items} if smoke else items
    elif part == "parity":
        items = {n: functools.partial(parity, n) for n in (PARITY[-5:-4] if smoke else PARITY)}
    elif part == "dispatch":
        names = ("lenet5",) if smoke else ("lenet5", "resnet18", "resnet50")
        items = {n: functools.partial(dispatch, n, smoke) for n in names}
    elif part == "accuracy":
        items = {"lenet5" if smoke else "resnet18": functools.partial(accuracy, smoke)}
    else:
        items = {"here": environment}
    # "googlenet" in steps is torchvision's form, with 3×3 in place of 5×5; see train_step.py.
    jobs = (os.cpu_count() or 1) // 4 if part == "parity" else 1  # the others are timed
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        sound = list(pool.map(functools.partial(results.measure, part), items, items.values()))
    sys.exit(0 if all(sound) else 1)


if __name__ == "__main__":
    main()
