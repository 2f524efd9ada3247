"""Learning rate, decay and freezing by name, and BatchNorm that keeps its statistics."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from classic_cnns import config as config_lib
from classic_cnns import rules
from classic_cnns.config import flatten
from classic_cnns.durations import durations
from classic_cnns.errors import ConfigError
from classic_cnns.models import create_model
from classic_cnns.optimizers import create_optimizer
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import train_step
from classic_cnns.train_state import create_train_state

pytestmark = pytest.mark.usefixtures("quick_compile")

PARAMS = {
    "stem": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "head": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.ones(2)},
}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)


def update(name, given, **settings):
    tx = create_optimizer(name, 0.1, rules=given, **settings)
    state = tx.init(PARAMS)
    return jax.jit(tx.update)(GRADS, state, PARAMS)[0], state


def values(updates):
    return {f"{a}/{b}": float(v.ravel()[0]) for a, part in updates.items() for b, v in part.items()}


def test_the_first_rule_that_matches_decides():
    given = (("head/bias", {"lr": 5.0}), ("^head", {"lr": 10.0}), ("^stem", {"frozen": True}))
    got, state = update("sgd", given, momentum=0.9, nesterov=False)
    expected = {"stem/kernel": 0, "stem/bias": 0, "head/kernel": -1.0, "head/bias": -0.5}
    assert values(got) == pytest.approx(expected)
    assert sum(a.size for a in jax.tree.leaves(state)) == 4 + 2  # momentum of head
    assert rules.match(given, PARAMS) == [
        ["head/bias"],
        ["head/kernel"],
        ["stem/bias", "stem/kernel"],
    ]
    lines = rules.describe(given, PARAMS)
    assert lines[2].endswith(
        "^stem: frozen=True on 2 tensors with 6 parameters: stem/bias, stem/kernel"
    )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_by_name(name):
    """A rule's decay counts even for a bias; the others keep theirs, and none on biases."""
    given = (("head", {"weight_decay": 0.5}), ("stem/nothing|stem/bias", {"lr": 1.0}))
    with_decay, _ = update(name, given, weight_decay=0.1)
    without, _ = update(name, ())
    scale = 1.9 if name == "sgd" else 1.0  # of the first step with Nesterov's momentum
    got = {k: (values(without)[k] - v) / (0.1 * scale) for k, v in values(with_decay).items()}
    expected = {"stem/kernel": 0.1, "stem/bias": 0.0, "head/kernel": 1.0, "head/bias": 0.5}
    assert got == pytest.approx(expected, abs=1e-5)


def test_mistakes_are_named_together():
    tx = create_optimizer("sgd", 0.1, rules=(("hed", {"lr": 2.0}), ("stem", {"lr": 1.0})))
    with pytest.raises(ConfigError, match=r'"hed" matches no parameter.*head/bias'):
        tx.init(PARAMS)
    shadowed = (("stem", {"lr": 2.0}), ("stem/bias", {"lr": 1.0}))
    with pytest.raises(ConfigError, match=r'"stem/bias" matches no'):
        create_optimizer("sgd", 0.1, rules=shadowed).init(PARAMS)
    wrong = (("(", {}), ("a", {"lr": -1}), ("b", {"decay": 1.0}), ("c", {"frozen": 1}), "d")
    with pytest.raises(ConfigError) as error:
        create_optimizer("sgd", 0.1, rules=wrong)
    for text in ("'('", "a: lr is -1", 'unknown setting "decay"', "c: frozen is 1", "'d' is not"):
        assert text in str(error.value)
    with pytest.raises(ConfigError, match="finds its own rate"):
        create_optimizer("prodigy", 1.0, rules=(("a", {"lr": 2.0}),))


