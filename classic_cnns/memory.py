"""How much memory there is for this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

# Files of a control group of version 2 and 1: the limit, what is used, and in its statistics the
# parts of that which only cache files.
_VERSIONS = {
    2: ("memory.max", "memory.current", ("active_file", "inactive_file")),
    1: (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
}


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had, those that only cache files included, of the machine and of the
    container or job (control group) that this process is in; 2⁶² where Linux is not there to say.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 62
    return max(0, min([int(found.split()[1]) * 1024, *_rooms(root)]))


def _rooms(root: Path) -> Iterator[int]:
    """Bytes below each limit of the groups of this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for number, kinds, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
        if number != "0" and "memory" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if number != "0" else "")
        limit, used, caches = _VERSIONS[1 if number != "0" else 2]
        group = top / path.lstrip("/")
        # Inside a container the path may be that of the host, and only the top be there.
        for folder in (group, *(p for p in group.parents if p.is_relative_to(top))):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                room = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                yield room + sum(int(stat.get(key, 0)) for key in caches)
