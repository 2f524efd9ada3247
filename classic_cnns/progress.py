"""Where is printed, and a progress bar for what takes time before training."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def create_console() -> Console:
    """Where a training prints: a terminal, or plain lines elsewhere.

    In a notebook each line, and each moment of a bar, would be an output that is kept; also below
    its "!", which is told by what its kernel has from the server.
    """
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_jupyter and "JPY_PARENT_PID" not in os.environ:
        return console
    return Console(highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=False)


def decoding_bar(text: str, total: int) -> Callable[[int], None]:
    """A bar for the time before training, on a terminal only; goes when it is full."""
    console = create_console()
    bar = Progress(
        TextColumn(text),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
        console=console,
        disable=not console.is_terminal,
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
