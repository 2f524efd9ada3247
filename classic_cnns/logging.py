"""What is seen of a training: files of metrics, a progress bar, a table of epochs."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from classic_cnns.plots import plot_curves

Record = dict[str, Any]

COLUMNS = (
    ("epoch", "{:8.2f}"),
    ("train_loss", "{:10.4f}"),
    ("train_accuracy", "{:14.4f}"),
    ("eval_loss", "{:9.4f}"),
    ("eval_accuracy", "{:13.4f}"),
    ("learning_rate", "{:13.6f}"),
    ("images_per_sec", "{:14,.0f}"),
    ("input_wait", "{:10.1%}"),
)


class MetricFiles:
    """metrics.jsonl and what is drawn from it: metrics.csv, curves.png, TensorBoard events.

    Args:
        workdir: of the run.
        step: the step training starts from; records after it, left by a killed run, are removed.
        title: of the figure.
    """

    def __init__(self, workdir: Path, step: int, title: str) -> None:
        self.workdir, self.title = workdir, title
        path = workdir / "metrics.jsonl"
        self.records = [r for r in read_records(path) if r["step"] <= step]
        temporary = path.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        os.replace(temporary, path)
        self._file = path.open("a")
        self._events = _summary_writer()(
            str(workdir / "tensorboard"), purge_step=step + 1 if step else None
        )

    def write(self, record: Record) -> None:
        """Appends one record ("step", "epoch" and metrics) to metrics.jsonl and TensorBoard."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name not in ("step", "epoch") and not isinstance(value, list):
                self._events.add_scalar(name, value, record["step"])

    def draw(self) -> None:
        """Rewrites metrics.csv (one row an evaluation) and curves.png."""
        rows = [r for r in self.records if "eval_loss" in r]
        if rows:
            with (self.workdir / "metrics.csv").open("w", newline="") as file:
                names = [k for k, v in rows[0].items() if not isinstance(v, list)]
                writer = csv.DictWriter(file, names, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        if self.records:
            plot_curves(self.records, self.workdir / "curves.png", self.title)
        self._events.flush()

    def __enter__(self) -> MetricFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._events.close()


def _summary_writer() -> Any:
    """tensorboardX without PyTorch, which it loads where it is installed and does not need here."""
    loaded = "torch" in sys.modules
    if not loaded:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes the import fail
    try:
        from tensorboardX import SummaryWriter
    finally:
        if not loaded:
            del sys.modules["torch"]
    return SummaryWriter


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Display:
    """A progress bar on a terminal, plain lines elsewhere (pipes, notebooks), and a table of
    epochs.
    """

    def __init__(self, total_steps: int, mode: Literal["auto", "plain"] = "auto") -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        live = mode == "auto" and self.console.is_terminal and not self.console.is_jupyter
        self.total = total_steps
        self._headed = False
        self._last_line = self._last_update = time.monotonic()
        self._bar: Progress | None = None
        if live:
            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total_steps, status="compiling")

    def print(self, text: str) -> None:
        """A line of text as it is."""
        self.console.print(text, markup=False)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, step: int) -> None:
        """Shows the bar, if there is one."""
        self._start_step, self._start_time = step, time.monotonic()
        if self._bar:
            self._bar.start()
            self._bar.update(self._task, completed=step)

    def advance(self, step: int) -> None:
        """Moves the bar, at most ten times a second."""
        if self._bar and time.monotonic() - self._last_update > 0.1:
            self._last_update = time.monotonic()
            self._bar.update(self._task, completed=step)

    def status(self, record: Record) -> None:
        """Newest loss, accuracy and speed; without a bar, a line every ten seconds."""
        speed = record.get("images_per_sec")
        text = (
            f"loss {record['train_loss']:.4f}  accuracy {record['train_accuracy']:.4f}"
            f"{f'  {speed:,.0f} images/s' if speed else ''}"
        )
        if self._bar:
            self._bar.update(self._task, completed=record["step"], status=text)
        elif time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            left = time.strftime("%H:%M:%S", time.gmtime(self._seconds_left(record["step"])))
            self.print(f"step {record['step']}/{self.total}  {text}  {left} left")

    def epoch(self, record: Record, best: bool) -> None:
        """One row of the table; a star marks the best so far."""
        if not self._headed:
            self.print(" ".join(f"{name:>{len(spec.format(0))}}" for name, spec in COLUMNS))
            self._headed = True
        self._last_line = time.monotonic()
        cells = [
            spec.format(record[name]) if name in record else " " * len(spec.format(0))
            for name, spec in COLUMNS
        ]
        self.print(" ".join(cells) + (" *" if best else ""))

    def _seconds_left(self, step: int) -> float:
        done = step - self._start_step
        return (time.monotonic() - self._start_time) / max(1, done) * (self.total - step)

    def stop(self) -> None:
        """Takes the bar away."""
        if self._bar:
            self._bar.stop()


def decoding_bar(text: str, total: int) -> Callable[[int], None]:
    """A bar for the time before training, on a terminal only; goes when it is full."""
    bar = Progress(
        TextColumn(text),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not Console().is_terminal,
    )
    task = bar.add_task("", total=total)
    lock = threading.Lock()
    bar.start()

    def advance(count: int) -> None:
        with lock:
            bar.advance(task, count)
            if bar.finished:
                bar.stop()

    return advance


def advice(record: Record, loaders: dict[str, Any]) -> list[str]:
    """What a person should know after an epoch: slow input, images that were skipped."""
    lines = []
    wait = record.get("input_wait", 0.0)
    if wait > 0.05 and not loaders["train"].data:
        lines.append(
            f"WARNING {wait:.0%} of the time went to waiting for images. Fix: "
            "--config.data.cache=default decodes each once, data.loader=resident keeps them all"
        )
    for name, loader in loaders.items():
        if loader.bad:
            some = "; ".join(f"{n!r}: {r}" for n, r in sorted(loader.bad.items())[:5])
            lines.append(f"WARNING {len(loader.bad)} images of {name} are skipped: {some}")
    return lines


class Clock:
    """Speed of the training alone: compiling, evaluating and saving do not count."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._compiled = False
        self._images, self._seconds, self._wait = 0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetching of input."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def count(self, steps: int, result: Any) -> None:
        """After `steps` more were dispatched; the first call waits for their result and starts the
        clock.
        """
        if self._compiled:
            self._images += steps * self.batch_size
        else:
            jax.block_until_ready(result)
            self._compiled = True
            self.restart(new_epoch=True)

    def read(self) -> dict[str, float]:
        """Images per second, and the share of time spent on input, since the epoch began."""
        if not self._images:
            return {}
        return {
            "images_per_sec": self._images / self._seconds,
            "input_wait": self._wait / self._seconds,
        }

    def pause(self) -> None:
        """What follows does not count, until `restart`."""
        self._seconds += time.perf_counter() - self._start

    def restart(self, new_epoch: bool) -> None:
        """Counts again, from nothing at a new epoch."""
        self._start = time.perf_counter()
        if new_epoch:
            self._images, self._seconds, self._wait = 0, 0.0, 0.0
