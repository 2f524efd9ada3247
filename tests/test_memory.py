"""Free memory, of a machine and within the limits of containers and jobs."""

import os
from pathlib import Path

import pytest

from classic_cnns.memory import free_memory

GB = 1 << 30
STAT = (
    "anon 5\nactive_file {0}\ninactive_file {0}\ntotal_active_file {0}\ntotal_inactive_file {0}\n"
)


def write(root, groups, files):
    texts = {
        "proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {32 << 20} kB\n",
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("", {}, 32),
        ("0::/\n", {}, 32),
        # Version 2: 16 GB for the job, of which 10 are in use, 4 of them only caching files.
        (
            "0::/user/job\n",
            {
                "memory.stat": STAT.format(9),  # the root has no limit
                "user/memory.max": "max",
                "user/memory.current": 10 * GB,
                "user/memory.stat": STAT.format(2 * GB),
                "user/job/memory.max": 16 * GB,
                "user/job/memory.current": 10 * GB,
                "user/job/memory.stat": STAT.format(2 * GB),
            },
            10,
        ),
        # The limit of a group above it is lower.
        (
            "0::/user/job\n",
            {
                "user/memory.max": 8 * GB,
                "user/memory.current": 6 * GB,
                "user/memory.stat": STAT.format(0),
                "user/job/memory.max": "max",
                "user/job/memory.current": GB,
                "user/job/memory.stat": STAT.format(0),
            },
            2,
        ),
        # Version 1, in a container that sees the path of the host.
        (
            "12:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/\n",
            {
                "memory/memory.limit_in_bytes": 4 * GB,
                "memory/memory.usage_in_bytes": GB,
                "memory/memory.stat": STAT.format(0),
                "cpu/memory.limit_in_bytes": 0,
            },
            3,
        ),
        # No limit is a large number there, and the machine itself has less.
        (
            "4:memory:/\n",
            {
                "memory/memory.limit_in_bytes": 2**63 - 4096,
                "memory/memory.usage_in_bytes": GB,
                "memory/memory.stat": STAT.format(0),
            },
            32,
        ),
        # More in use than is allowed, for a moment.
        (
            "0::/\n",
            {"memory.max": GB, "memory.current": 2 * GB, "memory.stat": STAT.format(0)},
            0,
        ),
    ],
)
def test_limits_of_groups(groups, files, free, tmp_path):
    write(tmp_path, groups, files)
    assert free_memory(tmp_path) == free * GB


def test_without_linux_nothing_is_known(tmp_path):
    assert free_memory(tmp_path) == 1 << 62


def test_of_this_machine():
    if not Path("/proc/meminfo").exists():
        assert free_memory() == 1 << 62
    else:
        assert 0 < free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
