"""Steps: learning, sharding, several at once, freezing, exact evaluation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from classic_cnns import evaluate as evaluate_module
from classic_cnns.data import Split
from classic_cnns.data.augment import create_augment
from classic_cnns.data.loaders import ResidentLoader
from classic_cnns.data.sources import fake
from classic_cnns.dispatch import JitStep, Progress, train_on
from classic_cnns.errors import ConfigError
from classic_cnns.evaluate import create_evaluate
from classic_cnns.models import create_model
from classic_cnns.models.resnet import ResNet
from classic_cnns.sharding import check_batch_size, create_mesh, replicate
from classic_cnns.steps import eval_step, train_step
from classic_cnns.train_state import create_train_state

pytestmark = pytest.mark.usefixtures("quick_compile")

MEAN, STD = (0.5,) * 3, (0.25,) * 3
LENET = create_model("lenet5", 10)
AUGMENT = create_augment(crop_padding=2, flip="random", cutout_size=4)


def split(n=64):
    return fake(count=n)["all"]


def setup(devices=1, batch=16, n=64, augment=AUGMENT, rate=0.02, model=LENET, loops=False):
    mesh = create_mesh(devices)
    tx = optax.sgd(rate, momentum=0.9)
    state = create_train_state(model, tx, (32, 32, 3), seed=1, mesh=mesh)
    one = functools.partial(
        train_step, model=model, tx=tx, mean=MEAN, std=STD, augment=augment, seed=3
    )
    traces = []

    def counted(*args):
        traces.append(1)
        return train_on(*args, step=one)

    loader = ResidentLoader(split(n), batch, seed=0, mesh=mesh)
    return (
        state,
        replicate(Progress.empty(), mesh),
        JitStep(counted, loops),
        loader,
        traces,
    )


@pytest.mark.parametrize("devices", [1, 2])
def test_parameters_are_the_same_from_the_host_and_from_the_devices(devices, monkeypatch):
    host = setup(devices)[0]

    def without_host(backend):
        raise RuntimeError(f"no backend {backend}")

    monkeypatch.setattr(jax, "local_devices", without_host)  # as with JAX_PLATFORMS=cuda
    own = setup(devices)[0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), host, own)
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves((host, own))} == {devices}
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves((host, own)))


def test_steps_where_jax_computes_in_64_bits():
    """Several in a loop, whose carry must keep its types; parameters stay float32."""
    with jax.enable_x64(True):
        state, progress, step, loader, _ = setup(loops=True)
        types = jax.tree.map(lambda a: a.dtype, (state, progress))
        state, progress = step(state, progress, loader.data, loader.train(0, 3, 4))
        assert jax.tree.map(lambda a: a.dtype, (state, progress)) == types
        assert (int(state.step), int(progress.metrics.accuracy.count)) == (3, 48)
        assert {p.dtype for p in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}


class TwoHeads(nn.Module):
    """A classifier and an auxiliary one on the same pixels."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(len(x), -1)
        self.sow("aux_logits", "logits", nn.Dense(10, use_bias=False, name="aux")(x))
        return nn.Dense(10, use_bias=False, name="head")(x)


@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_the_loss_of_an_auxiliary_classifier_counts_by_its_weight(weight):
    model, tx = TwoHeads(), optax.sgd(1.0)
    state = create_train_state(model, tx, (4, 4, 3), seed=0, mesh=create_mesh(1))
    data = split(8)
    batch = {"image": jnp.asarray(data.images[:, :4, :4]), "label": jnp.asarray(data.labels)}
    new, out = train_step(state, batch, model=model, tx=tx, mean=MEAN, std=STD, aux_weight=weight)
    x = ((np.asarray(batch["image"], np.float64) / 255 - 0.5) / 0.25).reshape(8, -1)
    before, after = jax.device_get((state.params, new.params))
    for name, share in (("aux", weight), ("head", 1)):
        exp = np.exp(x @ before[name]["kernel"].astype(np.float64))
        likely = exp / exp.sum(1, keepdims=True)
        grad = x.T @ (likely - np.eye(10)[data.labels]) / 8
        moved = after[name]["kernel"] - before[name]["kernel"]
        np.testing.assert_allclose(moved, -share * grad, rtol=1e-4, atol=1e-6)
    loss = -np.log(likely[np.arange(8), data.labels])  # of the classifier alone
    np.testing.assert_allclose(out["loss"], loss, rtol=1e-5)


def test_training_learns_and_traces_once():
    state, progress, train, loader, traces = setup(augment=None, n=160, rate=0.02)
    for step in range(60):
        state, progress = train(state, progress, loader.data, loader.train(step))
        if step in (3, 55):
            losses = progress.metrics.loss.compute()
            progress = replicate(Progress.empty(), loader.mesh)
            if step == 3:
                first = losses
    assert float(progress.metrics.loss.compute()) < 0.5 * float(first)
    assert int(state.step) == 60
    assert int(progress.metrics.accuracy.count) == 4 * 16
    assert len(traces) == 1


