"""A command starts itself again to get large pages, once, where they are to be had."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
from classic_cnns.large_pages import restart_with_large_pages
restart_with_large_pages(Path(sys.argv[1]))
print(os.environ.get("GLIBC_TUNABLES"), os.getpid(), *sys.argv[2:], sep="|")
"""


@pytest.mark.parametrize(
    ("setting", "before", "after"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "a.b=1", "a.b=1:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, "None"),
        (None, None, "None"),
    ],
)
def test_restart(tmp_path, setting, before, after):
    (tmp_path / "script.py").write_text(SCRIPT)
    if setting:
        (tmp_path / "enabled").write_text(setting)
    environ = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if before:
        environ["GLIBC_TUNABLES"] = before
    command = [
        sys.executable,
        "-W",
        "error",
        str(tmp_path / "script.py"),
        str(tmp_path / "enabled"),
    ]
    with subprocess.Popen(
        [*command, "two words", "", "--x=1"], env=environ, stdout=subprocess.PIPE, text=True
    ) as process:
        out = process.communicate()[0]
    assert process.returncode == 0
    assert out == f"{after}|{process.pid}|two words||--x=1\n"


def test_what_is_not_the_command_of_argv_goes_on(tmp_path):
    (tmp_path / "enabled").write_text("[madvise]")  # sys.argv is ['-c', …], as of no file
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "enabled")]
    environ = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    out = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    assert out.startswith("None|")
