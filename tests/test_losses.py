"""Losses against NumPy, and against gradients that are known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from classic_cnns import config as config_lib
from classic_cnns.data import create_dataset
from classic_cnns.data.order import Order
from classic_cnns.errors import ConfigError
from classic_cnns.losses import LOSSES, class_weights, create_loss, focal, logit_adjustment, mixed
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import train_step
from classic_cnns.train_state import create_train_state

pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 4)).astype(np.float32) * 2
LABELS = RNG.integers(0, 4, 6).astype(np.int32)
TARGETS = np.eye(4)[LABELS]
P = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
SIGMOID = 1 / (1 + np.exp(-LOGITS))

BY_HAND = {
    "cross_entropy": lambda t: -(t * np.log(P)).sum(1),
    "bce": lambda t: -(t * np.log(SIGMOID) + (1 - t) * np.log(1 - SIGMOID)).sum(1),
    "focal": lambda t: -(t * (1 - P) ** 2 * np.log(P)).sum(1),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_by_hand(name, smoothing):
    loss = create_loss(name, label_smoothing=smoothing)
    smooth = (1 - smoothing) * TARGETS + smoothing / 4
    np.testing.assert_allclose(loss(LOGITS, LABELS), BY_HAND[name](smooth), rtol=2e-5)
    soft = RNG.dirichlet(np.ones(4), 6)
    smooth = (1 - smoothing) * soft + smoothing / 4
    np.testing.assert_allclose(loss(LOGITS, soft), BY_HAND[name](smooth), rtol=2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_mixed_is_the_loss_of_the_mixed_target(name):
    share, other = RNG.random(6).astype(np.float32), LABELS[::-1]
    batch = {"label": LABELS, "label2": other, "share2": share}
    target = (1 - share)[:, None] * TARGETS + share[:, None] * np.eye(4)[other]
    weights = np.array([1.0, 2.0, 0.5, 3.0], np.float32)
    loss = create_loss(name, label_smoothing=0.1)
    np.testing.assert_allclose(mixed(loss, LOGITS, batch), loss(LOGITS, target), rtol=2e-5)
    weighted = create_loss(name, class_weights=weights)
    expected = (1 - share) * BY_HAND[name](TARGETS) * weights[LABELS]
    expected += share * BY_HAND[name](np.eye(4)[other]) * weights[other]
    np.testing.assert_allclose(mixed(weighted, LOGITS, batch), expected, rtol=2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_finite_in_half_precision_and_at_extremes(name):
    loss = create_loss(name, label_smoothing=0.1)
    logits = jnp.array([[3e4, -3e4, 0.0, 0.0], [-3e4, 3e4, 0.0, 0.0]], jnp.float16)
    value, grads = jax.value_and_grad(lambda x: loss(x, jnp.zeros(2, int)).mean())(logits)
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.isfinite(grads).all()


def test_focal_without_gamma_is_cross_entropy_and_stays_differentiable():
    np.testing.assert_allclose(
        focal(LOGITS, LABELS, gamma=0.0), BY_HAND["cross_entropy"](TARGETS), rtol=2e-5
    )
    sure = jnp.array([[60.0, 0.0, 0.0, 0.0]])
    grads = jax.grad(lambda x: focal(x, jnp.zeros(1, int), gamma=0.5).sum())(sure)
    assert np.isfinite(grads).all()


def test_class_weights_make_classes_count_the_same():
    weights = class_weights([6, 3, 0, 1])
    np.testing.assert_allclose(weights, [10 / 18, 10 / 9, 0, 10 / 3], rtol=1e-6)
    assert float(np.dot(weights, [6, 3, 0, 1])) == pytest.approx(10)


def test_logit_adjustment_moves_the_optimum_by_the_prior():
    """The gradient vanishes where softmax of the bare logits is the likelihood, not the posterior:
    with logits 0, it does when the labels come as often as the prior says.
    """
    counts = [6, 3, 1]
    labels = np.repeat(np.arange(3), counts)
    loss = create_loss(logit_adjustment=logit_adjustment(counts))
    grads = jax.grad(lambda x: loss(x, labels).sum())(jnp.zeros((10, 3)))
    np.testing.assert_allclose(grads.sum(0), [0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(
        logit_adjustment(counts, 2.0), 2 * np.log([0.6, 0.3, 0.1]), rtol=1e-6
    )


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r'"bcee". Fix: did you mean "bce"'):
        create_loss("bcee")
    with pytest.raises(ConfigError, match="label_smoothing is 1"):
        create_loss(label_smoothing=1.0)


def test_the_config_reaches_the_loss():
    dataset = create_dataset("fake", seed=0)
    counts = dataset.train.counts(10)
    logits, labels = jnp.zeros((10, 10)), np.arange(10)
    for balance, factor in (("none", np.ones(10)), ("class_weights", class_weights(counts))):
        config = ConfigDict(
            {"loss": "bce", "label_smoothing": 0.0, "data": {"balance": balance}, "seed": 0}
        )
        loss = config_lib.loss_from(config, dataset)
        np.testing.assert_allclose(loss(logits, labels), 10 * np.log(2) * factor, rtol=1e-5)


@pytest.mark.parametrize("balance", ["class_weights", "logit_adjustment", "sampler"])
def test_balancing_raises_the_recall_of_a_rare_class(balance):
    """Two overlapping clouds, 20 to 1: unbalanced, a linear classifier hardly sees the rare one."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], [1000, 50]).astype(np.int32)
    x = (rng.normal(size=(1050, 2)) + 1.5 * labels[:, None]).astype(np.float32)
    counts = np.bincount(labels)

    def recalls(balance):
        loss = create_loss(
            class_weights=class_weights(counts) if balance == "class_weights" else None,
            logit_adjustment=logit_adjustment(counts) if balance == "logit_adjustment" else None,
        )
        order = Order(1050, 105, seed=0)
        if balance == "sampler":
            order = Order.balanced(labels, 105, seed=0)

        @jax.jit
        def step(w, index):
            x1 = jnp.asarray(x)[index]
            grad = jax.grad(lambda w: loss(x1 @ w[:2] + w[2:], jnp.asarray(labels)[index]).mean())
            return w - 0.3 * grad(w)

        w = jnp.zeros((3, 2))
        for s in range(300):
            w = step(w, order.step(s)[0])
        right = np.asarray(x @ w[:2] + w[2:]).argmax(1) == labels
        return right[labels == 0].mean(), right[labels == 1].mean()

    _, missed = recalls("none")
    assert missed < 0.6
    common, rare = recalls(balance)
    assert rare > missed + 0.2
    assert common > 0.75
    # The balance is that of the classes' sizes: both are recognised about equally often.
    assert abs(common - rare) < 0.15


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_a_step_descends_any_loss_of_logits_and_labels():
    model, tx = Linear(), optax.sgd(1e-3)
    state = create_train_state(model, tx, (8, 8, 3), seed=0, mesh=create_mesh(1))
    rng = np.random.default_rng(1)
    batch = {
        "image": rng.integers(0, 256, (8, 8, 8, 3), np.uint8),
        "label": np.arange(8, dtype=np.int32),
    }

    def squares(logits, labels):
        return jnp.square(logits - jax.nn.one_hot(labels, 10)).sum(-1)

    new, out = train_step(
        state, batch, model=model, tx=tx, mean=(0.5,) * 3, std=(0.5,) * 3, loss=squares
    )
    np.testing.assert_allclose(out["loss"], squares(out["logits"], batch["label"]), rtol=1e-6)

    def total(params):
        logits = model.apply(
            {"params": params}, jnp.asarray(batch["image"]) / 127.5 - 1, train=True
        )
        return squares(logits, batch["label"]).mean()

    assert float(total(new.params)) < float(total(state.params))
