"""Training from the images on, beside PyTorch and Keras: read, augment, step; alternating.

    python benchmarks/end_to_end.py lenet5 --steps 390 --rounds 7
    python benchmarks/end_to_end.py resnet18 --folder PHOTOS --side 112 --batch 64 --steps 30

Without --folder: 50,000 uint8 images of 32 px in memory, padded crops and flips. With it, a folder
with a sub-folder a class: files are decoded while training, random-resized crops and flips. Each
peer is a process of its own and does what its users do: ours augments on the device; PyTorch, eager
and through torch.compile, in the two workers of a DataLoader; Keras 3 on JAX, in `fit` with layers
for it (arrays, LeNet-5 and ResNet-18 alone). SGD with Nesterov momentum 0.9. Parameter counts are
asserted equal. Each round starts the input anew, so that nothing has been read ahead. Peers are
left out where --peer-python has no torch or keras.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
from train_step import machine

COUNT, WORKERS, MEAN, STD = 50_000, 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def arrays():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (COUNT, 32, 32, 3), np.uint8), np.arange(COUNT, dtype=np.int32) % 10


def ours(args, classes):
    """A function of the number of steps, and the number of parameters; so are the others."""
    import jax
    import optax

    from classic_cnns import create_model
    from classic_cnns.data import folder
    from classic_cnns.data.augment import create_augment
    from classic_cnns.data.loaders import create_loader
    from classic_cnns.data.preprocess import Preprocess
    from classic_cnns.data.splits import Split
    from classic_cnns.dispatch import JitStep, Progress, train_on
    from classic_cnns.sharding import create_mesh, replicate
    from classic_cnns.steps import train_step
    from classic_cnns.timing import dispatch_sizes
    from classic_cnns.train_state import create_train_state

    mesh, shape = create_mesh(), (args.side, args.side, 3)
    split = folder.photos(Path(args.folder))[0]["all"] if args.folder else Split(*arrays())
    loader = create_loader(
        split, args.batch, seed=0, mesh=mesh, preprocess=Preprocess(shape), crop_scale=(0.08, 1.0),
        workers=WORKERS,
    )  # fmt: skip
    augment = create_augment(flip="random", crop_padding=0 if args.folder else 4)
    model, tx = create_model(args.network, classes), optax.sgd(0.01, 0.9, nesterov=True)
    step = functools.partial(train_step, model=model, tx=tx, mean=MEAN, std=STD, augment=augment)
    most, room = dispatch_sizes(0, resident=not args.folder, impl="auto")
    train = JitStep(functools.partial(train_on, step=step), loops=room > 0)
    state = create_train_state(model, tx, shape, seed=0, mesh=mesh)
    tree = [state, replicate(Progress.empty(), mesh)]

    def run(steps):
        number = 0
        while number < steps:
            count = min(most, steps - number) if room else 1
            tree[:] = train(*tree, loader.data, loader.train(number, count, room))
            number += count
        jax.block_until_ready(tree)

    return run, sum(p.size for p in jax.tree.leaves(state.params))


def torch_peer(args, classes, compiled):
    import torch
    from torch_peers import torch_model
    from torchvision import datasets, transforms

    class InMemory(torch.utils.data.Dataset):
        """As torchvision's CIFAR10."""

        def __init__(self, transform):
            self.images, self.labels = arrays()
            self.transform = transform

        def __len__(self):
            return COUNT

        def __getitem__(self, number):
            image = transforms.functional.to_pil_image(self.images[number])
            return self.transform(image), int(self.labels[number])

    crop = [transforms.RandomCrop(32, 4, padding_mode="reflect")]
    if args.folder:
        crop = [transforms.RandomResizedCrop(args.side)]
    finish = [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    transform = transforms.Compose([*crop, *finish, transforms.Normalize(MEAN, STD)])
    data = datasets.ImageFolder(args.folder, transform) if args.folder else InMemory(transform)
    loader = torch.utils.data.DataLoader(
        data, args.batch, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True
    )
    model = torch_model(args.network, classes, args.side).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
    forward = torch.compile(model) if compiled else model

    def run(steps):
        done = 0
        while done < steps:
            for images, labels in loader:
                optimizer.zero_grad()
                out = forward(images.contiguous(memory_format=torch.channels_last))
                torch.nn.functional.cross_entropy(out, labels).backward()
                optimizer.step()
                done += 1
                if done == steps:
                    break

    return run, sum(p.numel() for p in model.parameters())


def keras_peer(args, classes):
    from keras_peers import NETWORKS, keras_model, layers

    assert args.network in NETWORKS
    images, labels = arrays()
    before = (
        layers.RandomFlip("horizontal"),
        layers.RandomTranslation(4 / 32, 4 / 32, fill_mode="reflect", interpolation="nearest"),
        layers.Rescaling(1 / 57.0, -2.1),
    )
    model, parameters = keras_model(args.network, classes, (32, 32, 3), before)

    def run(steps):
        count = steps * args.batch
        model.fit(images[:count], labels[:count], batch_size=args.batch, shuffle=True, verbose=0)

    return run, parameters


PEERS = {
    "ours": ours,
    "torch eager": functools.partial(torch_peer, compiled=False),
    "torch compile": functools.partial(torch_peer, compiled=True),
    "keras": keras_peer,
}


def child(args):
    """One peer, on demand: a number of steps on a line of its input, seconds on its output."""
    classes = len([p for p in Path(args.folder).iterdir() if p.is_dir()]) if args.folder else 10
    run, count = PEERS[args.peer](args, classes)
    run(3)
    print("ready", count, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        run(int(line))
        print(time.perf_counter() - start, flush=True)


def start(name, args):
    """The process of a peer, and its number of parameters; None where it cannot be."""
    if name == "keras" and args.folder:
        return None
    python = sys.executable if name == "ours" else args.peer_python
    settings = [f"--{k}={getattr(args, k)}" for k in ("side", "batch", "folder")]
    process = subprocess.Popen(
        [python, __file__, args.network, "--peer", name, *settings], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None if args.verbose else
        subprocess.DEVNULL,
    )  # fmt: skip
    words = process.stdout.readline().split()
    if words[:1] != ["ready"]:
        print(f"{name} is not there")
        return None
    return process, int(words[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network")
    parser.add_argument("--folder", default="")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer", choices=list(PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="show what peers complain about")
    parser.add_argument("--json", type=Path, help="rows of other networks in it are kept")
    args = parser.parse_args()
    if args.peer:
        return child(args)
    started = {name: found for name in PEERS if (found := start(name, args))}
    counts = {name: count for name, (_, count) in started.items()}
    assert len(set(counts.values())) == 1, f"parameters {counts}"
    times = {name: [] for name in started}
    for _ in range(args.rounds):
        for name, (process, _) in started.items():
            process.stdin.write(f"{args.steps}\n")
            process.stdin.flush()
            times[name].append(float(process.stdout.readline()))
    images = args.steps * args.batch
    row = {
        "steps": args.steps,
        "rounds": args.rounds,
        "parameters": counts["ours"],
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in ("jax", "grain", "optax")},
        "images_per_sec": {n: images / statistics.median(t) for n, t in times.items()},
        "ours_over": {
            name: statistics.median(b / a for a, b in zip(times["ours"], t, strict=True))
            for name, t in times.items()
        },
    }
    key = f"{args.network}, {args.side} px, batch {args.batch}, {'files' if args.folder else 'RAM'}"
    print(f"{key}; median of {args.rounds} rounds of {args.steps} steps")
    for name, speed in row["images_per_sec"].items():
        print(f"  {name:14}{speed:10,.0f} images/s   ours is {row['ours_over'][name]:.2f} times it")
    if args.json:
        rows = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(rows | {key: row}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
