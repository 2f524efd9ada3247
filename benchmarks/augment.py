"""Augmentations on the device against torchvision's, pixel by pixel, and what each costs.

    python benchmarks/augment.py --dir FOLDER --torch-python PYTHON --json FILE

FOLDER has a sub-folder a class; of its first eight, one photo each is squashed to 112 px. Every
operation gets the same uint8 photos and the same parameters here and in torchvision.transforms.v2
(bilinear resizing with anti-aliasing, affine maps to the nearest pixel, black outside), which runs
in the interpreter PYTHON. Differences are in grey levels of 0…255. The times are of this library
alone: one jitted call on 128 images of 32 px, all operations in turn in every round.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PHOTOS, SIDE = 8, 112
BATCH, SMALL = 128, 32

# Parameters of every operation that is compared; all of them for all photos.
_FACTORS = (0.0, 0.1, 0.45, 0.73, 1.0, 1.27, 1.9)
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "brightness": _FACTORS,
    "contrast": _FACTORS,
    "saturation": _FACTORS,
    "sharpness": _FACTORS,
    "hue": (-0.5, -0.2, -0.05, 0.0, 0.1, 0.33),
    "posterize": (1, 2, 4, 7, 8),
    "solarize": (0.0, 63.75, 128.0, 178.5, 255.0),
    "autocontrast": (None,),
    "equalize": (None,),
    "shear_x": (-0.99, -0.3, -0.09, 0.0, 0.2, 0.7),  # pixels per pixel
    "shear_y": (-0.99, -0.3, -0.09, 0.0, 0.2, 0.7),
    "translate_x": (-32, -5, 0, 1, 50),  # pixels
    "translate_y": (-32, -5, 0, 1, 50),
    "rotate": (-135.0, -30.0, -9.0, 0.0, 4.5, 45.0, 90.0),  # degrees
    "erase": ((0, 0, 20, 30), (60, 90, 52, 22), (13, 40, 7, 61)),  # top, left, height, width
    "resized_crop": ((0, 0, 112, 112), (10, 20, 30, 40), (5, 3, 100, 97), (50, 50, 56, 56)),
}


def main() -> None:
    """Prints a table, and JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer(*args.peer)
        return
    if args.dir is None:
        parser.error("--dir FOLDER is needed")
    from benchmarks.train_step import machine

    photos = read(args.dir)
    differences, versions = compare(photos, args.torch_python)
    times = measure(args.rounds)
    print(f"{'':14} {'mean':>8} {'max':>4} {'differ':>8}   of {len(photos)} photos at {SIDE} px")
    for name, row in differences.items():
        print(f"{name:14} {row['mean']:8.5f} {row['max']:4d} {row['share']:8.4%}")
    print(f"\n{BATCH} images of {SMALL} px, ms, median of {args.rounds} (min–max)")
    for name, row in times.items():
        print(f"{name:22} {row['median']:7.2f} ({row['min']:.2f}–{row['max']:.2f})")
    versions |= {"python": sys.version.split()[0], "jax": metadata.version("jax")}
    print(f"\n{machine()}, {versions}")
    if args.json:
        results = {
            "machine": machine(), "versions": versions, "rounds": args.rounds,
            "difference_in_grey_levels": differences, "ms_per_batch": times,
        }  # fmt: skip
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def read(directory: Path) -> np.ndarray:
    """(photos, SIDE, SIDE, 3) uint8: the first photo of each class."""
    from PIL import Image

    folders = sorted(p for p in directory.iterdir() if p.is_dir())[:PHOTOS]
    files = [min(p for p in folder.iterdir() if p.is_file()) for folder in folders]
    return np.stack([np.asarray(Image.open(f).convert("RGB").resize((SIDE, SIDE))) for f in files])


# ---- the same operations in both libraries


def our_operations() -> dict[str, Callable[..., Any]]:
    """Functions of a batch (N, H, W, 3) and a parameter of `PARAMETERS`."""
    import jax.numpy as jnp

    from classic_cnns.data import colour, geometry

    def affine(x, matrix):  # type: ignore[no-untyped-def]
        return geometry.affine(x, jnp.asarray(np.stack([matrix] * len(x))))

    def box(x, values):  # type: ignore[no-untyped-def]
        return (jnp.full(len(x), v, jnp.int32) for v in values)

    def erase(x, p):  # type: ignore[no-untyped-def]
        hole = geometry.rectangle(x.shape[1], x.shape[2], *box(x, p))
        return jnp.where(hole[..., None], jnp.zeros((), x.dtype), x)

    colours = ("brightness", "contrast", "saturation", "sharpness", "hue", "posterize", "solarize")
    return {name: getattr(colour, name) for name in colours} | {
        "autocontrast": lambda x, _: colour.autocontrast(x),
        "equalize": lambda x, _: colour.equalize(x),
        "shear_x": lambda x, p: affine(x, geometry.shear(p, 0, *x.shape[1:3])),
        "shear_y": lambda x, p: affine(x, geometry.shear(0, p, *x.shape[1:3])),
        "translate_x": lambda x, p: affine(x, geometry.translation(p, 0)),
        "translate_y": lambda x, p: affine(x, geometry.translation(0, p)),
        "rotate": lambda x, p: affine(x, geometry.rotation(p)),
        "erase": erase,
        "resized_crop": lambda x, p: geometry.resize_box(x, *box(x, p), SIDE, SIDE),
    }


