"""TensorBoard event files."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any


class Events:
    """A TensorBoard event file, written at once: tensorboardX's SummaryWriter pickles events into a
    queue, and hangs for ever when the disk is full.

    Args:
        directory: a new file in it is made at the first record.
        purge_step: TensorBoard forgets what older files in it say from this step on.
    """

    def __init__(self, directory: Path, purge_step: int | None) -> None:
        self._directory, self._purge_step = directory, purge_step
        self._writer: Any = None

    def write(self, record: dict[str, Any]) -> None:
        """Adds the metrics of a record; after an error, the next call begins a new file.

        Means over an epoch, of the records of evaluations, are named "epoch_train_…". What those
        repeat of the record before, which is of the same step, is left out.
        """
        events_writer, event_pb2, summary = _tensorboardx()
        writer, self._writer = self._writer, None
        if writer is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            writer = events_writer(str(self._directory / "events"), f".{os.getpid()}")
            if self._purge_step is not None:
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                writer.write_event(
                    event_pb2.Event(wall_time=time.time(), step=self._purge_step, session_log=start)
                )
        for name, value in _scalars(record).items():
            scalar = summary.scalar(name, value)
            event = event_pb2.Event(wall_time=time.time(), step=record["step"], summary=scalar)
            writer.write_event(event)
        writer.flush()
        self._writer = writer

    def close(self) -> None:
        """Closes the file."""
        if self._writer:
            self._writer.close()


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    values = {k: v for k, v in record.items() if not isinstance(v, list)}
    if "eval_loss" not in values:
        return {k: v for k, v in values.items() if k not in ("step", "epoch")}
    means = {f"epoch_{k}": values[k] for k in ("train_loss", "train_accuracy") if k in values}
    return {**means, **{k: v for k, v in values.items() if k.startswith(("eval_", "ema_eval_"))}}


def _tensorboardx() -> tuple[Any, Any, Any]:
    """Parts of tensorboardX without PyTorch, which it loads where it is installed and does not need
    here.
    """
    loaded = "torch" in sys.modules
    if not loaded:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes the import fail
    try:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
    finally:
        if not loaded:
            del sys.modules["torch"]
    return EventsWriter, event_pb2, summary
