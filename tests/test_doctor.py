"""What the doctor finds on a sound machine, and on machines that are not."""

import errno
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from classic_cnns import cli, doctor
from classic_cnns.errors import ConfigError


def levels(findings):
    return {f.what: f.level for f in findings}


def test_this_machine_is_sound(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "LEAST_FREE", 0)
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok") for line in lines), lines
    assert any(f"8 × cpu: {jax.devices()[0].device_kind}" in line for line in lines)
    assert any(line.split()[1:3] == ["jax", jax.__version__] for line in lines)
    assert os.listdir(tmp_path) == []


def test_versions_are_compared_with_the_bounds(monkeypatch):
    installed = {"a": "1.10", "b": "2.0", "c": "0.9.9", "d": "1.0rc1"}

    def version(name):
        if name not in installed:
            raise doctor.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    lines = ["a>=1.9,<2", "b<2,>=1", "c>=0.10", "d>=1.0", "gone>=1", 'extra>=1; extra == "test"']
    assert levels(doctor.versions(lines)) == {
        "a": "ok",
        "b": "warning",
        "c": "error",
        "d": "ok",
        "gone": "error",
    }
    assert 'Fix: pip install "c>=0.10"' in doctor.versions(["c>=0.10"])[0].text


@pytest.mark.parametrize(
    ("platforms", "installed", "errors"),
    [
        ("", "", []),
        ("cpu", "", []),
        ("cpu", "jax-cuda12-plugin", []),  # the CPU is meant
        ("", "jax-cuda12-plugin", ["cuda"]),
        ("", "libtpu", ["tpu"]),
        ("cuda,cpu", "", ["cuda"]),
        ("tpu,cpu", "", ["tpu"]),
    ],
)
def test_an_absent_accelerator_is_an_error(monkeypatch, platforms, installed, errors):
    monkeypatch.setattr(doctor, "_is_installed", lambda name: name == installed)
    environ = {"JAX_PLATFORMS": platforms}
    assert [f.what for f in doctor.devices(environ) if f.level == "error"] == errors
    if errors:
        with pytest.raises(ConfigError, match=rf"{errors[0]}: .* JAX sees no {errors[0]}. Fix: "):
            doctor.check_devices(environ)
    else:
        doctor.check_devices(environ)


def test_a_platform_that_does_not_start_is_an_error(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    (finding,) = doctor.devices({"JAX_PLATFORMS": "cuda"})
    assert finding.level == "error"
    assert "JAX_PLATFORMS=cuda: Unable to initialize backend 'cuda'. Fix: " in finding.text


@pytest.mark.skipif(
    any(map(doctor._is_installed, doctor.ACCELERATORS["cuda"])), reason="JAX's CUDA package is here"
)
def test_a_platform_without_its_package_is_one_line():
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cuda"}
    run = functools.partial(subprocess.run, env=env, capture_output=True, text=True)
    done = run([sys.executable, "-m", "classic_cnns.cli", "doctor"])
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("error"))
    assert "JAX_PLATFORMS=cuda: " in line
    assert "Fix: pip install" in line
    assert done.returncode == 1, done.stderr
    for command in ("main.py",), ("-m", "classic_cnns.cli", "benchmark", "lenet5"):
        done = run([sys.executable, *command], cwd=Path(__file__).parents[1])
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("ERROR devices: JAX_PLATFORMS=cuda: ")
        assert done.stderr.count("\n") == 1


def test_wrong_arithmetic_is_noticed(monkeypatch):
    assert doctor.self_test().level == "ok"
    plain = np.einsum
    monkeypatch.setattr(np, "einsum", lambda *args: plain(*args) * 1.001)
    assert doctor.self_test().level == "error"


def test_directories_and_clock(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(doctor, "LEAST_FREE", 0)
    assert doctor.directory("x", tmp_path).text.startswith(f"{tmp_path}: 3 MB, ")
    assert doctor.directory("x", tmp_path / "not" / "yet").level == "ok"
    monkeypatch.setattr(doctor, "LEAST_FREE", 1 << 60)
    assert doctor.directory("x", tmp_path).level == "warning"

    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert "Read-only file system. Fix: " in doctor.directory("x", tmp_path).text

    now = doctor.time.time()
    assert doctor.clock(tmp_path, now).level == "ok"
    assert "differ by 3,6" in doctor.clock(tmp_path, now - 3600).text


def test_escapes_do_not_reach_the_terminal(capsys):
    assert "\x1b" not in doctor.render([doctor.Finding("ok", "x", "\x1b[31mred")])
    assert cli.main(["models", "\x1b[2Jnone"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_large_pages(tmp_path):
    file = tmp_path / "enabled"
    for setting, tunables, text in (
        ("always [madvise] never", "", "used by commands"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "declined by GLIBC_TUNABLES"),
        ("[always] madvise never", "", "used by commands"),
        ("always madvise [never]", "", "as root: echo madvise > "),
        (None, "", None),
    ):
        file.unlink(missing_ok=True)
        if setting:
            file.write_text(setting)
        found = doctor.large_pages({"GLIBC_TUNABLES": tunables}, file)
        assert [text in f.text for f in found] == [True] * bool(text)
