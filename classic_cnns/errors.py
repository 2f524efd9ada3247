"""Errors that tell a person what is wrong and what to do; each kind has its exit code."""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
from collections.abc import Iterable
from pathlib import Path


class ClassicCNNsError(Exception):
    """Base of all errors this package raises on purpose. The message ends with a fix."""

    exit_code = 1


class ConfigError(ClassicCNNsError, ValueError):
    """A wrong name, field, type or combination of settings."""

    exit_code = 2


class DataError(ClassicCNNsError, ValueError):
    """Missing, damaged or contradictory data."""

    exit_code = 3


class WorkdirError(ClassicCNNsError, RuntimeError):
    """A run directory or checkpoint that cannot be used."""

    exit_code = 4


class NonFiniteError(ClassicCNNsError, ArithmeticError):
    """The loss or the gradients are no longer finite."""

    exit_code = 5


class DeviceMemoryError(ClassicCNNsError, MemoryError):
    """A step does not fit into the memory of the device."""

    exit_code = 6


class Stopped(ClassicCNNsError):
    """A training that ended early because it was asked to; what it did is saved.

    Args:
        message: why, at which step, and how to go on.
        exit_code: 129 after SIGHUP, 130 after Ctrl-C, 143 after SIGTERM or when the time was used
            up.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ClassicCNNsWarning(UserWarning):
    """Something that training goes on after and a person should know."""


def gone(directory: Path) -> WorkdirError:
    """The error for a directory that was there when the training began."""
    return WorkdirError(
        f"{directory} is gone: was it removed during the training? Fix: start again with another "
        "--workdir"
    )


def printable(text: str) -> str:
    """One line without control characters: names of files and classes may hold any.

    For example a line break becomes a space, and an escape sequence, which could repaint a
    terminal, its visible form \\x1b[….
    """
    text = text.replace("\r\n", " ").replace("\n", " ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_anything() -> None:
    """From here on what the terminal's encoding lacks is printed as an escape, such as \\xd7, where
    Python would raise an error. For the first line of a program.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # nobody reads it
                stream.reconfigure(errors="backslashreplace")


def describe(error: Exception) -> str:
    """What a terminal shows of an error: lines without control characters, for names in files may
    hold any.
    """
    if isinstance(error, Stopped):
        text = f"STOPPED {error}"
    elif isinstance(error, ClassicCNNsError):
        text = f"ERROR {error}"
    else:
        workdir = getattr(error, "workdir", None)
        where = f"see {workdir / 'traceback.txt'}" if workdir else "run again with --debug"
        what = f"{type(error).__name__}: {str(error)[:500]}".replace("\n", " ")
        text = f"ERROR unexpected {what}. Fix: {where} and report it"
    return "\n".join(map(printable, text.split("\n")))


def nearest(name: str, names: Iterable[str]) -> str:
    """A clause that offers the valid names closest to a wrong one.

    Args:
        name: what was asked for.
        names: what exists.

    Returns:
        For example 'did you mean "resnet34"?', or the list of all names when none is near.
    """
    names = list(names)
    lower = {n.lower(): n for n in reversed(names)}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f'"{lower[c]}"' for c in close) + "?"
    return "use one of " + ", ".join(names)
