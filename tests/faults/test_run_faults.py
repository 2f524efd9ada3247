"""Cases 10 to 15, 21 to 31 and 55: trainings that are killed, stopped, copied and continued."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lab import SMALL, Fault, crawl, freeze_at_step, kill_at_step, outcome

from classic_cnns import failures, resume
from classic_cnns.checkpoints import Checkpoints
from classic_cnns.data.sources import fake
from classic_cnns.errors import ClassicCNNsWarning, NonFiniteError, WorkdirError
from classic_cnns.logging import read_records
from classic_cnns.mirror import _update, fetch
from classic_cnns.saved import SavedCheckpoints


def kill(step):
    return functools.partial(kill_at_step, step)


def freeze(step):
    return functools.partial(freeze_at_step, step)


def steps(workdir):
    return SavedCheckpoints(workdir / "checkpoints").steps()


def test_case14_case15_case21_case22_killed_again_and_again(lab, whole, tmp_path):
    """At a step with a second writer about, in a save, in a deletion; then to the end."""
    run = tmp_path / "run"
    first = lab.start(run, before=freeze(7))
    first.when(first.frozen)
    start = time.monotonic()
    code, output = lab.run(run)
    assert code == 4
    assert time.monotonic() - start < 10
    assert f"{run} is in use by pid {first.process.pid} on" in output
    first.signal(signal.SIGKILL)
    assert first.end() == -9
    assert steps(run) in ([], [5])  # it froze while it saved that in the background
    assert lab.run(run, before=Fault("*/checkpoints/.tmp-10/*", 4).install)[0] == -9
    assert steps(run)[-1] == 8
    assert lab.run(run, before=Fault("*/checkpoints/.old-*", 2).install)[0] == -9
    code, output = lab.run(run)
    assert code == 0, output
    assert outcome(run) == whole
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]


def test_case29_case30_signals_save_and_stop(lab, whole, tmp_path):
    run = tmp_path / "run"
    for step, number, code in ((7, signal.SIGTERM, 143), (13, signal.SIGINT, 130)):
        child = lab.start(run, before=freeze(step))
        child.when(child.frozen)
        child.signal(number, signal.SIGCONT)
        time.sleep(0.2)
        with contextlib.suppress(ProcessLookupError):  # it may have ended by now
            child.signal(signal.SIGCONT)  # should it have begun another step before it looked
        assert child.end() == code, child.output
        assert "everything is saved" in child.output
        assert step < steps(run)[-1] <= step + 2
    child = lab.start(run, before=freeze(17))
    child.when(child.frozen)
    start = time.monotonic()
    child.signal(signal.SIGTERM, signal.SIGINT, signal.SIGCONT)  # a second signal: at once
    assert child.end() in (130, 143)
    assert time.monotonic() - start < 2
    assert "stopped by a second signal" in child.output
    assert steps(run)[-1] in (15, 16)  # the last save may have been under way
    code, output = lab.run(run)
    assert code == 0, output
    assert outcome(run) == whole


TWICE_AT_ONCE = """
import os, signal, time
from classic_cnns import signals
with signals.watch() as stop:
    for pause in (0.1, signals.ECHO, 10):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
        print(stop.requested(), flush=True)
"""


def test_case29_a_signal_and_its_echo_are_one():
    """As timeout(1) sends them; a third, later, quits."""
    done = subprocess.run([sys.executable, "-c", TWICE_AT_ONCE], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"]
    assert done.stderr.count("SIGTERM: finishing the step and saving") == 1
    assert "stopped by a second signal" in done.stderr
    assert done.returncode == 143


IN_A_NOTEBOOK = """
import ctypes, os, signal, sys, threading, time
from classic_cnns import signals

sys.ps1 = ">>> "
library = ctypes.CDLL(None)  # a call of it holds up the handlers of Python, as one of JAX does


def interrupted_within(seconds):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    library.sleep(seconds)


with signals.watch() as stop:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # another thread takes the signal
    interrupted_within(1)
    print("first", stop.requested(), flush=True)
    try:
        interrupted_within(1)
        print("nothing")
    except KeyboardInterrupt:
        print("second")
