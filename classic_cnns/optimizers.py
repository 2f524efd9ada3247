"""Optimisers by name: everything optax has, with the decay rules of CNNs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from classic_cnns import rules as rules_lib
from classic_cnns.errors import ConfigError, nearest
from classic_cnns.rules import Rules

OPTIMIZERS = (
    "acprop", "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw",
    "adan", "ademamix", "adopt", "amsgrad", "cocob", "dadapt_adamw", "fromage", "lamb", "lars",
    "lion", "madgrad", "muon", "nadam", "nadamw", "novograd", "optimistic_adam_v2", "prodigy",
    "radam", "rmsprop", "rprop", "sgd", "sign_sgd", "signum", "simplified_ademamix", "sm3", "yogi",
)  # fmt: skip
WITHOUT_SCHEDULE = ("rprop", "sm3")  # in optax: they take numbers alone
OWN_RATE = ("cocob", "dadapt_adamw", "prodigy")
_DEFAULT = "weight_decay"  # marks parameters whose decay no rule says

# Constants that differ between frameworks, read from their sources. ε is always added to the
# corrected √v̂.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "optax": {},
    "keras": {
        "adam": {"eps": 1e-7},
        "nadam": {"eps": 1e-7},
        "adamax": {"eps": 1e-7},
        "adamw": {"eps": 1e-7},
        "rmsprop": {"decay": 0.9, "eps": 1e-7, "eps_in_sqrt": True},
        "adagrad": {"initial_accumulator_value": 0.1, "eps": 1e-7},
        "adadelta": {"rho": 0.95, "eps": 1e-7},
    },
    "torch": {
        "rmsprop": {"decay": 0.99, "eps": 1e-8, "eps_in_sqrt": False},
        "adagrad": {"initial_accumulator_value": 0.0, "eps": 1e-10},
        "adadelta": {"rho": 0.9, "eps": 1e-6},
    },
}


def create_optimizer(
    name: str,
    schedule: optax.Schedule | float,
    *,
    weight_decay: float | jax.Array = 0.0,
    clip_norm: float = 0.0,
    clip_value: float = 0.0,
    agc: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = True,
    rules: Rules = (),
    defaults: Literal["optax", "keras", "torch"] = "optax",
    **options: Any,
) -> optax.GradientTransformation:
    """An optimiser by its name in optax or optax.contrib.

    Weight decay is decoupled where the optimiser has its own (adamw, lamb, lion, …); otherwise it
    is added to the gradient before anything else, as PyTorch's SGD does. It spares biases and
    norms, see `decay_mask`. Those of `WITHOUT_SCHEDULE` are made with a rate of 1, and the learning
    rate multiplies their updates; for rprop, also the bounds of its steps.

    Args:
        name: one of `OPTIMIZERS`.
        schedule: learning rate, or a function of the step.
        weight_decay: coefficient, 0 for none; within a compiled function perhaps an argument of it.
        clip_norm: largest global norm of the gradient, 0 for no limit.
        clip_value: largest absolute value of a gradient, 0 for no limit.
        agc: largest ratio of the norms of gradient and weights, unit by unit (adaptive gradient
            clipping, Brock et al. 2021), 0 for no limit. The limits apply in the order agc,
            clip_value, clip_norm.
        momentum, nesterov: of sgd; the other optimisers take theirs as options.
        rules: learning rate ("lr", a factor of every update), "weight_decay" and "frozen" by name,
            see `rules`. What is frozen has no state.
        defaults: whose constants to take where optax, Keras and PyTorch differ, see `DEFAULTS`.
        **options: passed to the optax function, for example b1=0.95.

    Raises:
        ConfigError: unknown name or option, with the nearest valid ones; from `init` of the result,
            where a rule matches nothing.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f'unknown optimizer.name "{name}". Fix: {nearest(name, OPTIMIZERS)}')
    if defaults not in DEFAULTS:
        raise ConfigError(
            f'unknown optimizer.defaults "{defaults}". Fix: {nearest(defaults, DEFAULTS)}'
        )
    limits = {"clip_norm": clip_norm, "clip_value": clip_value, "agc": agc}
    if not isinstance(weight_decay, jax.Array):
        limits["weight_decay"] = weight_decay
    wrong = [f"{k} is {v}" for k, v in limits.items() if v < 0]
    if wrong:
        raise ConfigError(f"optimizer: {', '.join(wrong)}. Fix: use 0 or more")
    rules_lib.check(rules)
    make = _function(name)
    accepted = inspect.signature(make).parameters
    after = []
    if name in WITHOUT_SCHEDULE and callable(schedule):
        after, schedule = [optax.scale_by_schedule(schedule)], 1.0
    wrong = [f'"{k}" ({nearest(k, accepted)})' for k in options if k not in accepted]
    if wrong:
        raise ConfigError(f"optimizer.options of {name}: no {', '.join(wrong)}")
    settings = {**DEFAULTS[defaults].get(name, {}), **options}
    if name == "sgd":
        settings = {
            "momentum": momentum or None,
            "nesterov": nesterov and bool(momentum),
            **settings,
        }
    parts = [optax.adaptive_grad_clip(agc)] if agc else []
    parts += [optax.clip(clip_value)] if clip_value else []
    parts += [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    amounts = {_DEFAULT: weight_decay}
    amounts |= {str(s["weight_decay"]): s["weight_decay"] for _, s in rules if "weight_decay" in s}
    amounts = {k: v for k, v in amounts.items() if isinstance(v, jax.Array) or v}
    decay = rules_lib.setting(
        rules,
        "weight_decay",
        lambda p: jax.tree.map(lambda kernel: _DEFAULT if kernel else 0.0, decay_mask(p)),
    )
    # Of each parameter, its key in amounts, or "" for none.
    labels = lambda p: jax.tree.map(lambda d: str(d) if str(d) in amounts else "", decay(p))  # noqa: E731
    field = next((f for f in ("weight_decay", "weight_decay_rate") if f in accepted), None)
    mask = next((m for m in ("mask", "weight_decay_mask") if m in accepted), None)
    if field is None:
        if amounts:
            parts.append(_add_decay(labels, amounts))
        parts.append(make(schedule, **settings))
    else:
        chosen = any("weight_decay" in s for _, s in rules)
        if chosen and mask is None:
            raise ConfigError(f"{name} has one weight decay. Fix: no weight_decay in the rules")
        masking = {mask: lambda p: jax.tree.map(bool, labels(p))} if mask else {}
        none = {field: None if name == "adafactor" else 0.0}
        own = {k: make(schedule, **{field: v}, **masking, **settings) for k, v in amounts.items()}
        own[""] = make(schedule, **none, **settings)
        plain = own.get(_DEFAULT, own[""])
        parts.append(optax.partition(own, labels) if chosen else plain)
    if any("lr" in s for _, s in rules):
        if name in OWN_RATE:
            raise ConfigError(f"{name} finds its own rate. Fix: no lr in optimizer.rules")
        ones = lambda p: jax.tree.map(lambda _: 1.0, p)  # noqa: E731
        parts.append(_scale(rules_lib.setting(rules, "lr", ones)))
    parts += after
    tx = optax.chain(*parts) if len(parts) > 1 else parts[0]
    return _by_rules(tx, rules) if rules else tx


def _function(name: str) -> Callable[..., optax.GradientTransformation]:
    return getattr(optax, name, None) or getattr(optax.contrib, name)


def _by_rules(tx: optax.GradientTransformation, rules: Rules) -> optax.GradientTransformation:
    """Leaves out what is frozen, and checks at the start that each rule has something to decide."""
    if frozen := rules_lib.frozen(rules):
        parts = {"trained": tx, "frozen": optax.set_to_zero()}
        tx = optax.partition(
            parts, lambda p: jax.tree.map(lambda f: "frozen" if f else "trained", frozen(p))
        )

    def init(params: Any) -> Any:
        rules_lib.match(rules, params)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)  # type: ignore[arg-type]


