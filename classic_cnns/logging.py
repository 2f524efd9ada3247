"""What is seen of a training: files of metrics, a progress bar, a table of epochs."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from classic_cnns.errors import ClassicCNNsWarning, gone, printable
from classic_cnns.events import Events
from classic_cnns.plots import plot_curves
from classic_cnns.progress import create_console
from classic_cnns.rundir import replace_file

if TYPE_CHECKING:
    from classic_cnns.metrics import TrainMetrics

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

    A disk that is full or a figure that cannot be drawn is a warning; what could not be written is
    kept and written later.

    Args:
        workdir: of the run.
        step: the step training starts from; records after it, left by a killed run, are removed.
        title: of the figure.
    """

    def __init__(self, workdir: Path, step: int, title: str) -> None:
        self.workdir, self.title = workdir, title
        self._path = workdir / "metrics.jsonl"
        self.records = [r for r in read_records(self._path) if r["step"] <= step]
        self._file: IO[str] | None = None  # None while the file lacks records
        self._events = Events(workdir / "tensorboard", step + 1 if step else None)
        self._warned: set[str] = set()
        self._next_drawing = 0.0  # by time.monotonic
        with self._trying("metrics.jsonl"):
            self._rewrite()

    def _rewrite(self) -> None:
        lines = "".join(json.dumps(r) + "\n" for r in self.records)
        replace_file(self._path, lines.encode())
        self._file = self._path.open("a")

    def write(self, record: Record) -> None:
        """Appends one record ("step", "epoch" and metrics) to metrics.jsonl and TensorBoard."""
        self.records.append(record)
        with self._trying("metrics.jsonl"):
            if self._file is None:
                self._rewrite()
            else:
                file, self._file = self._file, None
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before a checkpoint that is newer
                self._file = file
        with self._trying("tensorboard"):
            self._events.write(record)

    def draw(self, *, always: bool = True) -> None:
        """Rewrites metrics.csv (one row an evaluation) and curves.png.

        Args:
            always: False passes over this time where drawing would take more than a twentieth of
                the run.
        """
        began = time.monotonic()
        if not always and began < self._next_drawing:
            return
        rows = [r for r in self.records if "eval_loss" in r]
        if rows:
            with self._trying("metrics.csv"):
                text = io.StringIO(newline="")
                names = {k: None for row in rows for k, v in row.items() if not isinstance(v, list)}
                writer = csv.DictWriter(
                    text, list(names), extrasaction="ignore", lineterminator="\n"
                )
                writer.writeheader()
                writer.writerows(rows)
                replace_file(self.workdir / "metrics.csv", text.getvalue().encode())
        if self.records:
            with self._trying("curves.png"):
                plot_curves(self.records, self.workdir / "curves.png", self.title)
        now = time.monotonic()
        self._next_drawing = now + 19 * (now - began)

    @contextlib.contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        """Turns an error into a warning, the first time."""
        try:
            yield
        except Exception as error:
            if not self.workdir.is_dir():
                raise gone(self.workdir) from error
            if what not in self._warned:
                self._warned.add(what)
                warnings.warn(
                    f"{self.workdir / what} cannot be written: {error}; training goes on, and it "
                    "is tried again",
                    ClassicCNNsWarning,
                    stacklevel=2,
                )

    def __enter__(self) -> MetricFiles:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            if self._file:
                self._file.close()
        with contextlib.suppress(OSError):
            self._events.close()


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl up to the first that is none, as one that a kill cut short."""
    records: list[Record] = []
    if not path.is_file():
        return records
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            if type(record["step"]) is not int or not all(map(_is_number, record.values())):
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        records.append(record)
    return records


def _is_number(value: Any) -> bool:
    if isinstance(value, list):  # recall of each class, None for one without examples
        return all(v is None or _is_number(v) for v in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Display:
    """A progress bar on a terminal, plain lines elsewhere (pipes, notebooks), and a table of
    epochs.

    Args:
        total_steps: of the training.
        compiling: seconds that went into compiling until now, which the time that is left leaves
            out.
        mode: "plain" shows no bar on a terminal either.
    """

    def __init__(
        self,
        total_steps: int,
        compiling: Callable[[], float] = lambda: 0.0,
        mode: Literal["auto", "plain"] = "auto",
    ) -> None:
        self.console = create_console()
        live = mode == "auto" and self.console.is_terminal
        self.total, self._compiling = total_steps, compiling
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
        """A line of text, its control characters made visible."""
        self.console.print(printable(text), markup=False)

    def print_all(self, lines: Sequence[str]) -> None:
        """Each a line of text."""
        for text in lines:
            self.print(text)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, step: int) -> None:
        """Shows the bar; without one, a line says what the time until the first step goes into."""
        self._start_step, self._start_time, self._started = step, self._useful(), False
        if self._bar:
            self._bar.start()
            self._bar.reset(self._task, completed=step)
        elif step < self.total:
            self.print("compiling  the training step")

    def advance(self, step: int, metrics: TrainMetrics | None = None) -> None:
        """Moves the bar, at most ten times a second; without one, a line every 30 seconds.

        After 30 seconds without news, the loss and accuracy of `metrics` until now are shown.
        """
        import jax

        now = time.monotonic()
        if not self._started:  # the first steps compile; what is left is told by those after them
            self._start_step, self._start_time, self._started = step, self._useful(), True
            if self._bar:
                self._bar.update(self._task, status="")
        if self._bar and now - self._last_update > 0.1:
            self._last_update = now
            self._bar.update(self._task, completed=step)
        if now - self._last_line > 30:
            seen: Any = jax.device_get(metrics)
            self._step(step, _losses(seen.summary()) if seen and seen.loss.count else "")

    def status(self, record: Record) -> None:
        """Newest loss, accuracy and speed; without a bar, a line every ten seconds."""
        means = {name: record[f"train_{name}"] for name in ("loss", "accuracy")}
        speed = record.get("images_per_sec")
        text = _losses(means) + (f"  {speed:,.0f} images/s" if speed else "")
        if self._bar or time.monotonic() - self._last_line > 10:
            self._step(record["step"], text)

    def _step(self, step: int, text: str = "") -> None:
        self._last_line = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=step)
            if text:
                self._bar.update(self._task, status=text)
            return
        text = text and f"  {text}"
        if done := step - self._start_step:
            seconds = (self._useful() - self._start_time) / done * (self.total - step)
            clock = time.strftime(":%M:%S", time.gmtime(seconds))
            text += f"  {int(seconds) // 3600:02}{clock} left"
        self.print(f"step {step}/{self.total}{text}")

    def _useful(self) -> float:
        return time.monotonic() - self._compiling()

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

    def stop(self) -> None:
        """Takes the bar away."""
        if self._bar:
            self._bar.stop()


def _losses(means: Mapping[str, float]) -> str:
    return f"loss {means['loss']:.4f}  accuracy {means['accuracy']:.4f}"
