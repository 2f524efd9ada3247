"""Averages of the weights, the best of them, and the end of a run that no longer improves."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import classic_cnns
from classic_cnns.averaging import schedule_free_average
from classic_cnns.data.loaders import ResidentLoader
from classic_cnns.durations import durations
from classic_cnns.errors import ConfigError
from classic_cnns.logging import read_records
from classic_cnns.models.layers import BatchNorm
from classic_cnns.resume import Notes
from classic_cnns.schedules import plateau_scale
from classic_cnns.selection import note
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import train_step
from classic_cnns.train_state import create_train_state

pytestmark = pytest.mark.usefixtures("quick_compile")

EARLY = {"patience": 2, "metric": "eval_loss", "mode": "min", "min_delta": 0.05}


def record(step, accuracy=0.5, loss=1.0, **more):
    return {"step": step, "eval_accuracy": accuracy, "eval_loss": loss, **more}


def test_patience_counts_evaluations_without_enough_improvement():
    notes = Notes()
    for step, loss in enumerate((1.0, 0.96, 0.94, 0.93, 0.5, 0.6)):
        note(notes, record(step, loss=loss), EARLY)
        assert not notes.ended
        assert notes.waited == (0, 1, 0, 1, 0, 1)[step]
    note(notes, record(6, loss=0.46), EARLY)
    assert notes.ended == "eval_loss has not improved on 0.5 in 2 evaluations"
    never = Notes()
    for step in range(9):
        note(never, record(step), {**EARLY, "patience": 0})
    assert not never.ended


@pytest.mark.parametrize(("metric", "better"), [("eval_loss", -0.1), ("eval_accuracy", 0.1)])
def test_of_a_loss_less_is_better_of_an_accuracy_more(metric, better):
    for sign in (1, -1):
        notes = Notes()
        for step in range(5):
            value = 0.5 + sign * step * better
            early = {"patience": 3, "metric": metric, "mode": "auto", "min_delta": 0.0}
            note(notes, {**record(step), metric: value}, early)
        assert bool(notes.ended) == (sign == -1)


def test_weights_and_averages_have_a_best_each():
    notes = Notes()
    for step, (raw, ema) in enumerate(((0.5, 0.3), (0.4, 0.6), (0.5, 0.55))):
        improved = note(notes, record(step, raw, ema_eval_accuracy=ema), {"patience": 0})
        assert improved == (step == 0)
    assert notes.best == {"step": 0, "eval_accuracy": 0.5}
    assert notes.best_ema == {"step": 1, "eval_accuracy": 0.6}


def test_mistakes_are_named(config):
    config.early_stopping.update(patience=1, metric="ema_eval_los", mode="least", min_delta=-1.0)
    config.ema_decay = 1.0
    with pytest.raises(ConfigError) as error:
        durations(config, 100)
    for text in ("ema_decay is 1", 'did you mean "ema_eval_loss"', 'mode is "least"', "min_delta"):
        assert text in str(error.value)
    config.early_stopping.update(metric="ema_eval_loss", mode="min", min_delta=0.0)
    config.ema_decay = 0.0
    with pytest.raises(ConfigError, match=r'early_stopping.metric "ema_eval_loss"'):
        durations(config, 100)


def test_what_does_not_go_together_is_named(config):
    config.optimizer.schedule_free, config.schedule.name = 0.9, "plateau"
    config.optimizer.sam_rho = float("nan")
    with pytest.raises(ConfigError, match=r"sam_rho is nan.*schedule.name=plateau"):
        durations(config, 100)


def test_no_period_is_the_end_alone(config):
    config.num_steps = 50
    config.update(eval_every_epochs=0.0, checkpoint_every_epochs=0.0, checkpoint_every_steps=0)
    spans = durations(config, 100)
    assert (spans.eval_every, spans.checkpoint_every) == (50, 50)


class Stop(Exception):
    pass


def test_everything_at_once_continues_to_the_bit(config, tmp_path, monkeypatch, capsys):
    """Averages, lookahead, a plateau, mixed images and early stopping, killed in the middle."""
    config.ema_decay, config.optimizer.lookahead_steps = 0.9, 4
    config.augment.mixup_alpha = 0.5
    config.schedule.update(name="plateau", patience=1, factor=0.5)
    # So that no evaluation is better than the first; twice as much for twice as many images.
    config.optimizer.update(learning_rate=5e-7, learning_rate_per=16)
    config.early_stopping.update(patience=2, metric="eval_loss", mode="min", min_delta=0.5)
    config.eval_every_steps, config.checkpoint_every_steps, config.num_steps = 6, 4, 60
    whole, summary = classic_cnns.train_and_evaluate(config, tmp_path / "a")
    assert summary["steps"] == 18
    assert summary["ended"].startswith("eval_loss has not improved on 2.")
    assert plateau_scale(jax.device_get(whole.opt_state)) == 0.25
    out = capsys.readouterr().out
    assert "ended      at step 18" in out
    assert "peak rate 1e-06 (5e-07 per 16 images)" in out
    plain = ResidentLoader.train

    def train(self, at, count=1, room=0):
        if at <= 14 < at + count:
            raise Stop
        return plain(self, at, count, room)

    with monkeypatch.context() as context:
        context.setattr(ResidentLoader, "train", train)
        with pytest.raises(Stop):
            classic_cnns.train_and_evaluate(config, tmp_path / "b")
    parts, same = classic_cnns.train_and_evaluate(config, tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(parts))
    for key in summary.keys() - {"seconds", "workdir", "goodput"}:
        assert summary[key] == same[key], key

    evals = [r for r in read_records(tmp_path / "b" / "metrics.jsonl") if "eval_loss" in r]
    np.testing.assert_allclose([r["learning_rate"] / 1e-6 for r in evals], [1, 1, 0.5], rtol=1e-5)
    assert summary["ema_val_accuracy"] == max(r["ema_eval_accuracy"] for r in evals)
    assert "ema_test_accuracy" in summary
    averaged = classic_cnns.load(tmp_path / "b", "latest", ema=True).variables
    jax.tree.map(np.testing.assert_array_equal, averaged, jax.device_get(whole.averaged.variables))
    assert classic_cnns.load(tmp_path / "b", ema=True).step == summary["ema_best_step"]

    # Whoever asks for more steps of a training that was stopped early gets them.
    config.num_steps = 66
    _, longer = classic_cnns.train_and_evaluate(config, tmp_path / "b", extend=True)
    assert longer["steps"] == 30
    assert longer["ended"].endswith("in 2 evaluations")


def test_schedule_free_evaluates_its_average_and_keeps_it(config, tmp_path):
    config.optimizer.schedule_free, config.schedule.name = 0.9, "constant"
    config.optimizer.learning_rate, config.num_steps, config.eval_every_steps = 0.1, 18, 6
    state, summary = classic_cnns.train_and_evaluate(config, tmp_path / "run")
    assert summary["ema_val_accuracy"] > 0.5
    run = classic_cnns.load(tmp_path / "run", "latest", ema=True)
    average = schedule_free_average(state.opt_state, state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        run.variables["params"],
        jax.device_get(average),
    )
    config.ema_decay = 0.9
    with pytest.raises(ConfigError, match="Fix: no ema_decay"):
        durations(config, 100)


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(3)(BatchNorm(not train)(x.reshape(len(x), -1)))


def test_averages_follow_their_formula():
    model, tx = Norm(), optax.sgd(0.1)
    state = create_train_state(model, tx, (4, 4, 3), seed=0, mesh=create_mesh(1), ema=True)
    step = jax.jit(
        functools.partial(
            train_step, model=model, tx=tx, mean=(0.5,) * 3, std=(0.5,) * 3, ema_decay=0.3
        )
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 4, 3), np.uint8)
    expected = jax.device_get(state.variables)
    for keep in (0.1, 2 / 11, 0.25, 0.3, 0.3):
        state, _ = step(state, {"image": images, "label": np.arange(6, dtype=np.int32) % 3})
        expected = jax.tree.map(
            lambda a, b, k=keep: k * a + (1 - k) * np.asarray(b), expected, state.variables
        )
    for a, b in zip(*map(jax.tree.leaves, (expected, state.averaged.variables)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
