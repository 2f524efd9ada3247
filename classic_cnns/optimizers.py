"""Optimisers by name: everything optax has, with the decay rules of CNNs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

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
# In optax: the first's decay is not multiplied by the rate, the others take numbers alone.
WITHOUT_SCHEDULE = ("adafactor", "rprop", "sm3")
OWN_RATE = ("cocob", "dadapt_adamw", "prodigy")
_DEFAULT = "weight_decay"  # marks parameters whose decay no rule says

# Constants that differ between frameworks, read from their sources. ε is added to the corrected
# √v̂, but Adagrad's in optax to the sum under the root: PyTorch's 1e-10 beside it is 1e-20 there.
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
        "adagrad": {"initial_accumulator_value": 0.0, "eps": 1e-20},
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

    Weight decay is decoupled where the optimiser has its own (adamw, lamb, lion, …); otherwise, and
    for prodigy and dadapt_adamw, which could not spare any tensor, it is added to the gradient
    before anything else, as PyTorch's SGD does. It spares biases and norms, see `decay_mask`. Those
    of `WITHOUT_SCHEDULE` are made with a rate of 1, and the learning rate multiplies their updates;
    for rprop, also the bounds of its steps, for adafactor, also the decay. Muon is for kernels,
    those of convolutions as matrices of inputs and outputs; its Adam has the classifier ("head"),
    biases and norms.

    Args:
        name: one of `OPTIMIZERS`.
        schedule: learning rate, or a function of the step.
        weight_decay: coefficient, 0 for none; within a compiled function perhaps an argument of it.
        clip_norm: largest global norm of the gradient, 0 for no limit.
        clip_value: largest absolute value of a gradient, 0 for no limit.
        agc: largest ratio of the norms of gradient and weights, unit by unit, of all but the
            classifier (adaptive gradient clipping, Brock et al. 2021), 0 for no limit. The limits
            apply in the order agc, clip_value, clip_norm.
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
    wrong = [f"{k} is {v}" for k, v in limits.items() if not 0 <= v < math.inf]
    wrong += [] if 0 <= momentum < 1 else [f"momentum is {momentum}"]
    if wrong:
        raise ConfigError(f"optimizer: {', '.join(wrong)}. Fix: 0 or more, and momentum below 1")
    rules_lib.check(rules)
    make = function(name)
    accepted = set(inspect.signature(make).parameters) - {"learning_rate"}
    after = []
    if name in WITHOUT_SCHEDULE and callable(schedule):
        after, schedule = [optax.scale_by_schedule(schedule)], 1.0
    hints = {"learning_rate": "that is optimizer.learning_rate"}
    wrong = [
        f'"{k}" ({hints.get(k) or nearest(k, accepted)})' for k in options if k not in accepted
    ]
    if wrong:
        raise ConfigError(f"optimizer.options of {name}: no {', '.join(wrong)}")
    settings = {**DEFAULTS[defaults].get(name, {}), **options}
    if name == "sgd":
        settings = {
            "momentum": momentum or None,
            "nesterov": nesterov and bool(momentum),
            **settings,
        }
    if name == "muon":
        settings = {"muon_weight_dimension_numbers": _matrices, **settings}
    parts = [optax.masked(optax.adaptive_grad_clip(agc), _but_head)] if agc else []
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
    if field is None or (mask is None and name in OWN_RATE):
        if amounts:
            parts.append(_add_decay(labels, amounts))
        parts.append(make(schedule, **settings))
    else:
        fields = ["weight_decay", "adam_weight_decay"] if name == "muon" else [field]
        apart = mask is None or name == "muon" or any("weight_decay" in s for _, s in rules)
        if mask and not apart:
            settings[mask] = lambda p: jax.tree.map(bool, labels(p))
        everywhere: dict[str, Any] = {**amounts, "": None if name == "adafactor" else 0.0}
        own = {
            k: make(schedule, **dict.fromkeys(fields, v), **settings) for k, v in everywhere.items()
        }
        plain = own.get(_DEFAULT, own[""])
        parts.append(optax.partition(own, labels) if apart and amounts else plain)
    if any("lr" in s for _, s in rules):
        if name in OWN_RATE:
            raise ConfigError(f"{name} finds its own rate. Fix: no lr in optimizer.rules")
        ones = lambda p: jax.tree.map(lambda _: 1.0, p)  # noqa: E731
        parts.append(_scale(rules_lib.setting(rules, "lr", ones)))
    parts += after
    tx = optax.chain(*parts) if len(parts) > 1 else parts[0]
    return _by_rules(tx, rules) if rules else tx


def function(name: str) -> Callable[..., optax.GradientTransformation]:
    """What optax or optax.contrib has under a name of `OPTIMIZERS`."""
    return getattr(optax, name, None) or getattr(optax.contrib, name)


def _matrices(params: Any) -> Any:
    """For Muon: which axes of a kernel are those of a matrix; None for what is none of its own."""

    def one(path: Any, p: Any) -> Any:
        if jnp.ndim(p) < 2 or _of_head(path):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(jnp.ndim(p) - 1)), jnp.ndim(p) - 1)

    return jax.tree_util.tree_map_with_path(one, params)


def _but_head(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: not _of_head(path), params)


def _of_head(path: Any) -> bool:
    return jax.tree_util.keystr(path[:1], simple=True) == "head"


def _by_rules(tx: optax.GradientTransformation, rules: Rules) -> optax.GradientTransformation:
    """Leaves out what is frozen, and checks at the start that each rule has something to decide."""
    if frozen := rules_lib.frozen(rules):
        parts = {"trained": tx, "frozen": optax.set_to_zero()}
        tx = optax.partition(
            parts, lambda p: jax.tree.map(lambda f: "frozen" if f else "trained", frozen(p))
        )

    def init(params: Any) -> Any:
        rules_lib.match(rules, params)
        if frozen and all(jax.tree.leaves(frozen(params))):
            raise ConfigError("optimizer.rules freeze everything. Fix: leave the head, ^head/, out")
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


def decay_mask(params: Any) -> Any:
    """True for kernels, False for biases and norms: everything of fewer than two axes is spared."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
