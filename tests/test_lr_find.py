"""The range test finds the edge of stability where it can be computed by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from classic_cnns import cli
from classic_cnns.errors import ConfigError
from classic_cnns.lr_find import conclude, diverged, range_test, rising
from classic_cnns.train_state import TrainState

pytestmark = pytest.mark.usefixtures("quick_compile")


def quadratic(schedule):
    """A step of gradient descent on loss = x², which diverges where the rate is above 1."""
    tx = optax.sgd(schedule)

    def step(state, batch):
        loss, grads = jax.value_and_grad(lambda p: (p["x"] ** 2).sum())(state.params)
        updates, opt_state = tx.update(grads, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, {}, opt_state), {"loss": loss[None]}

    params = {"x": jnp.ones(1)}
    return step, TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))


def test_a_quadratic_diverges_above_one():
    schedule = rising(1e-4, 100.0, 120)
    assert float(schedule(0)) == pytest.approx(1e-4)
    assert float(schedule(119)) == pytest.approx(100.0, rel=1e-4)
    step, state = quadratic(schedule)
    before = jax.device_get(state)
    items = itertools.repeat({"index": jnp.zeros(1, jnp.int32)})
    found = range_test(step, state, items, {}, schedule, 120)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    assert len(found.losses) < 120
    assert 0.1 < found.tenth < 1.0  # smoothing sees the divergence a few steps late
    assert 0.01 < found.suggestion <= 0.5
    assert found.losses[0] == 1.0


def test_steepest_descent_is_where_the_slope_is():
    rates = np.geomspace(1e-4, 1.0, 41)
    smooth = 1 / (1 + np.exp(3 * np.log(rates / 1e-2)))  # steepest at 1e-2
    assert conclude(rates, smooth, smooth, None).suggestion == pytest.approx(1e-2, rel=0.05)
    assert conclude(rates, smooth, smooth, 1e-3).suggestion == 1e-3
    assert conclude(rates, smooth, smooth, None).fell
    assert not conclude(rates, smooth, 1 + smooth / 100, None).fell


def test_a_dead_network_counts_as_diverged():
    assert not diverged([2.3, 2.0, 1.5, 1.6])
    assert diverged([2.3, 2.0, 1.5, 2.0])
    assert not diverged([2.3, 2.35, 2.4])
    assert diverged([0.5, 2.1])


def test_settings_that_make_no_test():
    for low, high, steps in ((1.0, 0.1, 100), (0.0, 1.0, 100), (0.1, 1.0, 5)):
        with pytest.raises(ConfigError, match=r"Fix: --from"):
            rising(low, high, steps)


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_the_command(tmp_path, capsys, monkeypatch):
    config = f"{cli.__file__.rsplit('/', 2)[0]}/configs/lenet5.py:fake"
    monkeypatch.chdir(tmp_path)
    args = ["lr-find", config, "--steps=12", "--config.batch_size=16"]
    assert cli.main(args) == 0
    assert "suggestion: --config.optimizer.learning_rate=" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["lr_find.png"]
    assert cli.main(["lr-find", config, "--config.batch_szie=16"]) == 2
    assert "did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["lr-find", config, "--stepz=3"])
