"""Optimisers against hand-written recursions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from classic_cnns.averaging import lookahead, schedule_free, schedule_free_average
from classic_cnns.errors import ConfigError
from classic_cnns.optimizers import OPTIMIZERS, OWN_RATE, create_optimizer, decay_mask

PARAMS = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])}
FROZEN = (("bias", {"frozen": True}),)
GRADS = [
    {"kernel": jnp.array([[0.1, 0.3]]), "bias": jnp.array([-0.2])},
    {"kernel": jnp.array([[-0.4, 0.2]]), "bias": jnp.array([0.1])},
    {"kernel": jnp.array([[0.05, -0.6]]), "bias": jnp.array([0.3])},
]


def run(tx):
    params, state = PARAMS, tx.init(PARAMS)
    for grads in GRADS:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def by_hand(step):
    """Applies step(p, g, memory, t, decayed) to both tensors."""
    out = {}
    for name, p in PARAMS.items():
        p, memory = np.asarray(p, np.float64), {}
        for t, grads in enumerate(GRADS, 1):
            p = step(p, np.asarray(grads[name], np.float64), memory, t, name == "kernel")
        out[name] = p
    return out


def same(a, b):
    for name in PARAMS:
        np.testing.assert_allclose(a[name], b[name], rtol=2e-5)


def test_sgd_is_pytorchs_with_l2_on_kernels_alone():
    def step(p, g, memory, t, decayed):
        g = g + 0.01 * p * decayed
        memory["m"] = 0.9 * memory.get("m", 0) + g
        return p - 0.1 * (g + 0.9 * memory["m"])

    same(run(create_optimizer("sgd", 0.1, weight_decay=0.01)), by_hand(step))


def test_adamw_decays_apart_from_the_gradient_and_only_kernels():
    def step(p, g, memory, t, decayed):
        memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
        memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
        m, v = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.999**t)
        return p - 0.1 * (m / (np.sqrt(v) + 1e-8) + 0.01 * p * decayed)

    same(run(create_optimizer("adamw", 0.1, weight_decay=0.01)), by_hand(step))


def test_adamw_without_decay_has_none():
    same(run(create_optimizer("adamw", 0.1)), run(create_optimizer("adam", 0.1)))


@pytest.mark.parametrize(
    ("defaults", "start", "eps"),
    [("optax", 0.1, 1e-7), ("keras", 0.1, 1e-7), ("torch", 0.0, 1e-10)],
)
def test_adagrad_of_each_framework(defaults, start, eps):
    def step(p, g, memory, t, decayed):
        memory["s"] = memory.get("s", start) + g**2
        return p - 0.1 * g / np.sqrt(memory["s"] + eps)

    same(run(create_optimizer("adagrad", 0.1, defaults=defaults)), by_hand(step))


def test_adagrad_of_torch_has_epsilon_outside_the_root():
    small = {"kernel": jnp.full((1, 2), 1e-8)}
    tx = create_optimizer("adagrad", 1.0, defaults="torch")
    updates, _ = tx.update(small, tx.init(small), small)
    np.testing.assert_allclose(updates["kernel"], -1e-8 / (1e-8 + 1e-10), rtol=0.02)


def test_rmsprop_of_torch_has_epsilon_outside_the_root():
    def step(p, g, memory, t, decayed):
        memory["s"] = 0.99 * memory.get("s", 0) + 0.01 * g**2
        return p - 0.1 * g / (np.sqrt(memory["s"]) + 1e-8)

    same(run(create_optimizer("rmsprop", 0.1, defaults="torch")), by_hand(step))


def test_clipping_limits_the_global_norm():
    tx = create_optimizer("sgd", 1.0, momentum=0.0, clip_norm=0.1)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    assert abs(float(optax.tree.norm(updates)) - 0.1) < 1e-6


def test_lookahead_goes_part_of_the_way_every_second_step():
    def step(p, g, memory, t, decayed):
        slow = memory.setdefault("slow", p)
        memory["m"] = 0.9 * memory.get("m", 0) + g
        p = p - 0.1 * memory["m"]
        if t % 2 == 0:
            memory["slow"] = p = slow + 0.3 * (p - slow)
        return p

    same(run(lookahead(create_optimizer("sgd", 0.1, nesterov=False), 2, 0.3)), by_hand(step))

    def falling(p, g, memory, t, decayed):
        slow = memory.setdefault("slow", p)
        p = p - 0.1 * g
        if t in (2, 3):  # the last step counts, too
            memory["slow"] = p = slow + (0.9 - 0.6 * (t / 3) ** 3) * (p - slow)
        return p

    tx = create_optimizer("sgd", 0.1, momentum=0.0)
    same(run(lookahead(tx, 2, 0.9, final_rate=0.3, total_steps=3)), by_hand(falling))
    with pytest.raises(ConfigError, match="total_steps"):
        lookahead(tx, 2, final_rate=0.3)
    for wrong in ((0, 0.5), (2, 0.0), (2, 1.5)):
        with pytest.raises(ConfigError, match=r"lookahead_steps is .* Fix: steps of 1 or more"):
            lookahead(optax.sgd(0.1), *wrong)


def test_schedule_free_is_the_papers_and_its_average_is_what_counts():
    """z moves by the gradient at y = 0.1 z + 0.9 x; x is the mean of z, weighted by rate²,
    of which optax takes the next step's: 0.1 at each of these.
    """
    rates = [0.05, 0.1, 0.1]  # a warm-up

    schedule = lambda step: jnp.asarray([0.05, 0.1, 0.1, 0.1])[step]  # noqa: E731
    tx = schedule_free("sgd", schedule, 0.9, weight_decay=0.01)
    params, state = PARAMS, tx.init(PARAMS)
    assert schedule_free_average(optax.sgd(0.1).init(PARAMS), PARAMS) is None
    for grads in GRADS:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    average = schedule_free_average(state, params)
    for name in PARAMS:
        z = x = np.asarray(PARAMS[name], np.float64)
        for number, (rate, grads) in enumerate(zip(rates, GRADS, strict=True), 1):
            y = 0.1 * z + 0.9 * x
            decay = 0.01 * y if name == "kernel" else 0.0
            z = z - rate * (np.asarray(grads[name], np.float64) + decay)
            x = x + (z - x) / number
        np.testing.assert_allclose(params[name], 0.1 * z + 0.9 * x, rtol=2e-5)
        np.testing.assert_allclose(average[name], x, rtol=2e-5)
    for beta, rules, text in ((1.0, (), "schedule_free is 1.0"), (0.9, FROZEN, "frozen weights")):
        with pytest.raises(ConfigError, match=f"{text}.* Fix:"):
            schedule_free("sgd", 0.1, beta, rules=rules)
    assert schedule_free("adamw", 0.1, 0.9, weight_decay=0.01).init(PARAMS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_moves_and_takes_decay(name):
    own = name in OWN_RATE  # begins with very small steps
    rate = 1.0 if own else 0.01
    moved = run(create_optimizer(name, lambda _: rate, weight_decay=0.1))
    least = 0 if own else 1e-5
    assert np.abs(moved["kernel"] - PARAMS["kernel"]).max() > least
    assert all(np.isfinite(v).all() for v in moved.values())


def test_decay_spares_biases_and_norms():
    assert decay_mask({"kernel": jnp.ones((3, 3, 1, 2)), "scale": jnp.ones(2)}) == {
        "kernel": True,
        "scale": False,
    }


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("name", sorted({*OPTIMIZERS} - {"fromage"}))  # that shrinks everything
def test_every_optimiser_spares_biases_and_norms(name):
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    tx = create_optimizer(name, 0.05, weight_decay=0.1)
    state = tx.init(params)
    for _ in range(20):
        grads = {"kernel": 2 * (params["kernel"] - 3), "scale": jnp.zeros(2)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    start = 1e-3 if name == "yogi" else 0  # whose momentum does not begin with zero
    np.testing.assert_allclose(params["scale"], 1, rtol=start)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "nadamw"])
def test_decoupled_decay_is_a_share_of_the_rate(name):
    params = {"conv": {"kernel": jnp.ones((3, 3, 4, 4))}, "head": {"kernel": jnp.ones((8, 2))}}
    tx = create_optimizer(name, lambda _: 0.5, weight_decay=0.2)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, -0.1, rtol=1e-5)


@pytest.mark.usefixtures("quick_compile")
def test_muon_makes_the_matrix_of_a_convolution_orthogonal_and_leaves_the_head_to_adam():
    keys = jax.random.split(jax.random.key(0), 2)
    grads = {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 4, 8))},
        "head": {"kernel": jax.random.normal(keys[1], (8, 5)), "bias": jnp.ones(5)},
    }
    params = jax.tree.map(jnp.ones_like, grads)
    tx = create_optimizer("muon", 0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    matrix = -np.asarray(updates["conv"]["kernel"]).reshape(36, 8) / 0.1
    assert (np.abs(np.linalg.svd(matrix, compute_uv=False) - 1) < 0.4).all()
    assert (np.linalg.svd(np.asarray(grads["conv"]["kernel"]).reshape(36, 8))[1] > 2).all()
    adam = optax.nadam(0.1)
    expected, _ = adam.update(grads["head"], adam.init(params["head"]), params["head"])
    for name, value in expected.items():
        np.testing.assert_allclose(updates["head"][name], value, rtol=1e-6)


def test_numbers_that_are_none_are_named():
    for settings, text in (
        ({"clip_norm": float("nan"), "agc": -1}, r"clip_norm is nan.*agc is -1"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"rules": (("a", {"lr": float("nan")}),)}, "a: lr is nan"),
        ({"learning_rate": 0.1}, 'no "learning_rate"'),
    ):
        with pytest.raises(ConfigError, match=text):
            create_optimizer("sgd", 0.1, **settings)
    with pytest.raises(ConfigError, match="freeze everything"):
        create_optimizer("sgd", 0.1, rules=((".", {"frozen": True}),)).init(PARAMS)


def test_wrong_names_say_the_nearest():
    with pytest.raises(ConfigError, match=r'"adm".*did you mean "adam"'):
        create_optimizer("adm", 0.1)
    with pytest.raises(ConfigError, match=r'no "beta1" .*one of .*b1'):
        create_optimizer("adam", 0.1, beta1=0.9)
    with pytest.raises(ConfigError, match=r'defaults "kras".*"keras"'):
        create_optimizer("adam", 0.1, defaults="kras")


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rate_and_decay_may_be_arguments_of_a_compiled_function(name):
    rules = (("bias", {"weight_decay": 0.03}),)

    def train(rate, decay):
        schedule = lambda step: rate / (1 + step)  # noqa: E731
        return run(create_optimizer(name, schedule, weight_decay=decay, rules=rules))

    expected = train(0.1, 0.02)
    if name not in (*OWN_RATE, "rprop", "sign_sgd", "signum"):  # which see signs alone
        assert not np.array_equal(expected["kernel"], train(0.1, 0.01)["kernel"])
    compiled = jax.jit(train)(0.1, 0.02)
    for key, value in expected.items():
        np.testing.assert_allclose(compiled[key], value, rtol=1e-4, atol=1e-6)
