"""Learning rates against their formulas."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from classic_cnns import config as config_lib
from classic_cnns.durations import durations
from classic_cnns.errors import ConfigError
from classic_cnns.schedules import (
    SCHEDULES,
    create_schedule,
    note_evaluation,
    plateau_scale,
    scale_by_plateau,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

T = np.arange(11) / 10
COSINE = (1 + np.cos(np.pi * T)) / 2


def rates(*args, **kwargs):
    schedule = create_schedule(*args, **kwargs)
    return [float(schedule(step)) for step in range(11)]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("constant", {}, [1.0] * 11),
        ("plateau", {}, [1.0] * 11),
        ("cosine", {"final_factor": 0.2}, 0.2 + 0.8 * COSINE),
        ("linear", {"final_factor": 0.2}, 1 - 0.8 * T),
        ("polynomial", {"final_factor": 0.2, "power": 3.0}, 0.2 + 0.8 * (1 - T) ** 3),
        ("exponential", {"period": 0.5, "factor": 0.1}, 0.1 ** (T * 2)),
        ("step", {"period": 0.3}, [1.0] * 3 + [0.1] * 3 + [0.01] * 3 + [0.001] * 2),
        ("multistep", {"milestones": (0.5, 0.8)}, [1.0] * 5 + [0.1] * 3 + [0.01] * 3),
        ("cosine_restarts", {"period": 0.5}, [*COSINE[:10:2], *COSINE[:10:2], 1.0]),
        ("cosine_restarts", {"period": 0.45}, [*COSINE[:10:2], *COSINE[:10:2], 1.0]),
    ],
)
def test_formulas(name, settings, expected):
    np.testing.assert_allclose(rates(name, 1.0, 10, **settings), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        rates(name, 3.0, 10, **settings), 3 * np.asarray(expected), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_of_every_schedule(name):
    warm = rates(name, 2.0, 10, warmup_steps=4)
    np.testing.assert_allclose(warm[:5], [0.5, 1.0, 1.5, 2.0, warm[4]], rtol=1e-6)
    if name not in ("step", "exponential", "multistep"):
        assert warm[4] == 2.0


def test_shares_count_from_the_start_of_the_training():
    """Milestones stay where they are; what was to happen during the warm-up has happened."""
    warm = rates("multistep", 1.0, 10, milestones=(0.2, 0.5), warmup_steps=3)
    np.testing.assert_allclose(warm[3:], [0.1] * 2 + [0.01] * 6, rtol=1e-5)
    cycle = rates("one_cycle", 1.0, 10)
    assert cycle[2] == cycle[3] == 1.0
    assert cycle[10] < 1e-6


def test_the_last_restart_comes_to_an_end():
    for total, period, warmup in ((101, 0.5, 0), (100, 1 / 3, 0), (100, 0.3, 10), (1000, 1.0, 5)):
        schedule = create_schedule(
            "cosine_restarts", 1.0, total, period=period, warmup_steps=warmup
        )
        assert float(schedule(total - 1)) < 0.01
        rising = sum(float(schedule(s + 1)) > float(schedule(s)) for s in range(warmup, total - 1))
        assert rising == round((total - warmup) / round(period * total)) - 1


def test_mistakes_are_named_together():
    for wrong in ((), ("a", "b"), (0.5, float("nan"))):
        with pytest.raises(ConfigError, match="milestones is"):
            create_schedule("multistep", 0.1, 10, milestones=wrong)
    with pytest.raises(ConfigError, match="learning_rate is nan"):
        create_schedule("cosine", float("nan"), 10)
    with pytest.raises(ConfigError, match=r'"cosin".*"cosine"'):
        create_schedule("cosin", 0.1, 10)
    with pytest.raises(ConfigError, match=r"takes 11 of 10.*milestones is.*period is 0.*power is"):
        create_schedule(
            "cosine", 0.1, 10, warmup_steps=11, milestones=(0.9, 0.1), period=0, power=-1
        )


def test_plateau_scales_when_the_loss_no_longer_falls():
    tx = optax.chain(optax.sgd(1.0), scale_by_plateau())
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    scales = []
    for loss in (1.0, 0.9, 0.95, 0.9, 0.8, 0.8, 0.8, 0.8, 0.7):
        state = note_evaluation(state, loss, factor=0.5, patience=2)
        scales.append(plateau_scale(state))
    assert scales == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    updates, _ = tx.update({"w": jnp.full(2, 2.0)}, state, params)
    assert updates["w"].tolist() == [-0.5, -0.5]
    plain = optax.sgd(1.0).init(params)
    assert note_evaluation(plain, 1.0, factor=0.5, patience=1) is not None
    assert plateau_scale(plain) == 1


def test_rate_for_a_number_of_images(config):
    config.optimizer.learning_rate, config.optimizer.learning_rate_per = 0.1, 256
    config.schedule.name = "constant"
    config.schedule.warmup_steps = 0
    config.schedule.warmup_epochs = 0.0
    _, schedule = config_lib.optimizer_from(config, durations(config, 100))
    assert float(schedule(0)) == pytest.approx(0.1 * 32 / 256)
    config.optimizer.learning_rate_per = -1
    with pytest.raises(ConfigError, match="learning_rate_per is -1"):
        config_lib.peak_rate(config)
