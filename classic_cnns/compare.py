"""Several runs side by side: a table, what their configs differ in, and their curves in one PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from classic_cnns import rundir
from classic_cnns.config import flatten
from classic_cnns.errors import WorkdirError, printable
from classic_cnns.logging import read_records
from classic_cnns.saved import SavedCheckpoints

COLUMNS = ("run", "model", "data", "params", "epochs", "best val", "test", "time", "images/s")
PLAIN, AVERAGED = "eval_accuracy", "ema_eval_accuracy"
WHERE = ("data.dir", "data.cache", "data.workers")  # differ without changing what is computed


def read_run(workdir: Path) -> dict[str, Any]:
    """What is known of a run, whatever state it is in.

    Args:
        workdir: of the run.

    Returns:
        {"name", "config" (flat), "records", "row" (one text for each of `COLUMNS`), "note"}; note
        is "" for a finished run without averages.

    Raises:
        WorkdirError: there is no config or no metric to read.
    """
    config = flatten(rundir.read_json(workdir / "config.json"))
    records = [
        {k: v for k, v in record.items() if not isinstance(v, list)}  # without recall by class
        for record in read_records(workdir / "metrics.jsonl")
    ]
    if not records:
        raise WorkdirError(f"{workdir} has no metrics. Fix: train for an epoch")
    result, note = _optional(workdir / "result.json"), ""
    if not result:
        note = f"not finished, at step {records[-1]['step']}"
    evals = {name: [r[name] for r in records if name in r] for name in (PLAIN, AVERAGED)}
    plain, averaged = (max(values, default=None) for values in evals.values())
    better = plain is not None and averaged is not None and averaged > plain
    speeds = sorted(r["images_per_sec"] for r in records if "images_per_sec" in r)
    name = printable(workdir.resolve().name)
    row = (
        name,
        str(config.get("model.name", "?")),
        str(config.get("data.source", "?")),
        _number(_parameters(workdir), ",d"),
        _number(records[-1].get("epoch"), ".4g"),
        _number(averaged if better else plain, ".4f"),
        _number(result.get("ema_test_accuracy" if better else "test_accuracy"), ".4f"),
        _number(result.get("seconds"), ",.0f", " s"),
        _number(speeds[len(speeds) // 2] if speeds else None, ",.0f"),
    )
    if better:
        note = "; ".join(filter(None, (note, "accuracies are those of the averaged weights")))
    return {"name": name, "config": config, "records": records, "row": row, "note": note}


def _parameters(workdir: Path) -> int | None:
    """Counted from the shapes that the newest checkpoint's manifest lists; None without one."""
    checkpoints = SavedCheckpoints(workdir / "checkpoints")
    try:
        shapes = checkpoints.manifest(checkpoints.steps()[-1])["shapes"]
        found = [v for k, v in shapes.items() if k.startswith("state/params/")]
        return sum(math.prod(map(int, re.findall(r"\d+", v.split("(")[1]))) for v in found)
    except (WorkdirError, IndexError, KeyError, TypeError, AttributeError):
        return None


def _optional(path: Path) -> dict[str, Any]:
    try:
        return rundir.read_json(path)
    except WorkdirError:
        return {}


def _number(value: Any, spec: str, unit: str = "") -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–"
    return format(value, spec) + unit if abs(value) < 1e15 else "–"


def compare(workdirs: Sequence[Path], out: Path) -> list[str]:
    """Draws the curves of runs into `out` and describes the runs.

    Args:
        workdirs: of the runs; those that cannot be read are named and left out.
        out: the PNG.

    Returns:
        Lines for people, without control characters.

    Raises:
        WorkdirError: none of them can be read, or `out` cannot be written.
    """
    from classic_cnns.plots import plot_runs

    runs, problems = [], []
    for workdir in workdirs:
        try:
            runs.append(read_run(workdir))
        except WorkdirError as error:
            problems.append(f"left out   {error}")
    if not runs:
        raise WorkdirError("; ".join(p.removeprefix("left out   ") for p in problems))
    try:
        plot_runs([(run["name"], run["records"]) for run in runs], out)
    except OSError as error:
        raise WorkdirError(f"{out}: {error.strerror}. Fix: --out=FILE.png") from error
    lines = _table([COLUMNS, *(run["row"] for run in runs)])
    lines += [f"{run['name']}: {run['note']}" for run in runs if run["note"]]
    lines += _differences(runs) + problems + [f"curves: {out}"]
    return [printable(line) for line in lines]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = 3  # columns of text
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _differences(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the fields that are not the same in all configs."""
    fields = dict.fromkeys(name for run in runs for name in run["config"] if name not in WHERE)
    rows = []
    for name in fields:
        values = [str(run["config"].get(name, "–")) for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    if not rows:
        return ["the configs are the same"] if len(runs) > 1 else []
    return ["", *_table([["differs in", *(run["name"] for run in runs)], *rows]), ""]