@pytest.mark.parametrize("model", [LENET, ResNet("basic", (1,), 10)], ids=["lenet5", "resnet"])
def test_eight_devices_equal_one(model):
    results = []
    for devices in (1, 8):
        state, progress, train, loader, _ = setup(devices, model=model)
        for step in range(3):
            state, progress = train(state, progress, loader.data, loader.train(step))
        results.append(jax.device_get((state, progress.metrics.compute())))
    assert results[0][0].step == results[1][0].step == 3
    for a, b in zip(*(jax.tree.leaves(r) for r in results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("items", [[(0, 4)], [(0, 3, 4), (3, 1, 4)]], ids=["all", "counted"])
def test_several_steps_in_one_dispatch_equal_single_steps(items):
    state, progress, train, loader, _ = setup()
    for step in range(4):
        state, progress = train(state, progress, loader.data, loader.train(step))
    other, other_progress, train, loader, traces = setup(loops=True)
    for item in items:
        other, other_progress = train(other, other_progress, loader.data, loader.train(*item))
    assert len(traces) == 1, "one program for any count"
    for a, b in zip(
        *(jax.tree.leaves(s) for s in ((state, progress), (other, other_progress))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_how_many_steps_a_dispatch_takes_changes_no_bit():
    results = []
    for counts in ([4], [1, 2, 1]):
        state, progress, train, loader, _ = setup(loops=True)
        for count in counts:
            item = loader.train(int(state.step), count, room=5)
            state, progress = train(state, progress, loader.data, item)
        results.append(jax.device_get((state, progress)))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_state_freezes_before_the_first_step_that_is_not_finite():
    state, progress, train, loader, _ = setup(rate=1e30)
    before = []
    for step in range(4):
        before.append(jax.device_get(state))
        state, progress = train(state, progress, loader.data, loader.train(step))
    assert not bool(progress.finite)
    bad = int(state.step)
    assert bad in (1, 2)
    assert int(progress.metrics.accuracy.count) == 16 * bad
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before[bad])


def test_augmentation_and_dropout_follow_the_step_alone():
    state, progress, train, loader, _ = setup()
    state, progress = train(state, progress, loader.data, loader.train(0))
    saved = jax.device_get((state, progress))
    results = []
    for _ in range(2):
        state, progress = train(*replicate(saved, loader.mesh), loader.data, loader.train(1))
        results.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_counts_every_image_once(devices, monkeypatch):
    traces = []
    monkeypatch.setattr(
        evaluate_module, "eval_step", lambda *a, **k: traces.append(1) or eval_step(*a, **k)
    )
    mesh = create_mesh(devices)
    model = create_model("lenet5", 10)
    state = create_train_state(model, optax.sgd(0.1), (32, 32, 3), seed=1, mesh=mesh)
    evaluate = create_evaluate(model, mean=MEAN, std=STD)
    data = split(33)
    pixels = (data.images / 255.0 - 0.5) / 0.25
    logits = np.asarray(
        jax.jit(model.apply)(jax.device_get(state).variables, jnp.array(pixels, jnp.float32))
    )
    order = np.argsort(-logits, axis=1)
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(33), data.labels]
    hit, top5 = order[:, 0] == data.labels, (order[:, :5] == data.labels[:, None]).any(1)
    for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33):
        part = Split(data.images[:n], data.labels[:n])
        result = evaluate(state, ResidentLoader(part, 16, seed=0, mesh=mesh))
        assert result["accuracy"] == np.float32(hit[:n].sum()) / np.float32(n)
        assert result["accuracy_top5"] == np.float32(top5[:n].sum()) / np.float32(n)
        np.testing.assert_allclose(result["loss"], losses[:n].mean(), rtol=1e-5)
    assert len(traces) == 2, "one for its shapes, one to compile it, for splits of any size"


def test_top5_with_fewer_classes():
    model = create_model("lenet5", 3)
    mesh = create_mesh(1)
    state = create_train_state(model, optax.sgd(0.1), (32, 32, 3), seed=0, mesh=mesh)
    batch = {"image": jnp.zeros((4, 32, 32, 3), jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    step = functools.partial(eval_step, model=model, mean=MEAN, std=STD)
    sums = jax.jit(step)(state, {**batch, "mask": jnp.ones(4)})
    assert float(sums.accuracy_top5.compute()) == 1.0


def test_batch_that_devices_cannot_share():
    with pytest.raises(
        ConfigError, match=r"batch_size 30 cannot be split over 8 devices\. Fix: use 24 or 32"
    ):
        check_batch_size(30, create_mesh(8))
    check_batch_size(32, create_mesh(8))
