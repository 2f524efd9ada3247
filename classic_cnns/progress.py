"""Progress bars for what takes time outside of training."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def decoding_bar(text: str, total: int) -> Callable[[int], None]:
    """A bar for the time before training, on a terminal only; goes when it is full."""
    bar = Progress(
        TextColumn(text),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not Console().is_terminal or "JPY_PARENT_PID" in os.environ,  # see Display
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
