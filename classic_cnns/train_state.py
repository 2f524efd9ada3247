"""What training changes: a pytree without functions, to be saved, sharded and compared."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from classic_cnns.sharding import create_mesh, replicate


@flax.struct.dataclass
class TrainState:
    """Step number (int32), parameters, BatchNorm statistics and the optimiser's state; `ema`, the
    moving averages of both, as {"params", "batch_stats"}, or empty.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """Collections for `model.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def averaged(self) -> TrainState:
        """The state with its averages in place of the weights, to be evaluated."""
        return dataclasses.replace(self, **self.ema)


def create_train_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    *,
    seed: int,
    mesh: Mesh | None = None,
    given: dict[tuple[str, ...], Any] | None = None,
    ema: bool = False,
) -> TrainState:
    """Fresh parameters, made by the host in one compiled call, the same ones for every device.

    Args:
        model: called once on zeros of shape (1, *image_shape).
        tx: the optimiser.
        image_shape: (height, width, channels).
        seed: of the initialisation.
        mesh: where the state is replicated; by default one of the first device alone.
        given: arrays that take the place of fresh ones, by path, for example
            ("params", "conv1", "kernel").
        ema: whether averages are kept, see `steps.train_step`.
    """
    init = functools.partial(_init, model, tx, image_shape, ema)
    # Random numbers of every shape: a GPU's compiler takes four times as long over them, and LLVM's
    # last passes take half of the rest and change neither the speed nor the bits.
    options = {"xla_backend_optimization_level": 1}
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
        host, options = None, {}
    with jax.default_device(host):
        compiled = jax.jit(init, compiler_options=options)
        state = compiled(jax.random.key(seed), jax.device_get(given or {}))
    return replicate(state, mesh or create_mesh(1))


def abstract_train_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    ema: bool = False,
) -> TrainState:
    """The same tree with shapes and dtypes in place of arrays; nothing is computed."""
    return jax.eval_shape(lambda: _init(model, tx, image_shape, ema, jax.random.key(0), {}))


def _init(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    ema: bool,
    key: jax.Array,
    given: dict[tuple[str, ...], Any],
) -> TrainState:
    keys = dict(zip(("params", "dropout"), jax.random.split(key), strict=True))
    variables = dict(model.init(keys, jnp.zeros((1, *image_shape), jnp.float32)))
    if given:
        variables = unflatten_dict({**flatten_dict(variables), **given})
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        ema={"params": params, "batch_stats": batch_stats} if ema else {},
    )
