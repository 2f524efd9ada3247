"""PNGs of a run: the curves of its records, and a batch of its images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from classic_cnns.errors import printable

Records = list[dict[str, Any]]


def plot_curves(records: Records, path: Path, title: str) -> None:
    """Draws loss, accuracy and learning rate over epochs.

    Args:
        records: lines of metrics.jsonl; those with "eval_loss" are evaluations of val.
        path: of the PNG, replaced in one step.
        title: above the figure.
    """
    from matplotlib.figure import Figure

    # Fixed margins: a layout that measures all texts takes as long as the drawing.
    figure = Figure(figsize=(13, 4))
    figure.suptitle(title, parse_math=False)
    train = [r for r in records if "train_loss" in r and "eval_loss" not in r]
    evals = [r for r in records if "eval_loss" in r]
    margins = {"left": 0.055, "right": 0.99, "bottom": 0.13, "top": 0.89, "wspace": 0.22}
    panels = figure.subplots(1, 3, gridspec_kw=margins)
    for axes, name in zip(panels, ("loss", "accuracy"), strict=False):
        if train:
            axes.plot(
                [r["epoch"] for r in train],
                [r[f"train_{name}"] for r in train],
                alpha=0.35,
                label="train",
            )
        if evals:
            x, y = [r["epoch"] for r in evals], [r[f"eval_{name}"] for r in evals]
            axes.plot(x, [r[f"train_{name}"] for r in evals], color="C0", label="train, epoch mean")
            axes.plot(x, y, "o-", color="C1", markersize=3, label="val")
            if name == "accuracy":
                best = max(range(len(y)), key=y.__getitem__)
                axes.plot(
                    x[best],
                    y[best],
                    "*",
                    color="C3",
                    markersize=12,
                    label=f"best val {y[best]:.4f}",
                )
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    rates = train or evals
    panels[2].plot([r["epoch"] for r in rates], [r["learning_rate"] for r in rates], color="C2")
    panels[2].set(xlabel="epoch", ylabel="learning rate")
    panels[2].grid(alpha=0.3)
    _save(figure, path)


def plot_batch(images: np.ndarray, labels: Sequence[str], path: Path, title: str) -> None:
    """Draws up to 32 training images as the network sees them, before normalisation.

    Args:
        images: (N, H, W, C) with C = 1 or 3, uint8 or floats on the same scale.
        labels: what to write above each, see `batch_labels`.
        path: of the PNG, replaced in one step.
        title: above the figure.
    """
    from matplotlib.figure import Figure

    images = np.clip(np.round(np.asarray(images[:32])), 0, 255).astype(np.uint8)
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    # All in one pair of axes, in inches: a pair for each takes six times as long.
    side, gap, text = 1.5, 0.2, 0.4
    tall = side * images.shape[1] / images.shape[2]
    width, height = columns * (side + gap) + gap, rows * (tall + text) + text + gap
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, y=1 - 0.1 / height, parse_math=False)
    axes = figure.add_axes((0, 0, 1, 1))
    for i, (image, label) in enumerate(zip(images, labels, strict=False)):
        pixels = np.broadcast_to(image, (*image.shape[:2], 3)) if image.shape[2] == 1 else image
        left = gap + i % columns * (side + gap)
        top = height - 2 * text - i // columns * (tall + text)
        axes.imshow(pixels, interpolation="nearest", extent=(left, left + side, top - tall, top))
        lines = "\n".join(_short(line) for line in label.split("\n"))
        centre = left + side / 2
        axes.text(centre, top + 0.05, lines, ha="center", va="bottom", fontsize=7, parse_math=False)
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    _save(figure, path)


def plot_schedule(rates: np.ndarray, epochs: np.ndarray, path: Path, title: str) -> None:
    """Draws the learning rate over epochs.

    Args:
        rates, epochs: (N,) floats, of some steps in order.
        path: of the PNG, replaced in one step.
        title: above the figure.
    """
    from matplotlib.figure import Figure

    margins = {"left": 0.17, "right": 0.97, "bottom": 0.14, "top": 0.9}
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots(gridspec_kw=margins)
    axes.plot(epochs, rates, color="C2")
    axes.set(xlabel="epoch", ylabel="learning rate")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    _save(figure, path)


def batch_labels(batch: dict[str, Any], classes: Sequence[str]) -> list[str]:
    """Class names of a batch; of mixed images both, as in "0.70 cat" above "0.30 dog".

    Args:
        batch: "label" (N,) and, where images are mixed, "label2" and "share2" (N,).
        classes: names in the order of the labels.
    """
    classes = [printable(name) for name in classes]
    names = [classes[int(i)] for i in batch["label"]]
    if "label2" not in batch:
        return names
    shares = [float(s) for s in batch["share2"]]
    others = [classes[int(i)] for i in batch["label2"]]
    return [f"{1 - s:.2f} {a}\n{s:.2f} {b}" for a, b, s in zip(names, others, shares, strict=True)]


def plot_runs(runs: Sequence[tuple[str, Records]], path: Path) -> None:
    """Draws the validation curves of several runs over each other, and their training loss, thin.

    Args:
        runs: (name, lines of metrics.jsonl) of each.
        path: of the PNG, replaced in one step.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for number, (name, records) in enumerate(runs):
        color = f"C{number % 10}"
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        evals = [r for r in records if "eval_loss" in r]
        for axes, metric in zip(panels, ("loss", "accuracy"), strict=True):
            drawn = {"color": color, "linestyle": style}
            for key, rows in ((f"train_{metric}", records), (f"eval_{metric}", evals)):
                rows = [r for r in rows if key in r and "epoch" in r]
                x, y = [r["epoch"] for r in rows], [r[key] for r in rows]
                if key.startswith("eval"):
                    axes.plot(x, y, marker="o", markersize=3, **drawn)
                else:
                    axes.plot(x, y, alpha=0.3, linewidth=0.8, **drawn)
            axes.set(xlabel="epoch", ylabel=f"{metric} (val bold, train thin)")
        panels[0].plot([], [], label=name.removeprefix("_") or "run", color=color, linestyle=style)
    for axes in panels:
        axes.grid(alpha=0.3)
    legend = figure.legend(loc="outside lower center", ncols=min(4, len(runs)), fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, path)


def plot_range_test(
    rates: np.ndarray, losses: np.ndarray, smooth: np.ndarray, chosen: float, path: Path, title: str
) -> None:
    """Draws the loss over the learning rate, and where the suggestion is.

    Args:
        rates, losses, smooth: (N,) floats.
        chosen: the suggested rate.
        path: of the PNG, replaced in one step.
        title: above the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="C0", alpha=0.3, label="loss")
    axes.plot(rates, smooth, color="C0", label="smoothed")
    axes.axvline(chosen, color="C3", linestyle="--", label=f"suggestion {chosen:.2g}")
    low, high = float(smooth.min()), float(np.median(losses[:5]))
    axes.set_ylim(low - 0.1 * abs(high - low), high + 0.6 * abs(high - low) + 1e-6)
    axes.set(xscale="log", xlabel="learning rate of the whole batch", ylabel="training loss")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _short(label: str, most: int = 24) -> str:
    """What fits above an image."""
    return label if len(label) <= most else f"{label[: most - 1]}…"


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)
