"""curves.png: what a training did, redrawn from its records."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


def plot_curves(records: Records, path: Path, title: str) -> None:
    """Draws loss, accuracy and learning rate over epochs.

    Args:
        records: lines of metrics.jsonl; those with "eval_loss" are evaluations of val.
        path: of the PNG, replaced in one step.
        title: above the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    train = [r for r in records if "train_loss" in r and "eval_loss" not in r]
    evals = [r for r in records if "eval_loss" in r]
    panels = figure.subplots(1, 3)
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
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)