def their_operations() -> dict[str, Callable[..., Any]]:
    """Functions of a batch (N, 3, H, W) and a parameter of `PARAMETERS`."""
    import torch
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    def affine(x, shear=(0, 0), shift=(0, 0)):  # type: ignore[no-untyped-def]
        # About the top left, as RandAugment and TrivialAugmentWide call it.
        degrees = [math.degrees(math.atan(s)) for s in shear]
        return F.affine(
            x, angle=0.0, translate=list(shift), scale=1.0, shear=degrees,
            interpolation=InterpolationMode.NEAREST, center=[0, 0] if any(shear) else None,
        )  # fmt: skip

    return {
        "brightness": F.adjust_brightness,
        "contrast": F.adjust_contrast,
        "saturation": F.adjust_saturation,
        "sharpness": F.adjust_sharpness,
        "hue": F.adjust_hue,
        "posterize": F.posterize,
        "solarize": F.solarize,
        "autocontrast": lambda x, _: F.autocontrast(x),
        "equalize": lambda x, _: F.equalize(x),
        "shear_x": lambda x, p: affine(x, shear=(p, 0)),
        "shear_y": lambda x, p: affine(x, shear=(0, p)),
        "translate_x": lambda x, p: affine(x, shift=(p, 0)),
        "translate_y": lambda x, p: affine(x, shift=(0, p)),
        "rotate": lambda x, p: F.rotate(x, p, InterpolationMode.NEAREST),
        "erase": lambda x, p: F.erase(x, *p, torch.zeros(3, 1, 1, dtype=torch.uint8)),
        "resized_crop": lambda x, p: F.resized_crop(x, *p, [SIDE, SIDE], antialias=True),
    }


def peer(source: str, target: str) -> None:
    """Torchvision's results for the photos in one file, into another."""
    import torch
    import torchvision

    photos = torch.from_numpy(np.load(source)).permute(0, 3, 1, 2).contiguous()
    operations = their_operations()
    out = {
        name: torch.stack([operations[name](photos, p) for p in parameters])
        .permute(0, 1, 3, 4, 2)
        .numpy()
        for name, parameters in PARAMETERS.items()
    }
    np.savez(target, **out)
    print(json.dumps({"torch": torch.__version__, "torchvision": torchvision.__version__}))


def compare(photos: np.ndarray, python: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Mean and largest difference, and the share of values that differ; torch's versions."""
    operations = our_operations()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "photos.npy"), Path(folder, "peer.npz")
        np.save(source, photos)
        command = [python, __file__, "--peer", str(source), str(target)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        theirs = dict(np.load(target))
    rows = {}
    for name, parameters in PARAMETERS.items():
        ours = np.stack([operations[name](photos, p) for p in parameters])
        distance = np.abs(ours.astype(int) - theirs[name])
        by_parameter = {
            str(p): {"mean": float(d.mean()), "max": int(d.max())}
            for p, d in zip(parameters, distance, strict=True)
        }
        rows[name] = {
            "mean": float(distance.mean()), "max": int(distance.max()),
            "share": float((distance > 0).mean()), "by_parameter": by_parameter,
        }  # fmt: skip
    return rows, json.loads(done.stdout)


# ---- times


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each augmentation, jitted, on one batch."""
    import jax
    import jax.numpy as jnp

    from classic_cnns.data import augment, colour

    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (BATCH, SMALL, SMALL, 3), np.uint8)),
        "label": jnp.zeros(BATCH, jnp.int32),
        "index": jnp.arange(BATCH, dtype=jnp.int32),
        "epoch": jnp.zeros(BATCH, jnp.int32),
    }
    settings: dict[str, dict[str, Any]] = {
        "random_resized_crop": {"random_resized_crop": (0.08, 1.0)},
        "random_crop": {"crop_padding": 4},
        "random_flip": {"flip": "random"},
        "alternating_flip": {"flip": "alternating"},
        "randaugment": {"auto_augment": "randaugment"},
        "trivialaugment": {"auto_augment": "trivialaugment"},
        "color_jitter": {"color_jitter": (0.4, 0.4, 0.4, 0.1)},
        "random_erasing": {"random_erasing": 0.25},
        "random_erasing, pixel": {"random_erasing": 0.25, "erasing_mode": "pixel"},
        "cutout": {"cutout_size": 16},
        "mixup": {"mixup_alpha": 0.2},
        "cutmix": {"cutmix_alpha": 1.0},
    }
    calls = {name: jax.jit(augment.create_augment(**s)) for name, s in settings.items()}
    strengths = jnp.linspace(0.1, 0.4, BATCH)
    for name in ("brightness", "contrast", "saturation", "sharpness", "hue"):
        call = getattr(colour, name)
        calls[name] = jax.jit(lambda key, b, call=call: call(b["image"], strengths))
    for name in ("autocontrast", "equalize"):
        call = getattr(colour, name)
        calls[name] = jax.jit(lambda key, b, call=call: call(b["image"]))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(rounds + 2):  # two for compilation and warm-up
        key = jax.random.key(round)
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(key, batch))
            if round > 1:
                times[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
        for name, t in times.items()
    }


if __name__ == "__main__":
    main()
