"""When to stop a training: on SIGTERM, on Ctrl-C, when its terminal goes, or its time is used up.

A signal only sets a mark, which the training looks at between two steps and between two batches of
an evaluation; it then saves and leaves. A thread reads the signals, so that also while compiling,
which cannot be interrupted, a second one quits at once and the grace is kept.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from classic_cnns.errors import Stopped

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds in which the same signal again is no second one: timeout(1), for example, sends it to the
# process and once more to its group.
ECHO = 0.5


class Stop:
    """Whether to stop.

    Args:
        grace: seconds after a signal; then the process ends, saved or not.
        deadline: of `time.monotonic`; infinity = none.

    Attributes:
        reserve: seconds that saving and plotting take, which must end before the deadline.
    """

    def __init__(self, grace: float, deadline: float) -> None:
        self.grace, self.deadline = grace, deadline
        self.reserve = 1.0
        self.signal: signal.Signals | None = None
        self._again = False
        self._late = False
        self._pace = 0.0
        self._looked = time.monotonic()
        # A second Ctrl-C in a notebook must not take the kernel, and all its variables, away.
        self.interactive = "ipykernel" in sys.modules or hasattr(sys, "ps1")

    def requested(self) -> bool:
        """True from the first signal on, or when what may follow would end after the deadline.

        To be called often: the time between two calls, the longest lately, is what may follow.
        """
        now = time.monotonic()
        self._pace = max(now - self._looked, 0.9 * self._pace)
        self._looked = now
        self._late |= now + self._pace + self.reserve > self.deadline
        return self.signal is not None or self._late

    def stopped(self, step: int, total: int) -> Stopped:
        """The exception to raise once everything is saved."""
        why = self.signal.name if self.signal else "the end of max_seconds"
        return Stopped(
            f"at step {step:,} of {total:,} by {why}; everything is saved, and the same command "
            "with the same --workdir continues",
            128 + (self.signal or signal.SIGTERM),
        )

    def _on_signal(self, number: int, frame: object) -> None:
        """In the main thread: as long after the signal as it was in a library, once for several."""
        if self.interactive:
            time.sleep(0.05)  # the thread, which tells an echo from a second signal, goes first
            if self._again:
                raise KeyboardInterrupt

    def _listen(self, pipe: socket.socket) -> None:
        """Reads signals until the other end is closed."""
        end, number, first = None, signal.SIGTERM, 0.0
        while True:
            pipe.settimeout(None if end is None else max(0.0, end - time.monotonic()))
            try:
                received = pipe.recv(1)
            except (TimeoutError, BlockingIOError):
                _quit(f"the grace of {self.grace:g} s is over before everything was saved", number)
            if not received:
                return
            if received[0] not in WATCHED:
                continue
            if self.signal == received[0] and time.monotonic() - first < ECHO:
                continue
            if self.signal and not self.interactive:
                _quit("a second signal", number)
            self._again = self.signal is not None
            number, first = signal.Signals(received[0]), time.monotonic()
            if not self.interactive:
                end = time.monotonic() + self.grace
            self.signal = number
            _say(f"{number.name}: finishing the step and saving; once more to quit at once")


@contextlib.contextmanager
def watch(grace: float = 25.0, deadline: float = float("inf")) -> Iterator[Stop]:
    """A `Stop` that SIGTERM, SIGINT and, unless nohup ignores it, SIGHUP set; outside the main
    thread only the deadline does.
    """
    stop = Stop(grace, deadline)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    listener = threading.Thread(target=stop._listen, args=(ours,), daemon=True, name="signals")
    before = {
        number: signal.signal(number, stop._on_signal)
        for number in WATCHED
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    listener.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        theirs.close()
        listener.join()
        ours.close()


def leave_on_interrupt() -> None:
    """From here on Ctrl-C ends the process at once, with exit code 130, until `watch` sees to it.

    For the first line of a program: an interrupt while a library starts would be swallowed there,
    or be taken for another mistake.
    """

    def leave(number: int, frame: object) -> NoReturn:
        _say("STOPPED by SIGINT before the training began")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)


def _quit(why: str, number: int) -> NoReturn:
    _say(f"ERROR stopped by {why}: the last complete checkpoint stays. Fix: --grace=SECONDS")
    os._exit(128 + number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone is no reason to lose a run
        print(text, file=sys.stderr, flush=True)
