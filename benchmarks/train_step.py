"""Training steps beside plain linen and PyTorch, alternating in one process.

    python benchmarks/train_step.py [--model lenet5 resnet18] [--rounds 15]

Each round times the same number of steps of every peer in turn; figures are medians over rounds and
medians of the ratios within rounds. Parameter counts are asserted equal. SGD with Nesterov momentum
0.9, float32. PyTorch (extra `bench`) is left out when it is not installed. Writes
benchmarks/results/train_step-CPU.json.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers import PlainLeNet5, PlainResNet18

from classic_cnns import create_model
from classic_cnns.losses import cross_entropy

CASES = {  # model: (batch, steps a round, peer)
    "lenet5": (128, 40, PlainLeNet5),
    "resnet18": (64, 1, PlainResNet18),
}


def batch_of(size):
    rng = np.random.default_rng(0)
    return rng.normal(size=(size, 32, 32, 3)).astype(np.float32), np.arange(size) % 10


def jax_runner(model, batch):
    """A function of the number of steps, and the number of parameters."""
    images, labels = map(jnp.asarray, batch_of(batch))
    tx = optax.sgd(0.01, momentum=0.9, nesterov=True)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images)
    params, stats = variables["params"], variables.get("batch_stats", {})

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, stats, opt_state):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return cross_entropy(logits, labels).mean(), updated.get("batch_stats", {})

        grads, stats_ = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats_, opt_state

    state = [params, stats, tx.init(params)]
    count = sum(p.size for p in jax.tree.leaves(params))

    def run(steps):
        for _ in range(steps):
            state[:] = step(*state)
        jax.block_until_ready(state)

    return run, count


def torch_runner(name, batch):
    import torch
    from torch_peers import lenet5, resnet18

    model = {"lenet5": lenet5, "resnet18": resnet18}[name]().to(memory_format=torch.channels_last)
    images, labels = map(torch.from_numpy, batch_of(batch))
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return run, sum(p.numel() for p in model.parameters())


def measure(name, rounds):
    batch, steps, plain = CASES[name]
    runners = {
        "ours": jax_runner(create_model(name, 10), batch),
        "plain linen": jax_runner(plain(), batch),
    }
    try:
        runners["torch channels_last"] = torch_runner(name, batch)
    except ImportError:
        print("PyTorch is not installed; left out")
    assert len({count for _, count in runners.values()}) == 1
    for run, _ in runners.values():
        run(steps + 1)  # compiles and warms up
    times = {peer: [] for peer in runners}
    for _ in range(rounds):
        for peer, (run, _) in runners.items():
            start = time.perf_counter()
            run(steps)
            times[peer].append((time.perf_counter() - start) / steps)
    rows = []
    for peer, values in times.items():
        ratios = [a / b for a, b in zip(values, times["ours"], strict=True)]
        speed = [batch / v for v in values]
        rows.append(
            {
                "model": name,
                "batch": batch,
                "peer": peer,
                "images_per_sec": statistics.median(speed),
                "min": min(speed),
                "max": max(speed),
                "speed_of_ours_relative": statistics.median(ratios),
            }
        )
        print(
            f"{name:10} {peer:20} {statistics.median(speed):9.1f} images/s"
            f" ({min(speed):.1f} to {max(speed):.1f});"
            f" ours is {rows[-1]['speed_of_ours_relative']:.2f}×"
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    versions = {"jax": jax.__version__, "python": platform.python_version()}
    rows = [row for name in args.model for row in measure(name, args.rounds)]
    try:
        import torch

        versions["torch"] = torch.__version__
    except ImportError:
        pass
    report = {"versions": versions, "machine": machine(), "rounds": args.rounds, "rows": rows}
    path = Path(__file__).parent / "results" / "train_step-CPU.json"
    path.write_text(json.dumps(report, indent=1) + "\n")


def machine():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {len(jax.devices())} device, {_cores()} cores"
    return platform.processor()


def _cores():
    import os

    return os.cpu_count()


if __name__ == "__main__":
    main()
