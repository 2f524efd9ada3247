"""Weights that are averages of others, around any optimiser: lookahead and schedule-free."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from classic_cnns import rules as rules_lib
from classic_cnns.errors import ConfigError
from classic_cnns.optimizers import OPTIMIZERS, create_optimizer, function


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
    elif name in OPTIMIZERS and "b1" in inspect.signature(function(name)).parameters:
        settings["b1"] = 0.0
    return optax.contrib.schedule_free(create_optimizer(name, schedule, **settings), schedule, beta)


def schedule_free_average(opt_state: Any, params: Any) -> Any:
    """The average x of `schedule_free`; None where the state is of another optimiser."""
    kind = optax.contrib.ScheduleFreeState
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    found = [node for node in leaves if isinstance(node, kind)]
    return optax.contrib.schedule_free_eval_params(found[0], params) if found else None
