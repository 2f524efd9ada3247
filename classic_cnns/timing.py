"""Where the time of a run went, and how fast its training is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from classic_cnns.models.lowering import slow_in_loops

PARTS = ("useful", "lost", "save", "data_wait", "compile", "eval", "other")
DISPATCH_SECONDS = 2.0
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def dispatch_sizes(asked: int, resident: bool, impl: str) -> tuple[int, int]:
    """The most steps in one call of the device, and the room for steps of a program that takes any
    number of them, or 0.

    Args:
        asked: `config.steps_per_dispatch`.
        resident: whether the images live on the device; streamed ones are trained on step by step.
        impl: of the network's convolutions.
    """
    if not resident or slow_in_loops(impl):
        return 1, 0
    most = asked or 16
    # A loop of a length that the compiler knows is faster on a GPU, and processes that each go by
    # their own clock would not agree on a length.
    return most, most if jax.default_backend() == "cpu" and jax.process_count() == 1 else 0


class Stopwatch:
    """Charges every moment to one of `PARTS`, so that they add up to the wall time.

    "useful" is training; "lost" is training that a kill or a rollback undid; "save" is how long the
    training waited for a checkpoint; "other" is starting, logging and plotting.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "other", time.monotonic()
        self._compiled: set[int] = set()

    def go_on(self, saved: Mapping[str, Any], alive: float) -> None:
        """Adds what the run's earlier processes took.

        Args:
            saved: of the manifest of the checkpoint that this one starts from.
            alive: when the last of those processes last gave a sign of life.
        """
        with contextlib.suppress(KeyError, TypeError, ValueError):  # of a malformed manifest
            for part in PARTS:
                self._seconds[part] += float(saved["seconds"].get(part, 0))
            self._seconds["lost"] += max(0.0, alive - float(saved["at"]))

    def to(self, part: str) -> None:
        """What follows is charged to this part."""
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def to_training(self, program: int) -> None:
        """What follows is training by a program, the first time also compiling it."""
        self.to("useful" if program in self._compiled else "compile")
        self._compiled.add(program)

    @contextlib.contextmanager
    def charge(self, part: str) -> Iterator[None]:
        """What is inside is charged to this part."""
        before = self._part
        self.to(part)
        try:
            yield
        finally:
            self.to(before)

    @contextlib.contextmanager
    def watching_compilation(self) -> Iterator[None]:
        """Charges to "compile" what XLA takes for it, wherever it happens."""

        def move(event: str, duration_secs: float, **_: str | int) -> None:
            if event == COMPILE_EVENT and self._part != "compile":
                self._seconds["compile"] += duration_secs
                self._seconds[self._part] -= duration_secs

        jax.monitoring.register_event_duration_secs_listener(move)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(move)

    def read(self) -> dict[str, float]:
        """Seconds of every part until now."""
        self.to(self._part)
        return dict(self._seconds)


def summarize(seconds: Mapping[str, float]) -> str:
    """One line for people: "time 63.2 s: 81 % useful, …"."""
    total = sum(seconds.values())
    shares = [f"{value / total:.1%} {name}" for name, value in seconds.items() if value > 0]
    return f"time       {total:,.1f} s: " + ", ".join(shares).replace("_", " ")


class Clock:
    """Speed of the training alone: compiling, evaluating and saving do not count."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._compiled: set[int] = set()
        self._steps, self._ahead, self._seconds, self._wait = 0, 0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self, program: int, result: Any) -> Iterator[None]:
        """Around the fetching of input for a dispatch of a program; `result` is that of the one
        before.

        Steps are dispatched ahead of the device. While it still computes, nobody waits. The first
        dispatch of a program compiles it, so the clock stands still from here until its `count`.
        """
        if program not in self._compiled:
            if self._compiled:
                jax.block_until_ready(result)
                self.pause()
            yield
            return
        start = time.perf_counter()
        yield
        if all(leaf.is_ready() for leaf in jax.tree.leaves(result)):
            self._wait += time.perf_counter() - start

    def count(self, steps: int, program: int, result: Any) -> None:
        """After `steps` more were dispatched; the first call of a program waits for their result,
        which does not count, and starts the clock.
        """
        if program in self._compiled:
            self._steps, self._ahead = self._steps + steps, steps
        else:
            jax.block_until_ready(result)
            self.restart(new_epoch=not self._compiled)
            self._compiled.add(program)

    def steps(self, left: int, most: int, room: int) -> int:
        """Steps of the next dispatch, of `left` until something else is to be done. A program with
        `room` takes as many as lately took two seconds, so that signals are heard; others take
        `most` or one.
        """
        if not room:
            return most if left >= most else 1
        waited_for = self._steps - self._ahead
        taken = self._seconds + time.perf_counter() - self._start if waited_for else 1.0
        return min(left, most, max(1, int(DISPATCH_SECONDS * waited_for / taken)))

    def read(self) -> dict[str, float]:
        """Images per second, and the largest share of time that the device may have waited for
        input, since the epoch began.
        """
        if not self._steps:
            return {}
        return {
            "images_per_sec": self._steps * self.batch_size / self._seconds,
            "input_wait": self._wait / self._seconds,
        }

    def pause(self) -> None:
        """What follows does not count, until `restart`."""
        self._seconds += time.perf_counter() - self._start

    def restart(self, new_epoch: bool) -> None:
        """Counts again, from nothing at a new epoch."""
        self._start = time.perf_counter()
        self._ahead = 0
        if new_epoch:
            self._steps, self._seconds, self._wait = 0, 0.0, 0.0
