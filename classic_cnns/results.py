"""The table of results: one row a network and dataset, kept as results/results.json."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from classic_cnns import rundir
from classic_cnns.errors import ConfigError, nearest

Row = dict[str, Any]

SLACK = 0.002  # of accuracy: what a handful of seeds may not have shown
SLACK_OF_ONE = 0.015  # and one seed shows nothing of the spread


def read(path: Path) -> dict[str, Row]:
    """The rows by name.

    A row has "config" (FILE.py:DATASET), "data", "overrides" (further flags), "seeds" and, once it
    is measured, "accuracy" (of each seed, on the test split), "epochs", "seconds" (the median),
    "images_per_sec" (while training; the median over epochs and seeds), "hardware", "versions" and
    "log"; and perhaps a "note", in words.

    Raises:
        WorkdirError: missing or malformed.
    """
    return rundir.read_json(path)


def write(path: Path, table: dict[str, Row]) -> None:
    """Replaces the file."""
    rundir.write_json(path, table)


def find(table: dict[str, Row], name: str) -> Row:
    """A measured row.

    Raises:
        ConfigError: there is none of that name, or it has not been measured.
    """
    if name not in table:
        raise ConfigError(f'no row "{name}" in the results. Fix: {nearest(name, table)}')
    if not table[name].get("accuracy"):
        raise ConfigError(f'"{name}" has no result yet. Fix: benchmarks/train_results.py {name}')
    return table[name]


def accuracies(summaries: Sequence[Row]) -> list[float]:
    """On the test split, of each result.json."""
    return [round(summary["test_accuracy"], 5) for summary in summaries]


def with_measurements(
    row: Row,
    summaries: Sequence[Row],
    info: Row,
    curves: Sequence[Path],
    *,
    hardware: str,
    log: str,
    epochs: float,
) -> Row:
    """The row with what its trainings found.

    Args:
        row: with its recipe.
        summaries: result.json of each seed.
        info: run.json of the first.
        curves: metrics.csv of each seed.
        hardware: in words.
        log: directory of the curves.
        epochs: length of the training.
    """
    return row | {
        "accuracy": accuracies(summaries),
        "epochs": epochs,
        "seconds": round(statistics.median(sum(s["goodput"].values()) for s in summaries), 1),
        "images_per_sec": training_speed(curves),
        "hardware": hardware,
        "versions": {"python": info["python"]} | info["versions"],
        "log": log,
    }


def training_speed(curves: Sequence[Path]) -> float:
    """Images a second while training, the median over all lines of these metrics.csv."""
    values = []
    for path in curves:
        with path.open(newline="") as file:
            values += [float(line["images_per_sec"]) for line in csv.DictReader(file)]
    return round(statistics.median(values), 1)


def band(row: Row) -> tuple[float, float]:
    """Where the accuracy of another training of a row should be: three deviations around the mean.

    At least `SLACK` to each side; `SLACK_OF_ONE` where there is one seed.
    """
    mean = statistics.mean(row["accuracy"])
    several = len(row["accuracy"]) > 1
    width = max(SLACK, 3 * deviation(row["accuracy"])) if several else SLACK_OF_ONE
    return mean - width, mean + width


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def page(table: dict[str, Row]) -> str:
    """The text of docs/results.md."""
    lines = [
        "# Results",
        "",
        "Made by `benchmarks/train_results.py` from",
        "[results/results.json](../results/results.json); do not edit. The epoch is chosen on",
        "validation images, the test split is evaluated once. Accuracy is the mean over seeds ±",
        "the sample standard deviation. `classic-cnns reproduce ROW` trains a row again and says",
        "whether it is inside three deviations (at least 0.2 points; 1.5 of a single seed).",
        "`images_set` stands for Imagenette, ten classes of ImageNet: 8,522 photos to train on,",
        "947 to validate, 3,925 to test.",
        "",
        "| row | test accuracy | seeds | epochs | wall time of one | images/s | hardware | recipe "
        "| curves |",
        "|---|---:|---:|---:|---:|---:|---|---|---|",
    ]
    for name, row in table.items():
        recipe = f"`{' '.join((row['config'], *row['overrides']))}`"
        recipe += f", {row['note']}" if "note" in row else ""
        values = row.get("accuracy")
        if not values:
            lines.append(f"| {name} | not measured | | | | | | {recipe} | |")
            continue
        spread = f" ± {100 * deviation(values):.2f}" if len(values) > 1 else ""
        accuracy = f"{100 * statistics.mean(values):.2f}{spread} %"
        lines.append(
            f"| {name} | {accuracy} | {len(values)} | {row['epochs']:g} | {row['seconds']:,.0f} s "
            f"| {row['images_per_sec']:,.0f} | {row['hardware']}, jax {row['versions']['jax']} "
            f"| {recipe} | [{row['log']}](../{row['log']}) |"
        )
    return "\n".join(lines) + "\n"
