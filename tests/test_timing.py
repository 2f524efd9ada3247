"""What counts as waiting for input, and how long a training says it will take."""

import io
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import rich.console

from classic_cnns import logging, timing
from classic_cnns.metrics import TrainMetrics
from classic_cnns.timing import Clock

METRICS = TrainMetrics.single_from_model_output(
    loss=jnp.full(4, 1.5), logits=jnp.eye(4), labels=jnp.zeros(4, int), grad_norm=jnp.ones(1)
)


class Running:
    """The result of a step that is still being computed."""

    def is_ready(self):
        return False


@pytest.mark.parametrize("running", [False, True])
def test_only_an_idle_device_waits_for_input(running):
    clock = Clock(10)
    clock.count(1, 1, jnp.zeros(()))  # compiled
    last = {"done": jnp.zeros(()).block_until_ready(), "other": Running() if running else None}
    for _ in range(3):
        with clock.waiting(1, last):
            time.sleep(0.02)
        time.sleep(0.02)
        clock.count(1, 1, None)
    clock.pause()
    wait = clock.read()["input_wait"]
    assert wait == 0 if running else 0.3 < wait < 0.7


def test_each_size_of_dispatch_compiles_outside_the_clock():
    clock = Clock(10)
    for steps, seconds in ((16, 1), (16, 0.02), (1, 1), (1, 0.02), (16, 0.02)):
        with clock.waiting(steps, jnp.zeros(())):
            pass
        time.sleep(seconds)
        clock.count(steps, steps, jnp.zeros(()))
    clock.pause()
    counted = 10 * (16 + 1 + 16) / clock.read()["images_per_sec"]
    assert 0.06 <= counted < 0.8


def test_a_dispatch_takes_two_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock, sizes = Clock(10), []
    clock.count(1, 16, jnp.zeros(()))  # compiled
    for _ in range(4):  # 0.4 s a step; the newest dispatch has not been waited for
        sizes.append(clock.steps(left=100, most=16, room=16))
        clock.count(sizes[-1], 16, None)
        now[0] += 0.4 * (sizes[-2] if len(sizes) > 1 else 0)
    assert sizes == [1, 1, 5, 5]
    assert clock.steps(left=3, most=16, room=16) == 3
    clock.restart(new_epoch=True)
    assert clock.steps(left=100, most=16, room=16) == 1
    clock.count(1, 16, None)
    now[0] += 1e-6  # and of fast steps the most
    clock.count(1, 16, None)
    assert clock.steps(left=100, most=16, room=16) == 16
    assert [clock.steps(left, most=16, room=0) for left in (15, 16, 100)] == [1, 16, 16]


def test_sizes_of_dispatches(monkeypatch):
    assert timing.dispatch_sizes(0, resident=True, impl="auto") == (16, 16)
    assert timing.dispatch_sizes(4, resident=True, impl="auto") == (4, 4)
    assert timing.dispatch_sizes(4, resident=True, impl="lax") == (1, 0), "slow in loops"
    assert timing.dispatch_sizes(4, resident=False, impl="auto") == (1, 0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # whose clocks differ
    assert timing.dispatch_sizes(4, resident=True, impl="auto") == (4, 0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert timing.dispatch_sizes(0, resident=True, impl="lax") == (16, 0)


def test_what_is_left_does_not_count_compiling(monkeypatch, capsys):
    now, compiled = [0.0], [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime, gmtime=time.gmtime)
    monkeypatch.setattr(logging, "time", clock)
    display = logging.Display(100_000, lambda: compiled[0], mode="plain")
    display.start(0)
    now[0], compiled[0] = 300.0, 299.0
    display.advance(1)  # of a first step nothing is to be foreseen
    now[0] = 311.0
    display.advance(12)
    display.status({"step": 12, "train_loss": 2.0, "train_accuracy": 0.5, "images_per_sec": 64.0})
    now[0] = 320.0
    display.advance(21)  # soon after a line
    now[0] = 342.0
    display.advance(43, METRICS)
    now[0] = 373.0
    display.advance(74, TrainMetrics.empty())  # a record was just written
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "compiling  the training step",
        "step 1/100000",
        "step 12/100000  loss 2.0000  accuracy 0.5000  64 images/s  27:46:28 left",
        "step 43/100000  loss 1.5000  accuracy 0.2500  27:45:57 left",
        "step 74/100000  27:45:26 left",
    ]


class ZMQInteractiveShell:
    """What `get_ipython` gives in a notebook, by its name."""


@pytest.mark.parametrize("how", ["in it", "below it"])
def test_in_a_notebook_lines_are_plain(how, monkeypatch):
    """Though its output says that it is a terminal, as that of ipykernel 7 and of "!" does."""
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", out)
    if how == "in it":
        monkeypatch.setattr(rich.console, "get_ipython", ZMQInteractiveShell, raising=False)
        assert rich.console.Console().is_jupyter
    else:
        monkeypatch.setenv("JPY_PARENT_PID", "1")
    with logging.Display(3) as display:
        display.start(0)
        display.print("[1mbold")
    assert out.getvalue() == "compiling  the training step\n[1mbold\n"
