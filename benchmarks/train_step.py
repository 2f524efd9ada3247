"""Training steps beside plain linen, PyTorch and Keras, alternating in one process.

    python benchmarks/train_step.py [--model lenet5 resnet18] [--side 32] [--batch 64] [--out FILE]

Each round times every peer in turn, as many steps of each as take about --seconds; figures are
medians over rounds and medians of the ratios within rounds. Parameter counts are asserted equal.
SGD with Nesterov momentum 0.9, synthetic images on the device, 10 classes below 64 px. Peers:
our networks with flax.linen's own layers; PyTorch, channels_last, eager and through torch.compile;
Keras 3 on JAX (LeNet-5 and ResNet-18). What is not installed (extra `bench`) is left out.
On CPU ours are several steps in one call, as in main.py, those of "ours, single" one in each.
With --out FILE.json rows replace those of the same network, side, batch and dtype in that file; one
of other versions or another machine is refused.
"""

import argparse
import functools
import importlib.util
import json
import os
import platform
import re
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers import plain_linen

from classic_cnns import create_model, list_models
from classic_cnns.data.augment import apart
from classic_cnns.losses import cross_entropy

PEERS = ("ours", "ours, single", "plain linen", "torch eager", "torch compile", "keras")
BATCHES = {"lenet5": 128}


def batch_of(size, side, classes):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(size, side, side, 3)).astype(np.float32)
    return images, np.arange(size) % classes


def our_model(name, classes, dtype):
    """The network; GoogLeNet with torchvision's 3×3 in place of 5×5, so that it has a peer."""
    fields = {"arch": "torchvision"} if name == "googlenet" else {}
    return create_model(name, classes, dtype=jnp.dtype(dtype), **fields)


def jax_runner(model, images, labels, loops=False):
    """A function of the number of steps, the number of parameters, and the compiled step's costs
    by the compiler's account ("flops", "bytes accessed"), which counts the body of a loop once.
    With `loops` one call does up to 16; it takes two batches in turns, so that nothing of them can
    be computed before the loop.
    """
    tx = optax.sgd(0.01, momentum=0.9, nesterov=True)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # a GPU's compiler takes longer
        variables = jax.jit(functools.partial(model.init, train=False))(
            jax.random.key(0), images[:1]
        )
    variables, images, labels = jax.device_put((variables, images, labels), jax.devices()[0])
    params, stats = variables["params"], variables.get("batch_stats", {})

    def step(params, stats, opt_state, key, images, labels):
        key, dropout = jax.random.split(key)

        def loss_fn(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats", "aux_logits"],
                rngs={"dropout": dropout},
            )
            total = cross_entropy(logits, labels).mean()
            for aux in jax.tree.leaves(updated.get("aux_logits", {})):
                total += 0.3 * cross_entropy(aux, labels).mean()
            return total, updated.get("batch_stats", {})

        grads, stats_ = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats_, opt_state, key

    state = [params, stats, tx.init(params), jax.random.key(1)]
    count = sum(p.size for p in jax.tree.leaves(params))
    if loops:
        images, labels = (jnp.stack([a, a[::-1]]) for a in (images, labels))

    def loop(params, stats, opt_state, key, images, labels, count):
        def one(i, carry):
            given = {"images": images, "labels": labels}
            batch = apart(lambda both: {k: v[i % 2] for k, v in both.items()}, given, i)
            return step(*carry, **batch)

        return jax.lax.fori_loop(0, count, one, (params, stats, opt_state, key))

    # On CPU written-over parameters hold up the gradients that read them, see dispatch.JitStep.
    donated = (1, 2, 3) if jax.default_backend() == "cpu" and not loops else (0, 1, 2, 3)
    inputs = (images, labels, jnp.int32(1)) if loops else (images, labels)
    jitted = jax.jit(loop if loops else step, donate_argnums=donated)
    compiled = jitted.lower(*state, *inputs).compile()

    def run(steps):
        most = 16 if loops else 1
        for done in range(0, steps, most):
            count = (jnp.int32(min(most, steps - done)),) if loops else ()
            state[:] = compiled(*state, images, labels, *count)
        jax.block_until_ready(state)

    return run, count, compiled.cost_analysis() or {}


