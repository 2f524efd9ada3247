"""Errors that tell a person what is wrong and what to do; each kind has its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