def test_rules_of_a_config_and_of_its_json(config):
    config.optimizer.rules = (("bias", {"frozen": True}), ("^head/", {"lr": 10.0}))
    assert flatten(json.loads(json.dumps(config.to_dict()))) == flatten(config)
    tx, _ = config_lib.optimizer_from(config, durations(config, 100))
    zero, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert values_of_bias(zero) == [0.0, 0.0]


def values_of_bias(updates):
    return [float(part["bias"].sum()) for part in updates.values()]


def test_clipping_by_value_and_adaptively():
    got, _ = update("sgd", (), momentum=0.0, clip_value=0.25)
    assert set(values(got).values()) == {np.float32(-0.025)}
    # Units of kernels are columns: their norms are √2 and 2√2, those of the gradients √2.
    got = values(update("sgd", (), momentum=0.0, agc=0.25)[0])
    assert got["stem/kernel"] == pytest.approx(-0.025)
    assert got["head/kernel"] == pytest.approx(-0.1)  # the classifier is not limited
    with pytest.raises(ConfigError, match=r"clip_norm is -1.*agc is -2"):
        create_optimizer("sgd", 0.1, clip_norm=-1, agc=-2)


def test_fine_tuning_with_a_frozen_trunk_and_frozen_statistics():
    """Only the head moves, by what plain SGD on the evaluated features gives."""
    model = create_model("resnet10", 10, stage_sizes=(1,), freeze_bn=True)
    given = ((r"^(?!head/)", {"frozen": True}),)
    tx = create_optimizer("sgd", 0.1, momentum=0.0, rules=given)
    state = create_train_state(model, tx, (8, 8, 3), seed=0, mesh=create_mesh(1))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8, 3), np.uint8)
    labels = np.arange(4, dtype=np.int32)
    step = jax.jit(
        lambda s, b: train_step(
            s, b, model=model, tx=tx, mean=(0.0,) * 3, std=(1.0,) * 3, frozen=rules.frozen(given)
        )
    )
    new, out = step(state, {"image": images, "label": labels})
    jax.tree.map(np.testing.assert_array_equal, new.batch_stats, state.batch_stats)
    moved = {
        k
        for k in state.params
        for a, b in zip(*map(jax.tree.leaves, (state.params[k], new.params[k])), strict=True)
        if not np.array_equal(a, b)
    }
    assert moved == {"head"}
    logits = jax.jit(lambda s, x: model.apply(s.variables, x))(state, images / np.float32(255))
    np.testing.assert_allclose(out["logits"], logits, rtol=1e-4, atol=1e-5)
    error = jax.nn.softmax(logits) - jax.nn.one_hot(labels, 10)
    change = new.params["head"]["bias"] - state.params["head"]["bias"]
    np.testing.assert_allclose(change, -0.1 * error.mean(0), atol=1e-6)
    head = optax.tree.norm(
        jax.tree.map(lambda a, b: (a - b) / 0.1, state.params["head"], new.params["head"])
    )
    np.testing.assert_allclose(out["grad_norm"], head, rtol=1e-4)


@pytest.mark.parametrize("name", ["vgg11_bn", "googlenet"])
def test_other_networks_freeze_statistics_too(name, config):
    config.model.update(name=name, bn="frozen", options={"impl": "lax"})
    model = config_lib.model_from(config, 10, (32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))

    def statistics(variables, images):
        rngs = {"dropout": jax.random.key(0)}
        mutable = ["batch_stats", "aux_logits"]
        return model.apply(variables, images, train=True, mutable=mutable, rngs=rngs)[1][
            "batch_stats"
        ]

    program = jax.make_jaxpr(statistics)(variables, jnp.zeros((2, 32, 32, 3))).jaxpr
    assert len(program.outvars) == len(jax.tree.leaves(variables["batch_stats"])) > 0
    assert set(program.outvars) <= set(program.invars)  # every statistic leaves as it came
    config.model.bn = "freeze"
    with pytest.raises(ConfigError, match=r'model.bn is "freeze"'):
        config_lib.model_from(config, 10, (32, 32, 3))