def runners_of(name, side, batch, dtype, peers):
    """{peer: (function of the number of steps, number of parameters)}, and our step's costs."""
    classes = 10 if side < 64 else 1000
    images, labels = batch_of(batch, side, classes)
    model = our_model(name, classes, dtype)
    runners = {}
    cpu = jax.default_backend() == "cpu"
    *runners["ours"], costs = jax_runner(model, images, labels, loops=cpu)
    if cpu and "ours, single" in peers:
        *runners["ours, single"], costs = jax_runner(model, images, labels)
    if "plain linen" in peers:
        with plain_linen():  # jax_runner compiles
            *runners["plain linen"], _ = jax_runner(model, images, labels)
    wanted = [peer for peer in ("torch eager", "torch compile") if peer in peers]
    if wanted and importlib.util.find_spec("torch"):
        import torch
        from torch_peers import torch_model, torch_runner

        device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        for peer in wanted:
            if (theirs := torch_model(name, classes, side)) is not None:
                run = torch_runner(
                    theirs,
                    images,
                    labels,
                    compiled=peer == "torch compile",
                    dtype=dtype,
                    device=device,
                )
                runners[peer] = run, sum(p.numel() for p in theirs.parameters())
    if "keras" in peers and dtype == "float32" and importlib.util.find_spec("keras"):
        from keras_peers import NETWORKS, keras_runner

        if name in NETWORKS and side == 32:
            runners["keras"] = keras_runner(name, classes, images, labels)
    return runners, costs


def measure(name, *, side, batch, dtype="float32", rounds=15, seconds=0.5, warm=5.0, peers=PEERS):
    """One row for each peer that is there, after about `warm` seconds of each, in turns: on CPU a
    process is slower at first.
    """
    runners, costs = runners_of(name, side, batch, dtype, peers)
    counts = {peer: count for peer, (_, count) in runners.items()}
    assert len(set(counts.values())) == 1, f"{name} at {side} px: parameters {counts}"
    steps = {}
    for peer, (run, _) in runners.items():
        run(2)  # compiles and warms up
        start = time.perf_counter()
        run(1)
        steps[peer] = max(1, int(seconds / (time.perf_counter() - start)))

    def one_round():
        seconds = {}
        for peer, (run, _) in runners.items():
            start = time.perf_counter()
            run(steps[peer])
            seconds[peer] = time.perf_counter() - start
        return seconds

    while warm > 0:
        warm -= statistics.mean(one_round().values())
    times = {peer: [] for peer in runners}
    for _ in range(rounds):
        for peer, taken in one_round().items():
            times[peer].append(taken / steps[peer])
    rows = []
    for peer, values in times.items():
        ratios = [a / b for a, b in zip(values, times["ours"], strict=True)]
        speed = [batch / v for v in values]
        row = {"model": name, "side": side, "batch": batch, "dtype": dtype, "peer": peer}
        row |= {"parameters": counts[peer], "rounds": rounds, "steps_a_round": steps[peer]}
        row |= {"images_per_sec": statistics.median(speed), "min": min(speed), "max": max(speed)}
        row |= {"speed_of_ours_relative": statistics.median(ratios)}
        if peer == "ours":
            row |= {k.replace(" ", "_"): costs.get(k) for k in ("flops", "bytes accessed")}
        rows.append(row)
        print(
            f"{name:14} {side:3} px  {peer:14} {row['images_per_sec']:9.1f} images/s"
            f" ({row['min']:.1f} to {row['max']:.1f}); ours"
            f" {row['speed_of_ours_relative']:.2f} times as fast",
            flush=True,
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["lenet5", "resnet18"], metavar="NAME")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=0, help="64 by default, 128 of lenet5")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    if args.out:
        rows_of(args.out)  # says now if they are another machine's
    names = list_models() if args.model == ["all"] else args.model
    for name in names:
        batch = args.batch or BATCHES.get(name, 64)
        rows = measure(
            name,
            side=args.side,
            batch=batch,
            dtype=args.dtype,
            rounds=args.rounds,
            seconds=args.seconds,
            peers=args.peers,
        )
        if args.out:
            write(args.out, rows)


def rows_of(path):
    """The rows in the file, if versions and machine are those of now."""
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    there = {k: report[k] for k in ("versions", "machine")}
    if there != (here := about()):
        raise SystemExit(f"{path} was measured with {there}, here is {here}; give another --out")
    return report["rows"]


def write(path, rows):
    """Puts the rows into the file, in place of those of the same network, side, batch, dtype."""

    def key(row):
        return [row[k] for k in ("model", "side", "batch", "dtype")]

    kept = [row for row in rows_of(path) if all(key(row) != key(new) for new in rows)]
    path.write_text(json.dumps(about() | {"rows": kept + rows}, indent=1) + "\n")


def about():
    return {"versions": versions(), "machine": machine()}


def versions():
    names = [n for n in ("jax", "flax", "torch", "keras") if importlib.util.find_spec(n)]
    return {"python": platform.python_version()} | {n: version(n) for n in names}


def machine():
    """The accelerator if there is one, else the CPU with its widest vectors."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind}, {os.cpu_count()} CPU cores"
    cpu = Path("/proc/cpuinfo")
    facts = dict(re.findall(r"^([^:\t]+)\s*: (.+)$", cpu.read_text(), re.M)) if cpu.exists() else {}
    flags = facts.get("flags", "").split()
    vectors = next((f", {name}" for name in ("avx512f", "avx2") if name in flags), "")
    return f"{facts.get('model name', platform.processor())}{vectors}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
