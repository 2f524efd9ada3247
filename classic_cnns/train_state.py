"""What training changes: a pytree without functions, to be saved, sharded and compared."""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from classic_cnns.sharding import replicated


@flax.struct.dataclass
class TrainState:
    """Step number (int32), parameters, BatchNorm statistics and the optimiser's state."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """Collections for `model.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_train_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    *,
    seed: int,
    mesh: Mesh,
) -> TrainState:
    """Fresh parameters, made on the devices in one compiled call.

    Args:
        model: called once on zeros of shape (1, *image_shape).
        tx: the optimiser.
        image_shape: (height, width, channels).
        seed: of the initialisation.
        mesh: where the state is replicated.
    """
    init = jax.jit(lambda: _init(model, tx, image_shape, seed), out_shardings=replicated(mesh))
    return init()


def abstract_train_state(
    model: nn.Module, tx: optax.GradientTransformation, image_shape: tuple[int, int, int]
) -> TrainState:
    """The same tree with shapes and dtypes in place of arrays; nothing is computed."""
    return jax.eval_shape(lambda: _init(model, tx, image_shape, 0))


def _init(
    model: nn.Module, tx: optax.GradientTransformation, image_shape: tuple[int, int, int], seed: int
) -> TrainState:
    keys = dict(zip(("params", "dropout"), jax.random.split(jax.random.key(seed)), strict=True))
    variables = model.init(keys, jnp.zeros((1, *image_shape), jnp.float32))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(params),
    )
