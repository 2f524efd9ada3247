"""Training in float16: a factor of the loss that keeps small gradients above zero, found by trial.

P. Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class LossScaleState(NamedTuple):
    """The factor (float32), steps since it last changed (int32), and the optimiser's own state."""

    scale: jax.Array
    good: jax.Array
    inner: Any


def dynamic_loss_scale(
    tx: optax.GradientTransformation, initial: float = 2.0**15, grow_every: int = 2000
) -> optax.GradientTransformation:
    """An optimiser that leaves out steps whose gradient is not finite, and keeps the factor.

    Such a step halves the factor, down to 1; `grow_every` others in a row double it, up to 2^24.
    The gradients that come in are those of the loss itself, see `value_and_grad`.

    Args:
        tx: sees the finite gradients alone, so that its schedule waits at a step that is left out.
        initial: factor at the start, a power of two.
        grow_every: steps.
    """

    def init(params: Any) -> LossScaleState:
        return LossScaleState(jnp.float32(initial), jnp.zeros((), jnp.int32), tx.init(params))

    def update(updates: Any, state: LossScaleState, params: Any = None) -> Any:
        finite = jnp.isfinite(optax.tree.norm(updates))
        new, inner = tx.update(updates, state.inner, params)
        inner = jax.tree.map(lambda a, b: jnp.where(finite, a, b), inner, state.inner)
        new = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), new)
        good = jnp.where(finite, state.good + 1, 0)
        grows = good >= grow_every
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        scale = jnp.clip(state.scale * factor, 1.0, 2.0**24)
        return new, LossScaleState(scale, jnp.where(grows, 0, good), inner)

    return optax.GradientTransformation(init, update)


def loss_scale(opt_state: Any) -> jax.Array | None:
    """The factor that the loss is to be multiplied by; None where there is none."""
    return opt_state.scale if isinstance(opt_state, LossScaleState) else None


def value_and_grad(function: Callable[..., Any], scale: jax.Array | None) -> Callable[..., Any]:
    """`jax.value_and_grad` of a function of (params, …) that gives (value, others).

    With a scale the derivative is taken of `scale` times the value, and divided by it afterwards;
    where the value is not finite, neither is any of it.
    """
    if scale is None:
        return jax.value_and_grad(function, has_aux=True)

    def scaled(*args: Any) -> Any:
        value, others = function(*args)
        return value * scale, (value, others)

    def run(*args: Any) -> Any:
        (_, (value, others)), grads = jax.value_and_grad(scaled, has_aux=True)(*args)
        factor = jnp.where(jnp.isfinite(value), 1 / scale, jnp.nan)
        return (value, others), jax.tree.map(lambda g: g * factor, grads)

    return run