def _add_decay(
    labels: Callable[[Any], Any], amounts: dict[str, Any]
) -> optax.GradientTransformation:
    def add(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda label, g, p: g + amounts[label] * p if label else g,
            labels(params),
            updates,
            params,
        )

    return optax.stateless(add)


def _scale(factors: Callable[[Any], Any]) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda f, u: f * u, factors(updates), updates)
    )


class LookaheadState(NamedTuple):
    """Steps so far (int32), the slow weights, and the state of the fast ones' optimiser."""

    done: jax.Array
    slow: Any
    inner: Any


def lookahead(
    tx: optax.GradientTransformation,
    steps: int,
    rate: float = 0.5,
    *,
    final_rate: float = 0.0,
    total_steps: int = 0,
) -> optax.GradientTransformation:
    """Slow weights that follow those of `tx` (Zhang et al. 2019, algorithm 1).

    After each `steps` updates of `tx` the slow weights go the share `rate` of the way to the fast
    ones, which go on from there. What is trained and evaluated are the fast weights; after a
    multiple of `steps`, and after `total_steps`, both are the same.

    With `final_rate` the share goes from `rate` to it with the cube of the part of `total_steps`
    that is done (Jordan 2024, arXiv:2404.00498, where it goes from 1 to 0.23).

    Raises:
        ConfigError: fewer than one step, or a rate that is no share.
    """
    if steps < 1 or not 0 < rate <= 1 or not 0 <= final_rate <= 1:
        raise ConfigError(
            f"optimizer.lookahead_steps is {steps}, lookahead_rate {rate}, lookahead_final_rate "
            f"{final_rate}. Fix: steps of 1 or more and shares above 0, up to 1 (final: 0 = none)"
        )
    if final_rate and total_steps < 1:
        raise ConfigError(
            "lookahead with a final_rate. Fix: total_steps, the length of the training"
        )

    def init(params: Any) -> LookaheadState:
        # A copy: the buffers of the parameters are donated.
        slow = jax.tree.map(jnp.copy, params)
        return LookaheadState(jnp.zeros((), jnp.int32), slow, tx.init(params))

    def update(updates: Any, state: LookaheadState, params: Any = None) -> Any:
        updates, inner = tx.update(updates, state.inner, params)
        done = state.done + 1
        meet = (done % steps == 0) | (done == total_steps)
        past = jnp.minimum(done, total_steps) / total_steps if final_rate else 0.0
        share = rate + (final_rate - rate) * past**3
        slow = jax.tree.map(
            lambda slow, p, u: jnp.where(meet, slow + share * (p + u - slow), slow),
            state.slow,
            params,
            updates,
        )
        updates = jax.tree.map(
            lambda slow, p, u: jnp.where(meet, slow - p, u), slow, params, updates
        )
        return updates, LookaheadState(done, slow, inner)

    return optax.GradientTransformation(init, update)


