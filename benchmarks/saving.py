"""What checkpoints cost a training.

    python benchmarks/saving.py [--data DIR] [--rounds 5]

1. How long a save keeps the training waiting, for LeNet-5 and for ResNet-50 with momentum: seconds
   until `Checkpoints.save` returns, after a warm-up, and until all is on the disk. Beside it, what
   copying the same bytes with NumPy into memory that is there takes: no copy can be quicker.
2. Epochs of LeNet-5 on CIFAR-10 with and without a save at their start, alternating in one process,
   wall time and processor time (which the load of the machine does not change).
"""

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax

from classic_cnns import create_model
from classic_cnns.checkpoints import Checkpoints
from classic_cnns.data import create_dataset
from classic_cnns.data.loaders import create_loader
from classic_cnns.dispatch import JitStep, Progress, train_on
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import train_step
from classic_cnns.train_state import create_train_state


def median(values):
    return f"median {statistics.median(values):.1f}, {min(values):.1f} to {max(values):.1f}"


def blocking(name, shape, rounds):
    tx = optax.sgd(0.1, momentum=0.9)
    model = create_model(name, num_classes=10)
    state = create_train_state(model, tx, shape, seed=0, mesh=create_mesh())
    leaves = [np.array(a) for a in jax.tree.leaves(state)]
    there = [np.empty_like(a) for a in leaves]
    bump = jax.jit(lambda s: jax.tree.map(lambda a: a + 1 if a.dtype.kind == "f" else a, s))
    blocked, written, copied = [], [], []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
        checkpoints.prepare({"state": state})
        for step in range(1, rounds + 1):
            state = jax.block_until_ready(bump(state))
            start = time.perf_counter()
            checkpoints.save(step, {"state": state}, {}, keep=set())
            blocked.append(1e3 * (time.perf_counter() - start))
            checkpoints.wait()
            written.append(1e3 * (time.perf_counter() - start))
            start = time.perf_counter()
            for a, b in zip(leaves, there, strict=True):
                np.copyto(b, a)
            copied.append(1e3 * (time.perf_counter() - start))
    size = sum(a.nbytes for a in leaves) / 1e6
    print(f"{name}, {size:.0f} MB, n={rounds}, in ms")
    print(f"  training waits  {median(blocked)}")
    print(f"  NumPy copies    {median(copied)}")
    print(f"  on the disk     {median(written)}", flush=True)


def epochs(data, rounds, folder):
    dataset = create_dataset("cifar10", dir=data, val_fraction=0.1)
    mesh = create_mesh()
    loader = create_loader(dataset.train, 128, seed=0, mesh=mesh, preprocess=dataset.preprocess)
    model = create_model("lenet5", num_classes=10)
    tx = optax.sgd(0.05, momentum=0.9)
    state = create_train_state(model, tx, dataset.image_shape, seed=0, mesh=mesh)
    progress = Progress.empty()
    mean, std = dataset.preprocess.mean, dataset.preprocess.std
    step = functools.partial(
        train_step, model=model, tx=tx, mean=mean, std=std, augment=None, seed=0
    )
    train = JitStep(functools.partial(train_on, step=step))
    length = len(dataset.train) // 128
    wall, cpu = {True: [], False: []}, {True: [], False: []}
    at = 0
    with Checkpoints(folder) as checkpoints:
        checkpoints.prepare({"state": state})
        for round_ in range(2 * rounds + 2):
            saving = round_ % 2 == 0
            start = time.perf_counter(), time.process_time()
            if saving:
                checkpoints.save(at + 1, {"state": state}, {}, keep=set())
            for _ in range(length):
                state, progress = train(state, progress, loader.data, loader.train(at, 1))
                at += 1
            jax.block_until_ready(state)
            checkpoints.wait()
            if round_ >= 2:  # the first two compile and take memory
                wall[saving].append(time.perf_counter() - start[0])
                cpu[saving].append(time.process_time() - start[1])
    print(f"LeNet-5, {length} steps of 128 of CIFAR-10, n={rounds} pairs")
    for name, times in (("wall time", wall), ("processor time", cpu)):
        ratios = [100 * (a / b - 1) for a, b in zip(times[True], times[False], strict=True)]
        print(
            f"  with a save {name} is more by {median(ratios)} % of "
            f"{statistics.median(times[False]):.1f} s",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="", help="directory of CIFAR-10; without it, part 1 only")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.device_count()} × {jax.devices()[0].device_kind}")
    blocking("lenet5", (32, 32, 3), 2 * args.rounds)
    blocking("resnet50", (224, 224, 3), 2 * args.rounds)
    if args.data:
        with tempfile.TemporaryDirectory() as folder:
            epochs(args.data, args.rounds, Path(folder))


if __name__ == "__main__":
    main()
