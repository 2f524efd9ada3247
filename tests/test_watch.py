"""Each reason why a network would not learn, provoked; silence where all is well."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from classic_cnns import config as config_lib
from classic_cnns import watch
from classic_cnns.durations import durations
from classic_cnns.header import describe
from classic_cnns.models import create_model
from classic_cnns.models.layers import BatchNorm, Conv
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import train_step
from classic_cnns.train_state import TrainState, abstract_train_state, create_train_state
from tests.test_package import CONFIGS, load_config

pytestmark = pytest.mark.usefixtures("quick_compile")

MEAN, STD = (0.5,) * 3, (0.29,) * 3
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8),
    "label": np.arange(16, dtype=np.int32) % 5,
}


class Net(nn.Module):
    spread: float = 1.0
    bias: float = 0.0
    depth: int = 3
    width: int = 8
    num_classes: int = 5

    @nn.compact
    def __call__(self, x, *, train=False):
        for i in range(self.depth):
            init = nn.initializers.variance_scaling(2.0 * self.spread, "fan_in", "normal")
            bias = nn.initializers.constant(self.bias if i == 1 else 0.0)
            x = Conv(self.width, (3, 3), kernel_init=init, bias_init=bias, name=f"conv{i}")(x)
            x = nn.relu(x)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = Conv(8, (3, 3), padding=((1, 1), (1, 1)), name="conv1")(x)
        return BatchNorm(not train, scale_init=nn.initializers.zeros, name="bn1")(x)


class ZeroBranch(nn.Module):
    num_classes: int = 5

    @nn.compact
    def __call__(self, x, *, train=False):
        x = Conv(8, (3, 3), padding=((1, 1), (1, 1)), name="conv_init")(x)
        x = nn.relu(x + Block(name="block1")(x, train))
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


def look(model, optimizer="sgd", rate=0.01, mean=MEAN, std=STD, gradient=True, given=None):
    tx = optax.sgd(rate)
    state = create_train_state(
        model, tx, (32, 32, 3), seed=0, mesh=create_mesh(1), given=given or {}
    )
    step = functools.partial(train_step, model=model, tx=tx, mean=mean, std=std)
    return watch.first_batch(state, BATCH, step, optimizer, rate, gradient)


@pytest.mark.parametrize("model", [Net(), ZeroBranch()])
def test_silence_where_all_is_well(model):
    assert look(model) == []


@pytest.mark.parametrize(
    ("std", "text"),
    [((1 / 255,) * 3, "mean 127 and deviation 74"), ((1.0,) * 3, "mean 0.499 and deviation 0.291")],
)
def test_images_that_are_not_normalised(std, text):
    (line,) = look(Net(), mean=(0.0,) * 3, std=std, gradient=False)
    assert line.startswith("WARNING normalised images have mean ")
    assert "Fix: the mean and std of the data" in line
    assert text in line


def test_a_coarse_stem_is_named():
    (line,) = look(create_model("resnet10", 5, stem="imagenet"), gradient=False)
    assert "leaves 1 px of images of 32 px. Fix: model.options.stem=cifar" in line


def test_a_high_rate_without_batch_norm():
    deep = Net(depth=7)
    assert look(deep, rate=0.01, gradient=False) == []
    (line,) = look(deep, rate=0.1, gradient=False)
    assert "8 layers without BatchNorm start with sgd at rate 0.1" in line
    assert "Fix: schedule.warmup_epochs=5" in line
    assert len(look(deep, "adam", 0.01, gradient=False)) == 1
    assert look(deep, "prodigy", 1.0, gradient=False) == []  # whose rate is a factor
    assert look(Net(), rate=0.1, gradient=False) == []


def test_dead_units_and_the_gradient_they_stop():
    text = "\n".join(look(Net(bias=-100.0)))
    assert "hardly any gradient reaches conv0, conv1, conv2" in text
    assert "Fix: the default model.options.weight_init" in text


def test_units_that_are_dead_in_one_layer():
    bias = np.full(32, -100.0, np.float32)
    bias[:2] = 0.5
    (line,) = look(Net(depth=1, width=32), given={("params", "conv0", "bias"): bias})
    assert "no image activates (dead ReLUs): conv0 94%. Fix: the default model.op" in line
    bias[:8] = 0.5
    assert look(Net(depth=1, width=32), given={("params", "conv0", "bias"): bias}) == []


def test_vanishing_gradients_name_their_layers():
    (line,) = look(Net(spread=1e-6, depth=5))
    assert "hardly any gradient reaches conv0" in line
    assert "head" in line.split("(")[1]  # the norms themselves


def test_a_first_loss_far_above_chance():
    head = np.random.default_rng(0).normal(0, 100, (8, 5)).astype(np.float32)
    lines = look(Net(), given={("params", "head", "kernel"): head})
    assert "guessing 5 classes gives 1.61" in lines[0]


def test_a_gradient_that_is_not_finite():
    head = np.full((8, 5), np.nan, np.float32)
    text = "\n".join(look(Net(), given={("params", "head", "kernel"): head}))
    assert "the first loss is nan" in text
    assert "the gradient of conv0 is not finite. Fix: model.dtype=float32" in text


@pytest.mark.parametrize(("warmup", "warned"), [(30, False), (31, True)])
def test_a_warm_up_that_leaves_no_time_to_fall(config, tmp_path, warmup, warned):
    config.schedule.warmup_steps = warmup  # of 60
    dataset = config_lib.dataset_from(config)
    model = config_lib.model_from(config, dataset.num_classes, dataset.image_shape)
    spans = durations(config, len(dataset.train))
    state = abstract_train_state(model, optax.sgd(0.1), dataset.image_shape)
    lines = describe(config, dataset, model, state, create_mesh(1), spans, tmp_path, 0)
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert len(warnings) == warned
    assert not warned or "rises for 31 of 60 steps" in warnings[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_no_config_here_is_warned_of(path):
    """Input, stem and rate; nothing is computed."""
    config = load_config(path)
    side = config.data.image_size or 32
    model = config_lib.model_from(config, 10, (side, side, 3))
    tx, schedule = config_lib.optimizer_from(config, durations(config, 45_000))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    state = TrainState(
        jnp.zeros((), jnp.int32), shapes["params"], shapes.get("batch_stats", {}), ()
    )
    step = functools.partial(train_step, model=model, tx=tx, mean=MEAN, std=STD)
    rate = float(schedule(0))
    assert watch.first_batch(state, BATCH, step, config.optimizer.name, rate) == []