def schedule_free(
    name: str, schedule: optax.Schedule, beta: float, **settings: Any
) -> optax.GradientTransformation:
    """An optimiser whose average takes the place of a falling rate (Defazio et al. 2024).

    Gradients are taken at y = (1 − β) z + β x, which are the parameters; the optimiser moves z, and
    x is the average of z, see `schedule_free_average`. Momentum (of sgd) and b1 are 0: y has their
    part.

    Args:
        name, schedule: see `create_optimizer`; the rate should rise and then stay.
        beta: above 0, below 1.
        **settings: of `create_optimizer`.

    Raises:
        ConfigError: as `create_optimizer`; or frozen rules, which the average would move by
            rounding.
    """
    if not 0 < beta < 1:
        raise ConfigError(f"optimizer.schedule_free is {beta}. Fix: 0.9, say, or 0 = off")
    if rules_lib.frozen(settings.get("rules", ())):
        raise ConfigError("optimizer.schedule_free moves frozen weights. Fix: one of the two")
    if name == "sgd":
        settings["momentum"] = 0.0
    elif name in OPTIMIZERS and "b1" in inspect.signature(_function(name)).parameters:
        settings["b1"] = 0.0
    return optax.contrib.schedule_free(create_optimizer(name, schedule, **settings), schedule, beta)


def schedule_free_average(opt_state: Any, params: Any) -> Any:
    """The average x of `schedule_free`; None where the state is of another optimiser."""
    kind = optax.contrib.ScheduleFreeState
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    found = [node for node in leaves if isinstance(node, kind)]
    return optax.contrib.schedule_free_eval_params(found[0], params) if found else None


def decay_mask(params: Any) -> Any:
    """True for kernels, False for biases and norms: everything of fewer than two axes is spared."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
