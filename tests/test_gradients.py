"""Batches computed in parts, and gradients taken uphill, against plain ones."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from classic_cnns import create_model
from classic_cnns.data.augment import create_augment
from classic_cnns.errors import ConfigError
from classic_cnns.losses import cross_entropy
from classic_cnns.models.layers import BatchNorm
from classic_cnns.sharding import check_batch_size, create_mesh, shard_batch
from classic_cnns.steps import train_step
from classic_cnns.train_state import create_train_state

pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.integers(0, 256, (32, 4, 4, 3), np.uint8),
    "label": RNG.integers(0, 5, 32).astype(np.int32),
}
TX = optax.sgd(0.1, momentum=0.9)


class Network(nn.Module):
    norm: bool = False
    impl: str = "auto"

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(8, name="first")(x.reshape(len(x), -1))
        x = BatchNorm(not train, name="bn")(x) if self.norm else x
        return nn.Dense(5, name="head")(nn.relu(x))


def steps(count=2, devices=1, norm=False, impl="auto", **settings):
    model, mesh = Network(norm, impl), create_mesh(devices)
    state = create_train_state(model, TX, (4, 4, 3), seed=0, mesh=mesh)
    one = functools.partial(
        train_step, model=model, tx=TX, mean=(0.5,) * 3, std=(0.5,) * 3, **settings
    )
    one = jax.jit(one)
    for _ in range(count):
        state, out = one(state, shard_batch(BATCH, mesh))
    return jax.device_get((state, out))


@pytest.mark.parametrize(("devices", "impl"), [(1, "auto"), (8, "auto"), (8, "lax")])
def test_parts_give_the_update_of_the_whole(devices, impl):
    augment = create_augment(mixup_alpha=0.5, flip="random")
    whole = steps(augment=augment)
    parts = steps(augment=augment, devices=devices, impl=impl, accumulate_steps=4)
    for a, b in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["auto", "lax"])
def test_parts_are_computed_in_the_memory_of_one(impl):
    def memory(parts):
        model, mesh = create_model("lenet5", 10, impl=impl), create_mesh(1)
        state = create_train_state(model, TX, (32, 32, 3), seed=0, mesh=mesh)
        one = functools.partial(train_step, model=model, tx=TX, mean=(0.5,) * 3, std=(0.5,) * 3)
        images = jax.ShapeDtypeStruct((256, 32, 32, 3), jnp.uint8)
        batch = {"image": images, "label": jax.ShapeDtypeStruct((256,), jnp.int32)}
        step = jax.jit(functools.partial(one, accumulate_steps=parts))
        compiled = step.lower(state, batch).compile()
        loops = len(re.findall(" while\\(", compiled.as_text()))
        return compiled.memory_analysis().temp_size_in_bytes, loops

    (whole, before), (parts, loops) = memory(1), memory(4)
    if impl == "lax" and jax.default_backend() == "cpu":  # where a loop would take XLA's slow form
        assert loops == before
    else:
        assert parts < whole / 2


def test_batchnorm_sees_each_part_and_moves_with_each():
    state, out = steps(count=1, norm=True, accumulate_steps=2)
    start = create_train_state(Network(True), TX, (4, 4, 3), seed=0, mesh=create_mesh(1))
    first = start.params["first"]
    pixels = BATCH["image"].reshape(32, -1) / 127.5 - 1
    features = pixels @ np.asarray(first["kernel"]) + np.asarray(first["bias"])
    mean = np.zeros(8)
    for i in range(2):
        mean = 0.9 * mean + 0.1 * features[i::2].mean(0)
    np.testing.assert_allclose(state.batch_stats["bn"]["mean"], mean, rtol=1e-4, atol=1e-5)
    assert out["logits"].shape == (32, 5)


def test_sam_takes_the_gradient_uphill():
    state, out = steps(count=1, sam_rho=0.5, accumulate_steps=2)
    start = create_train_state(Network(), TX, (4, 4, 3), seed=0, mesh=create_mesh(1)).params
    images = jnp.asarray(BATCH["image"]) / 127.5 - 1

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return cross_entropy(Network().apply({"params": params}, images), BATCH["label"]).mean()

    value, grads = loss(start)
    norm = np.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)))
    _, uphill = loss(jax.tree.map(lambda p, g: p + 0.5 * g / norm, start, grads))
    np.testing.assert_allclose(out["loss"].mean(), value, rtol=1e-5)
    for a, p, g in zip(*map(jax.tree.leaves, (state.params, start, uphill)), strict=True):
        np.testing.assert_allclose(a, p - 0.1 * g, rtol=1e-4, atol=1e-6)


def test_parts_that_devices_cannot_share():
    with pytest.raises(ConfigError, match=r"split over 8 devices in 3 parts. Fix: use 24 or 48"):
        check_batch_size(32, create_mesh(8), 3)
    with pytest.raises(ConfigError, match="accumulate_steps is 0"):
        check_batch_size(32, create_mesh(8), 0)
    check_batch_size(48, create_mesh(8), 3)
