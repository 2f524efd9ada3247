"""Optimisers by name: everything optax has, with the decay rules of CNNs."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from classic_cnns.errors import ConfigError, nearest

OPTIMIZERS = (
    "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan",
    "amsgrad", "fromage", "lamb", "lars", "lion", "nadam", "nadamw", "novograd",
    "optimistic_adam_v2", "radam", "rmsprop", "rprop", "sgd", "sign_sgd", "signum", "sm3", "yogi",
)  # fmt: skip

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
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = True,
    defaults: Literal["optax", "keras", "torch"] = "optax",
    **options: Any,
) -> optax.GradientTransformation:
    """An optimiser by its optax name.

    Weight decay is decoupled where the optimiser has its own (adamw, lamb, lion, …); otherwise it
    is added to the gradient before anything else, as PyTorch's SGD does. It spares biases and
    norms, see `decay_mask`.

    Args:
        name: one of `OPTIMIZERS`.
        schedule: learning rate, or a function of the step.
        weight_decay: coefficient, 0 for none.
        clip_norm: largest global norm of the gradient, 0 for no limit.
        momentum, nesterov: of sgd; the other optimisers take theirs as options.
        defaults: whose constants to take where optax, Keras and PyTorch differ, see `DEFAULTS`.
        **options: passed to the optax function, for example b1=0.95.

    Raises:
        ConfigError: unknown name or option, with the nearest valid ones.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f'unknown optimizer.name "{name}". Fix: {nearest(name, OPTIMIZERS)}')
    if defaults not in DEFAULTS:
        raise ConfigError(
            f'unknown optimizer.defaults "{defaults}". Fix: {nearest(defaults, DEFAULTS)}'
        )
    for field, value in (("weight_decay", weight_decay), ("clip_norm", clip_norm)):
        if value < 0:
            raise ConfigError(f"optimizer.{field} is {value}. Fix: use 0 or more")
    make = getattr(optax, name)
    accepted = inspect.signature(make).parameters
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
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    rate = "weight_decay" if "weight_decay" in accepted else "weight_decay_rate"
    if rate in accepted:
        mask = next((m for m in ("mask", "weight_decay_mask") if m in accepted), None)
        settings |= {rate: weight_decay or (None if name == "adafactor" else 0.0)}
        settings |= {mask: decay_mask} if mask else {}
    elif weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    parts.append(make(schedule, **settings))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def decay_mask(params: Any) -> Any:
    """True for kernels, False for biases and norms: everything of fewer than two axes is spared."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
