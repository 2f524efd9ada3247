"""What counts as waiting for input."""

import time

import jax.numpy as jnp
import pytest

from classic_cnns.timing import Clock


class Running:
    """The result of a step that is still being computed."""

    def is_ready(self):
        return False


@pytest.mark.parametrize("running", [False, True])
def test_only_an_idle_device_waits_for_input(running):
    clock = Clock(10)
    clock.count(1, jnp.zeros(()))  # compiled
    last = {"done": jnp.zeros(()).block_until_ready(), "other": Running() if running else None}
    for _ in range(3):
        with clock.waiting(1, last):
            time.sleep(0.02)
        time.sleep(0.02)
        clock.count(1, None)
    clock.pause()
    wait = clock.read()["input_wait"]
    assert wait == 0 if running else 0.3 < wait < 0.7


def test_each_size_of_dispatch_compiles_outside_the_clock():
    clock = Clock(10)
    for steps, seconds in ((16, 1), (16, 0.02), (1, 1), (1, 0.02), (16, 0.02)):
        with clock.waiting(steps, jnp.zeros(())):
            pass
        time.sleep(seconds)
        clock.count(steps, jnp.zeros(()))
    clock.pause()
    counted = 10 * (16 + 1 + 16) / clock.read()["images_per_sec"]
    assert 0.06 <= counted < 0.8