"""


def test_case30_in_a_notebook_the_first_interrupt_saves_and_the_second_ends_the_call():
    """Also while the main thread is in a library and hears of it late."""
    done = subprocess.run([sys.executable, "-c", IN_A_NOTEBOOK], capture_output=True, text=True)
    assert done.stdout.split() == ["first", "True", "second"], done.stderr
    assert done.stderr.startswith("SIGINT: finishing the step and saving")
    assert done.returncode == 0


def lose_the_reader(ignored, step):
    """Output goes to a pipe whose reader has ended, SIGHUP is ignored or not; stops at a step."""
    read, write = os.pipe()
    os.close(read)
    for number in (1, 2):
        os.dup2(write, number)
    os.close(write)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    freeze_at_step(step)


def test_case29_a_closed_terminal_saves_and_stops_unless_it_is_ignored(lab, whole, tmp_path):
    run = tmp_path / "run"
    for ignored, step, code in ((False, 9, 129), (True, 17, 0)):
        child = lab.start(run, before=functools.partial(lose_the_reader, ignored, step))
        child.when(child.frozen)
        child.signal(signal.SIGHUP)
        end = time.monotonic() + 60
        with contextlib.suppress(ProcessLookupError):  # it stops at every step from this one on
            while child.process.is_alive() and time.monotonic() < end:
                child.signal(signal.SIGCONT)
                time.sleep(0.05)
        assert child.end() == code
        assert steps(run)[-1] in ((9, 10, 11) if code else (24,))
    assert outcome(run) == whole


def test_case31_max_seconds_are_kept(lab, whole, tmp_path):
    run = tmp_path / "run"
    start = time.monotonic()
    code, output = lab.run(run, "--max_seconds=10", before=crawl, num_steps=99)  # 50 s
    assert code == 143, output
    assert time.monotonic() - start < 40  # 10 on a machine that is not busy
    assert "by the end of max_seconds; everything is saved" in output
    assert 20 > steps(run)[-1] > 0


def test_a_mirror_in_the_run_itself_is_refused(tmp_path):
    for mirror in (tmp_path / "run", tmp_path / "run" / "copy"):
        with pytest.raises(WorkdirError, match="Fix: another --mirror"):
            fetch(mirror, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_mirror_keeps_the_best_averages(tmp_path):
    run, mirror = tmp_path / "run", fetch(tmp_path / "mirror", tmp_path / "run")
    with Checkpoints(run / "checkpoints") as checkpoints:
        for step in (1, 2, 3, 4):
            best = {"best": {"step": 1}, "best_ema": {"step": 2}}
            checkpoints.save(step, {"x": np.zeros(2)}, best, keep={1, 2, 3})
    _update(run, mirror)
    assert SavedCheckpoints(mirror / "checkpoints").steps() == [1, 2, 4]


def test_mirror_goes_on_where_the_machine_was_lost(lab, whole, tmp_path):
    mirror = f"--mirror={tmp_path / 'drive'}"
    assert lab.run(tmp_path / "lost", mirror, before=kill(20))[0] == -9
    shutil.rmtree(tmp_path / "lost")
    kept = steps(tmp_path / "drive")
    assert kept
    assert kept[-1] >= 10  # the copy of 15 or 16 may have been under way
    code, output = lab.run(tmp_path / "new", mirror)
    assert code == 0, output
    assert outcome(tmp_path / "new") == whole
    assert outcome(tmp_path / "drive") == whole


def test_case10_where_nobody_may_write(lab, tmp_path):
    fault = Fault(f"{tmp_path}/run*", 1, "EACCES")
    code, output = lab.run(tmp_path / "run", before=fault.install)
    assert code == 4
    assert f"ERROR {tmp_path}/run: Permission denied (user id {os.getuid()}). Fix: " in output
    assert not (tmp_path / "run").exists()


def in_directory(path):
    os.chdir(path)


def test_case11_case12_case13_a_longer_run_in_a_relative_directory(lab, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    code, output = lab.run(tmp_path / "run", num_steps=30)
    assert code == 4
    assert "num_steps: 24 → 30. Fix: the old values, or --extend" in output
    before = functools.partial(os.chdir, tmp_path)
    code, output = lab.run("run", "--extend", before=before, num_steps=30, log_every_steps=5)
    assert code == 0, output
    assert "changed    num_steps: 24 → 30" in output
    assert "changed    log_every_steps: 3 → 5" in output
    assert steps(tmp_path / "run")[-1] == 30
    assert json.loads((tmp_path / "run" / "result-24.json").read_text())["steps"] == 24


def test_case55_rollback_is_counted_and_lowers_the_rate(config, tmp_path):
    config.on_divergence, config.max_rollbacks = "rollback", 2
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, {"a": np.ones(3)}, dataclasses.asdict(resume.Notes()), keep=set())
    error = NonFiniteError("step 9, learning rate 1: the output of conv2. Fix: it")
    error.workdir = tmp_path
    for number in (1, 2):
        with pytest.warns(ClassicCNNsWarning, match=rf"Back to step 7 with .*{number} of 2"):
            assert failures.roll_back(config, error) == tmp_path
        saved = SavedCheckpoints(tmp_path / "checkpoints")
        notes = resume.read_notes(7, saved.manifest(7)["notes"])
        assert (notes.rollbacks, notes.rate_scale) == (number, 0.5**number)
    with pytest.raises(NonFiniteError, match=r"after 2 rollbacks: step 9"):
        failures.roll_back(config, error)
    config.on_divergence = "stop"
    with pytest.raises(NonFiniteError, match=r"^step 9"):
        failures.roll_back(config, error)


# ---- minutes long


@pytest.mark.slow
@pytest.mark.parametrize("step", range(24))
def test_case21_case23_killed_at_every_step(lab, whole, tmp_path, step):
    assert lab.run(tmp_path / "run", before=kill(step))[0] == -9
    code, output = lab.run(tmp_path / "run")
    assert code == 0, output
    assert outcome(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_case29_sigterm_at_random_moments(lab, whole, tmp_path, number):
    """From the first look at the data to the end: saved, or nothing had begun."""
    child = lab.start(tmp_path / "run")
    child.process.join(0.3 + 0.17 * number)
    if child.process.is_alive():
        child.signal(signal.SIGTERM)
    code = child.end()
    assert code in (0, 143, -15), child.output  # -15: the program had not got to its handler
    if code == 143:
        assert "everything is saved" in child.output
    code, output = lab.run(tmp_path / "run")
    assert code == 0, output
    assert outcome(tmp_path / "run") == whole


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A hundred and twenty PNG files in ten folders."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    made = fake(32, count=400)["all"]
    for i, (pixels, label) in enumerate(zip(made.images, made.labels, strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / str(label) / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["stream", "resident"])
def test_case22_case24_other_workers_mixup_and_kills(lab, photos, tmp_path, loader):
    fields = {
        "config": "lenet5.py:folder",
        "data__dir": str(photos),
        "data__image_size": 32,
        "data__loader": loader,
        "augment__crop_padding": 2,
        "augment__mixup_alpha": 0.4,
    }
    assert lab.run(tmp_path / "a", **fields)[0] == 0
    for workers, step in ((1, 4), (2, 11), (4, 19)):
        code, output = lab.run(tmp_path / "b", before=kill(step), data__workers=workers, **fields)
        assert code == -9, output
    assert lab.run(tmp_path / "b", **fields)[0] == 0
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")


@pytest.mark.slow
def test_case25_resume_on_more_devices(lab, whole, tmp_path):
    for devices, step in ((1, 9), (2, 17)):
        assert lab.run(tmp_path / "run", before=kill(step), devices=devices)[0] == -9
    code, output = lab.run(tmp_path / "run", devices=4)
    assert code == 0, output
    for a, b in zip(outcome(tmp_path / "run")["records"], whole["records"], strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"eval_recall"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["ENOSPC", "EIO", "EACCES"])
def test_case08_an_error_at_each_write_of_a_run(lab, whole, tmp_path, action):
    """Whatever cannot be written, the next try ends as if nothing had been."""
    number, seen = 1, 0
    while True:
        run = tmp_path / str(number) / "run"
        run.parent.mkdir()
        mark = run.parent / "happened"
        code, output = lab.run(run, before=Fault(f"{run}*", number, action, mark=mark).install)
        assert code in (0, 4), output
        assert "Traceback" not in output
        seen += "ERROR" in output or "WARNING" in output
        if not mark.exists():  # there are no more writes than that
            assert code == 0, output
            break
        if code == 4:
            assert output.count("ERROR") == 1
            assert "Fix: " in output.split("ERROR")[1]
            code, output = lab.run(run)
            assert code == 0, output
        ended, expected = outcome(run), dict(whole)
        if "WARNING checkpoint" in output:  # then the test may be that of the best one there is
            del ended["result"], expected["result"]
        assert ended == expected
        shutil.rmtree(run.parent)
        number += 4
    assert seen > 10, SMALL


@pytest.mark.slow
def test_case55_rollback_lowers_the_rate_and_goes_on(lab, tmp_path):
    fields = {"optimizer.learning_rate": 1e20, "rollback_factor": 1e-22}
    code, output = lab.run(tmp_path / "run", timeout=200, on_divergence="rollback", **fields)
    assert code == 0, output
    assert "Back to step 0 with 1e-22 × the learning rate (rollback 1 of 3)" in output
    rates = [r["learning_rate"] for r in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert max(rates) <= 0.01
    assert rates


def consumption(child):
    """Resident memory in MB, open files and threads of a child."""
    folder = Path(f"/proc/{child.process.pid}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    files = len(os.listdir(folder / "fd"))
    return int(fields["VmRSS"].split()[0]) / 1e3, files, int(fields["Threads"])


@pytest.mark.slow
def test_soak_of_ten_thousand_steps(lab, tmp_path):
    """Two hundred checkpoints: memory grows by no more than 5 %, files and threads not at all."""
    run = tmp_path / "run"
    child = lab.start(
        run,
        num_steps=10_000,
        batch_size=8,
        checkpoint_every_steps=50,
        eval_every_steps=1000,
        log_every_steps=500,
    )
    samples = []
    while child.process.is_alive():
        time.sleep(0.5)
        done = steps(run)
        if done and done[-1] >= 1000:
            with contextlib.suppress(OSError, KeyError):
                samples.append(consumption(child))
    assert child.end() == 0, child.output
    memory, files, threads = np.array(samples[:-4]).T
    tenth = len(memory) // 10
    growth = np.median(memory[-tenth:]) / np.median(memory[:tenth]) - 1
    print(f"{len(memory)} samples, {memory[0]:.0f} MB, growth {growth:.1%}, {files[-1]:.0f} files")
    assert tenth > 3
    assert growth < 0.05
    assert np.median(files[-tenth:]) <= np.median(files[:tenth])
    assert np.median(threads[-tenth:]) <= np.median(threads[:tenth])
