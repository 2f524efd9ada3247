"""Trainings over a grid of settings and seeds: which there are, and what came of them."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from classic_cnns import rundir
from classic_cnns.errors import ConfigError, WorkdirError

Point = tuple[tuple[str, str], ...]  # ((field, value), …)


def parse_grid(texts: Sequence[str]) -> list[Point]:
    """All combinations of "FIELD=VALUE,VALUE,…" texts, the last field fastest.

    Raises:
        ConfigError: a text that is not of this form, or a field given twice.
    """
    axes = []
    for text in texts:
        field, equals, values = text.partition("=")
        choices = re.split(r",(?![^()\[\]{}]*[)\]}])", values)  # not at commas inside brackets
        if not (field and equals and all(choices)) or len(set(choices)) < len(choices):
            raise ConfigError(
                f"--grid {text}: not FIELD=VALUE,VALUE,… . Fix: "
                "--grid optimizer.learning_rate=0.01,0.1, say"
            )
        axes.append([(field, value) for value in choices])
    fields = [axis[0][0] for axis in axes]
    if len(set(fields)) < len(fields) or "seed" in fields:
        raise ConfigError("--grid names a field twice, or the seed. Fix: once each; --seeds=0-2")
    return list(itertools.product(*axes))


def parse_seeds(text: str) -> list[int]:
    """Seeds of "0-2", "0,1,2" or both.

    Raises:
        ConfigError: not of this form, or none.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"--seeds {text}: not seeds. Fix: --seeds=0-2 or --seeds=0,1,2")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(seeds))


def name_of(point: Point, seed: int) -> str:
    """Name of a run's directory: "learning_rate=0.1_seed=0"."""
    parts = [f"{field.rsplit('.', 1)[-1]}={value}" for field, value in point]
    return re.sub(r"[^\w.=+-]", "-", "_".join([*parts, f"seed={seed}"]))


def finished(workdir: Path, config: dict[str, Any], free: Sequence[str]) -> dict[str, Any] | None:
    """The summary of a run that is complete; None where there is something to train.

    Args:
        workdir: of the run.
        config: that it should have been trained with, flat.
        free: fields that may differ.

    Raises:
        WorkdirError: it was trained with another config.
    """
    from classic_cnns.config import flatten

    if not (workdir / "result.json").exists():
        return None
    saved = flatten(rundir.read_json(workdir / "config.json"))
    differ = [k for k in sorted(saved | config) if saved.get(k) != config.get(k) and k not in free]
    if differ:
        raise WorkdirError(
            f"{workdir} was trained with another {', '.join(differ)}. Fix: another --out"
        )
    return rundir.read_json(workdir / "result.json")


def table(points: Sequence[Point], summaries: dict[Point, list[dict[str, Any] | None]]) -> str:
    """Mean and sample standard deviation of the validation accuracy of each combination.

    Of a run that keeps averages of its weights those count where validation prefers them. A star
    marks the best mean, whose test accuracy is below the table; a summary that is None
    stands for a training that failed: it diverged, or a step did not fit into memory.
    """
    fields = [field for field, _ in points[0]]
    widths = [max(len(f), *(len(dict(p)[f]) for p in points)) for f in fields]
    head = "  ".join(f"{f:>{w}}" for f, w in zip(fields, widths, strict=True))
    lines, best = [f"{head}  {'best val':>15}  seeds"], None
    for point in points:
        done = [s for s in summaries[point] if s]
        values = [_counted(s, "val") for s in done]
        whole = len(done) == len(summaries[point])
        if whole and (best is None or statistics.mean(values) > best[0]):
            best = statistics.mean(values), point
    for point in points:
        done = [s for s in summaries[point] if s]
        cells = "  ".join(f"{v:>{w}}" for (_, v), w in zip(point, widths, strict=True))
        text = mean_and_spread([_counted(s, "val") for s in done])
        bad = len(summaries[point]) - len(done)
        star = " *" if best and best[1] == point else ""
        lines.append(
            f"{cells}  {text:>15}  {len(done)}{f', {bad} failed' if bad else ''}{star}".rstrip()
        )
    if best:
        done = [s for s in summaries[best[1]] if s and "test_accuracy" in s]
        tests = [_counted(s, "test") for s in done]
        if tests:
            lines.append(f"* test accuracy {mean_and_spread(tests)}")
    return "\n".join(lines)


def _counted(summary: dict[str, Any], split: str) -> float:
    """The accuracy of the weights, or of their averages if they are better in validation."""
    averaged = summary.get("ema_val_accuracy", -1.0) > summary["val_accuracy"]
    return summary[f"{'ema_' * averaged}{split}_accuracy"]


def mean_and_spread(values: Sequence[float]) -> str:
    """For example "0.9123 ± 0.0045"; the mean alone of one value, "–" of none."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"
