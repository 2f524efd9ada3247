"""What a person types, in a process of its own with one device."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import classic_cnns
from classic_cnns.logging import read_records

ROOT = Path(__file__).parents[2]


def shell(*args, cwd=ROOT, wait=True, **variables):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | variables
    command = [sys.executable, str(ROOT / "main.py"), *args]
    if not wait:
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.DEVNULL)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_default_job(tmp_path):
    done = shell(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1].removeprefix("RESULT "))
    assert result["test_accuracy"] >= 0.97
    assert result["workdir"] == str(tmp_path / "runs" / "lenet5-digits-1")
    assert (tmp_path / "runs" / "lenet5-digits-1" / "curves.png").exists()
    assert "Warning" not in done.stderr, done.stderr


def test_what_the_encoding_of_a_terminal_lacks_is_an_escape(tmp_path):
    done = shell("--config.num_steps=20", "--workdir=run", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"digits: 32\xd732\xd71, 10 classes" in done.stdout
    command = [sys.executable, "-m", "classic_cnns.cli", "summary", "lenet5", "--image-size=32"]
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=ascii, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert r"28\xd728\xd76" in done.stdout


def test_a_mistake_is_one_line_and_an_exit_code():
    """Others: tests/faults/test_messages.py."""
    done = shell("--config.optimizer.nmae=adam")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ERROR ")
    assert 'did you mean "optimizer.name"' in done.stderr
    assert done.stderr.count("\n") == 1


def test_killed_and_continued_is_the_same(tmp_path):
    """With every flag of the old script, and without TensorFlow, PyTorch and Keras."""
    for name in ("torch", "tensorflow", "keras"):  # there to be found; none of them is loaded
        (tmp_path / f"{name}.py").write_text("raise SystemError('loaded')")
    args = [
        "--config.model.name=resnet10",
        "--config.model.options.stage_sizes=(1,)",
        "--config.optimizer.name=nadam",
        "--config.optimizer.learning_rate=1e-3",
        "--config.batch_size=32",
        "--config.num_epochs=2",  # an int for a float
        "--config=configs/lenet5.py:fake",  # after the fields it is overridden in
        "--config.data.image_size=8",
        "--config.log_every_steps=3",
        "--config.checkpoint_every_steps=8",
        "--config.eval_every_steps=12",
    ]
    done = shell(*args, f"--workdir={tmp_path / 'a'}", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "a" / "config.json").read_text())
    assert saved["optimizer"]["name"] == "nadam"
    assert (saved["batch_size"], saved["num_epochs"]) == (32, 2.0)

    process = shell(*args, f"--workdir={tmp_path / 'b'}", wait=False)
    deadline = time.monotonic() + 200
    while not (tmp_path / "b" / "checkpoints" / "16").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    done = shell(*args, f"--workdir={tmp_path / 'b'}")
    assert done.returncode == 0, done.stderr
    assert "continuing at step" in done.stdout

    def files(name):
        manifest = json.loads(
            (tmp_path / name / "checkpoints" / "50" / "MANIFEST.json").read_text()
        )
        records = read_records(tmp_path / name / "metrics.jsonl")
        return manifest["notes"], [
            {k: v for k, v in r.items() if k not in ("images_per_sec", "input_wait")}
            for r in records
        ]

    assert files("a") == files("b")
    a, b = (classic_cnns.load(tmp_path / name, "latest").variables for name in "ab")
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("while_importing", ["absl", "jax", "flax"])
def test_ctrl_c_while_libraries_start(while_importing, tmp_path):
    script = f"""
import os, runpy, signal, sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == "{while_importing}":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests
sys.meta_path.insert(0, Interrupts())
sys.argv = [{str(ROOT / "main.py")!r}, "--workdir={tmp_path / "run"}"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "STOPPED by SIGINT before the training began\n"


def test_help_lists_the_flags():
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for text in ("python main.py --config=configs/resnet34.py", "--workdir", "--config.FIELD"):
        assert text in done.stdout
