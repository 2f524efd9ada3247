"""Multiply-adds of a network, counted in its traced program."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def count_macs(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of convolutions and matrix products for one image in inference.

    Args:
        model: a network of this package; traced with XLA's plain operations, nothing is computed.
        image_shape: (height, width, channels).
    """
    model = model.clone(impl="lax")
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return _count(jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, x).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
            total += eqn.outvars[0].aval.size * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        elif eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += eqn.outvars[0].aval.size * depth
        else:
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    total += _count(inner)
    return total
