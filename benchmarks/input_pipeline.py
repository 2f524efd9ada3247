"""Images per second of input pipelines, ours and others', alternating.

    python benchmarks/input_pipeline.py --dir FOLDER --sizes 224 112 --rounds 7

FOLDER has a sub-folder a class. Interpreters that have torchvision and tensorflow may be given with
--torch-python and --tf-python; by default it is this one. Also measures how fast the cache of
decoded images is built, and how fast CIFAR-10-sized images are gathered and augmented.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_step import machine


def main() -> None:
    """Prints a table, and JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 112])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--tf-python", default=sys.executable)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    packages = ("jax", "grain", "numpy", "opencv-python-headless", "pillow", "simplejpeg")
    results = {
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in packages},
        "rounds": args.rounds,
        "images_per_sec": {},
    }
    results["cache"] = cache_speed(args.dir, args.sizes[-1], args.rounds)
    for size in args.sizes:
        results["images_per_sec"][size] = row = compare(args, size)
        print(f"{size} px, median of {args.rounds} (min–max), images/s with two workers")
        base = row["torchvision"]["median"] if "torchvision" in row else None
        for name, r in row.items():
            ratio = f"{r['median'] / base:6.2f}× torchvision" if base else ""
            print(f"  {name:14} {r['median']:9,.0f} ({r['min']:,.0f}–{r['max']:,.0f}) {ratio}")
    results["resident"] = resident_speed(args.rounds)
    print(json.dumps({k: results[k] for k in ("cache", "resident")}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def compare(args: argparse.Namespace, size: int) -> dict[str, dict[str, float]]:
    """Median, least and most images per second of each pipeline."""
    root = Path(__file__).resolve().parents[1]
    tensorflow = dict.fromkeys(("tf.data", "tf.data, whole"), args.tf_python)
    python = {"torchvision": args.torch_python, **tensorflow}
    children = {}
    for name in ("ours", "torchvision", "tf.data", "tf.data, whole", "ours_cached"):
        command = [python.get(name, sys.executable), "-m", "benchmarks.input_peers"]
        child = subprocess.Popen(
            [*command, name, args.dir, str(size)], cwd=root, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if child.stdout.readline().strip() == "ready":
            children[name] = child
        else:
            print(f"{name} is not there")
    speeds: dict[str, list[float]] = {name: [] for name in children}
    for _ in range(args.rounds):
        for name, child in children.items():
            child.stdin.write("go\n")
            child.stdin.flush()
            seconds, count = child.stdout.readline().split()
            speeds[name].append(int(count) / float(seconds))
    for child in children.values():
        child.stdin.close()  # it ends, and removes its cache
    for child in children.values():
        child.wait()
    return {
        name: {"median": statistics.median(s), "min": min(s), "max": max(s)}
        for name, s in speeds.items()
    }


def cache_speed(directory: str, size: int, rounds: int) -> dict[str, float]:
    """Building the cache against decoding alone, images per second, alternating."""
    from classic_cnns.data import cache, folder
    from classic_cnns.data.preprocess import Preprocess

    images = folder.photos(Path(directory))[0]["all"].images
    preprocess = Preprocess((size, size, 3))
    decode: list[float] = []
    build: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        cache.decode_all(images, preprocess)
        decode.append(len(images) / (time.perf_counter() - start))
        target = Path(tempfile.mkdtemp())
        start = time.perf_counter()
        cache.open_cache(images, preprocess, target)
        build.append(len(images) / (time.perf_counter() - start))
        shutil.rmtree(target)
    ratios = [b / d for b, d in zip(build, decode, strict=True)]
    return {
        "decode": statistics.median(decode),
        "build": statistics.median(build),
        "ratio": statistics.median(ratios),
    }


def resident_speed(rounds: int) -> dict[str, float]:
    """Gather, crop, flip and normalise 32×32×3 images that live on the device, batches of 128."""
    import jax
    import numpy as np

    from classic_cnns.data.augment import normalize, random_crop, random_flip
    from classic_cnns.data.loaders import ResidentLoader
    from classic_cnns.data.splits import Split
    from classic_cnns.dispatch import fetch
    from classic_cnns.sharding import create_mesh

    images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    split = Split(images, np.zeros(50_000, np.int32))
    loader = ResidentLoader(split, 128, seed=0, mesh=create_mesh())

    @jax.jit
    def make(data, item, key):  # type: ignore[no-untyped-def]
        image = random_flip(key, random_crop(key, fetch(data, item)["image"], 4))
        return normalize(image, (0.5,) * 3, (0.25,) * 3)

    speeds = []
    for round in range(rounds + 1):
        start = time.perf_counter()
        for step in range(100):
            out = make(loader.data, loader.train(100 * round + step), jax.random.key(step))
        out.block_until_ready()
        speeds.append(12_800 / (time.perf_counter() - start))
    return {"images_per_sec": statistics.median(speeds[1:])}


if __name__ == "__main__":
    main()
