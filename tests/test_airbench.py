"""The fast CIFAR-10 network: whitening, identity at the start, and its recipe."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from seeded import normal, seeded_variables

import classic_cnns
from classic_cnns.models import create_model
from classic_cnns.models.airbench import dirac, whitening
from classic_cnns.models.lowering import conv
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import eval_step
from classic_cnns.task import from_images, task_from
from classic_cnns.train_state import TrainState
from configs import cifar10_fast

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("channels", [1, 3])
def test_whitened_patches_have_no_correlation(channels):
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(200, 8, 8, channels)) @ rng.normal(size=(channels, channels))
    smooth = mixed + np.roll(mixed, 1, 1) + np.roll(mixed, 1, 2)  # neighbours are alike
    kernel = whitening(smooth, epsilon=0.0)
    assert kernel.shape == (2, 2, channels, 8 * channels)
    out = conv(jnp.asarray(smooth, jnp.float32), jnp.asarray(kernel))
    out = np.asarray(out).reshape(-1, 8 * channels)
    half = 4 * channels
    np.testing.assert_allclose(out[:, :half].T @ out[:, :half] / len(out), np.eye(half), atol=1e-3)
    np.testing.assert_allclose(out[:, half:], -out[:, :half], atol=1e-5)


def test_directions_without_variance_are_not_blown_up():
    kernel = whitening(np.ones((4, 6, 6, 3)))
    assert np.abs(kernel).max() < 1 / np.sqrt(5e-4) + 1


def test_dirac_passes_its_input_on():
    x = normal(2, 5, 5, 3)
    kernel = jax.jit(dirac, static_argnums=1)(jax.random.key(1), (3, 3, 3, 7))
    out = jax.jit(functools.partial(conv, padding=((1, 1), (1, 1))))(x, kernel)
    np.testing.assert_allclose(out[..., :3], x, rtol=1e-5, atol=1e-6)
    others = np.asarray(kernel[..., 3:])
    assert np.abs(others).max() <= 27**-0.5
    assert np.abs(others.std() - 27**-0.5 / 3**0.5) < 0.02


def small_config(**data):
    config = cifar10_fast.get_config("fake")
    config.batch_size = 64
    config.num_epochs = 3.0
    config.data.update(data)
    return config


def test_the_first_layer_follows_from_the_images_and_stays(tmp_path):
    config = small_config(image_size=16)
    config.model.options.widths = (16, 32, 32)
    config.schedule.warmup_epochs = 1.0
    config.test_time_flip = True  # with the shift, six views
    task = task_from(config)
    given = from_images(task.model, task.dataset)
    state, summary = classic_cnns.train_and_evaluate(config, tmp_path)
    np.testing.assert_array_equal(state.params["whiten"]["kernel"], *given.values())
    assert not np.array_equal(state.params["whiten"]["bias"], np.zeros(24))
    for name in ("bn1_1", "bn3_2"):
        np.testing.assert_array_equal(state.params[name]["scale"], 1.0)
        assert np.abs(state.params[name]["bias"]).max() > 0
    assert summary["test_accuracy"] > 0.5
    flags = json.loads((tmp_path / "config.json").read_text())
    assert flags["test_time_flip"] is True


def test_encoded_images_give_the_filters_of_decoded_ones(tmp_path):
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    kernels = []
    for loader in ("stream", "resident"):
        task = task_from(
            small_config(source="folder", dir=str(tmp_path), image_size=16, loader=loader)
        )
        kernels += from_images(task.model, task.dataset).values()
    np.testing.assert_allclose(*kernels, rtol=1e-4, atol=1e-4)

    for path in (tmp_path / "a").iterdir():
        path.write_bytes(b"no image")  # passed over: the loader names it, or skips it
    task = task_from(
        small_config(source="folder", dir=str(tmp_path), image_size=16, loader="stream")
    )
    (kernel,) = from_images(task.model, task.dataset).values()
    assert np.isfinite(kernel).all()
    assert not np.allclose(kernel, kernels[0])


def test_mirrored_logits_are_averaged():
    model = create_model("airbench94", widths=(16, 32, 32))
    images = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), np.uint8)
    variables = seeded_variables(model, 12)
    variables["params"]["head"]["kernel"] *= 100  # logits far apart
    state = TrainState(jnp.zeros((), jnp.int32), variables["params"], variables["batch_stats"], ())
    batch = {"image": images, "label": jnp.arange(8), "mask": jnp.ones(8)}
    settings = {"model": model, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    step = jax.jit(functools.partial(eval_step, **settings), static_argnames=("flip", "shift"))
    apply = jax.jit(model.apply)

    def loss(batch, **extra):
        return jax.device_get(step(state, batch, **extra)).summary()["loss"]

    mirrored = batch | {"image": images[:, :, ::-1]}
    assert loss(batch, flip=True) == pytest.approx(loss(mirrored, flip=True), rel=1e-6)
    assert loss(batch) != pytest.approx(loss(mirrored), rel=1e-6)
    logits = [apply(variables, b["image"] / 255.0) for b in (batch, mirrored)]
    expected = -jax.nn.log_softmax(sum(logits) / 2)[jnp.arange(8), jnp.arange(8)].mean()
    assert loss(batch, flip=True) == pytest.approx(float(expected), rel=1e-5)

    def view(down, right):
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        moved = padded[:, 1 + down : 13 + down, 1 + right : 13 + right] / 255.0
        return sum(apply(variables, x) for x in (moved, moved[:, :, ::-1])) / 2

    six = view(0, 0) / 2 + view(1, 1) / 4 + view(-1, -1) / 4
    expected = -jax.nn.log_softmax(six)[jnp.arange(8), jnp.arange(8)].mean()
    assert loss(batch, flip=True, shift=1) == pytest.approx(float(expected), rel=1e-5)
    assert loss(batch, flip=True, shift=1) != pytest.approx(loss(batch, flip=True), rel=1e-3)


def test_a_mesh_of_eight_gets_the_same_filters():
    config = small_config()
    task = task_from(config)
    state = task.state(optax.sgd(1.0))
    assert len(state.params["whiten"]["kernel"].devices()) == create_mesh().size
    np.testing.assert_array_equal(
        state.params["whiten"]["kernel"], *from_images(task.model, task.dataset).values()
    )
