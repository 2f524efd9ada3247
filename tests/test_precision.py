"""float16: steps that overflow are left out, and training learns all the same."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classic_cnns
from classic_cnns import precision
from classic_cnns.dispatch import Progress, train_on
from classic_cnns.metrics import EpochSums, TrainMetrics
from classic_cnns.models.layers import BatchNorm, Conv
from classic_cnns.saved import SavedCheckpoints
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import train_step
from classic_cnns.train_state import create_train_state

pytestmark = pytest.mark.usefixtures("quick_compile")


class Tiny(nn.Module):
    dtype = jnp.float16

    @nn.compact
    def __call__(self, x, *, train=False):
        x = Conv(4, (3, 3), dtype=self.dtype, name="conv")(x)
        x = nn.relu(BatchNorm(not train, dtype=self.dtype, name="bn")(x)).mean((1, 2))
        return nn.Dense(3, dtype=self.dtype, name="head")(x).astype(jnp.float32)


@pytest.fixture
def training():
    tx = precision.dynamic_loss_scale(optax.adam(0.03), grow_every=5)
    state = create_train_state(Tiny(), tx, (8, 8, 3), seed=0, mesh=create_mesh(1), ema=True)
    settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "ema_decay": 0.5, "accumulate_steps": 2}
    step = functools.partial(train_step, model=Tiny(), tx=tx, **settings)
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    item = {"image": images, "label": np.arange(12, dtype=np.int32) % 3, "index": np.arange(12)}
    return state, jax.jit(functools.partial(train_on, data={}, item=item, step=step))


def with_scale(state, scale):
    return dataclasses.replace(state, opt_state=state.opt_state._replace(scale=jnp.float32(scale)))


def test_an_overflow_changes_the_scale_and_the_step_number_alone(training):
    state, train = training
    state, progress = train(state, Progress.empty())  # Adam's state and the averages are not 0
    before = with_scale(state, 2.0**24)
    after, more = train(before, progress)
    assert int(after.step) == int(before.step) + 1
    assert float(after.opt_state.scale) == 2.0**23
    assert int(after.opt_state.good) == 0
    put_back = dataclasses.replace(
        after,
        step=before.step,
        opt_state=after.opt_state._replace(
            scale=before.opt_state.scale, good=before.opt_state.good
        ),
    )
    jax.tree.map(np.testing.assert_array_equal, put_back, before)
    assert bool(more.finite)  # the run goes on
    jax.tree.map(np.testing.assert_array_equal, more.metrics, progress.metrics)

    first = float(progress.metrics.loss.compute())
    for _ in range(40):
        after, more = train(after, Progress.empty())
    assert float(more.metrics.loss.compute()) < 0.8 * first
    assert bool(more.finite)


def test_the_scale_grows_after_good_steps(training):
    state, train = training
    state = with_scale(state, 4.0)
    scales = []
    for _ in range(11):
        state, _ = train(state, Progress.empty())
        scales.append(float(state.opt_state.scale))
    assert scales == [4.0] * 4 + [8.0] * 5 + [16.0] * 2


def test_the_gradient_is_that_of_the_loss_itself(training):
    state, train = training
    low, _ = train(with_scale(state, 1.0), Progress.empty())
    high, _ = train(with_scale(state, 1024.0), Progress.empty())
    mine, theirs = (jax.tree.leaves(s.opt_state.inner[0].mu) for s in (low, high))
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=2e-4)


def test_what_no_scale_cures_is_a_divergence(training):
    state, train = training
    head = jax.tree.map(lambda a: a * jnp.float32(jnp.inf), state.params["head"])
    broken = dataclasses.replace(state, params={**state.params, "head": head})
    _, progress = train(with_scale(broken, 2.0), Progress.empty())
    assert bool(progress.finite)
    after, progress = train(with_scale(broken, 1.0), Progress.empty())
    assert not bool(progress.finite)
    assert int(after.step) == int(broken.step)


def test_averages_of_nothing_are_no_number():
    values = jax.device_get(TrainMetrics.empty()).summary()
    assert all(map(math.isnan, values.values()))
    assert math.isnan(EpochSums().means()["train_loss"])


def test_a_run_in_float16(config, tmp_path, monkeypatch):
    """Its first steps overflow, and it learns."""
    plain = precision.dynamic_loss_scale
    monkeypatch.setattr(precision, "dynamic_loss_scale", functools.partial(plain, initial=2.0**24))
    config.model.dtype, config.schedule.name = "float16", "constant"
    state, summary = classic_cnns.train_and_evaluate(config, tmp_path / "run")
    assert int(state.step) == summary["steps"] == 60
    assert summary["test_accuracy"] > 0.5
    saved = SavedCheckpoints(tmp_path / "run" / "checkpoints").read(60)["state"]["opt_state"]
    assert float(saved["scale"]) == float(state.opt_state.scale)
    assert 1 < float(saved["scale"]) < 2.0**24
    assert classic_cnns.load(tmp_path / "run").model.dtype == jnp.float16
