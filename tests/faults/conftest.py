"""Fixtures of the fault tests."""

import fcntl

import lab as lab_module
import pytest


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    return lab_module.Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def whole_run(lab, tmp_path_factory):
    """The directory of the small training, never interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    lab_module.CACHE.mkdir(exist_ok=True)
    with (lab_module.CACHE / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the first of several workers compiles
        code, output = lab.run(workdir, timeout=200)
    assert code == 0, output
    return workdir


@pytest.fixture(scope="session")
def whole(whole_run):
    """Its outcome."""
    return lab_module.outcome(whole_run)
