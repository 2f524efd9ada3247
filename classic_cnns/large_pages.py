"""Large memory pages for a process that computes on the CPU."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # Linux: who gets them
TUNABLE = "glibc.malloc.hugetlb"  # of glibc, from 2.35 on


def given_on_request(setting: Path = SETTING) -> bool:
    """Whether this system gives large pages to those who ask, not to all or none."""
    try:
        return "[madvise]" in setting.read_text()
    except OSError:
        return False


def restart_with_large_pages(setting: Path = SETTING) -> None:
    """Starts the command of this process again, with the same process number, asking for them.

    glibc looks at GLIBC_TUNABLES at the start of a process alone. A training step takes its memory
    from the system and gives it back, which in pages of 2 MiB, not 4 KiB, makes it up to a fifth
    shorter (docs/performance.md). For the first line of a program. Nothing is done where
    GLIBC_TUNABLES has a `glibc.malloc.hugetlb` (0 declines), where nobody has to ask, and in a
    process that is not the command of `sys.argv`, such as a notebook's.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    command = sys.orig_argv[-len(sys.argv) :] == sys.argv
    if TUNABLE in tunables or not command or not sys.executable or not given_on_request(setting):
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{TUNABLE}=1")))
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
