"""What happens inside a network: its layers by name, their outputs, and what they cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from classic_cnns.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a network for one image.

    Attributes:
        name: stable path, for example "stage1_block1/conv1".
        output: shape without the batch.
        parameters: trainable numbers of the layer itself and of its parts.
        macs: multiply-adds of the layer's own kernel.
    """

    name: str
    output: tuple[int, ...]
    parameters: int
    macs: int


def list_layers(
    model: nn.Module, image_shape: tuple[int, int, int], variables: Any = None
) -> list[Layer]:
    """All layers that run in inference, parts before wholes, in the order of the forward pass.

    Args:
        model: any network of this package; nothing is computed.
        image_shape: (height, width, channels).
        variables: that there are, of images of another size, say; fresh ones by default.
    """
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    if variables is None:
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
    order: list[tuple[str, tuple[int, ...]]] = []

    def run(variables: Any, x: Any) -> Any:
        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = call(*args, **kwargs)
            if context.method_name == "__call__" and context.module.path:
                order.append(("/".join(context.module.path), out.shape[1:]))
            return out

        with nn.intercept_methods(note):
            return model.apply(variables, x, train=False)

    jax.eval_shape(run, variables, x)
    params = {"/".join(k): v for k, v in flatten_dict(dict(variables["params"])).items()}
    layers = []
    for name, shape in order:
        kernel = params.get(f"{name}/kernel")
        macs = math.prod(kernel.shape) * math.prod(shape[:-1]) if kernel is not None else 0
        size = sum(p.size for key, p in params.items() if key.startswith(f"{name}/"))
        layers.append(Layer(name, shape, size, macs))
    return layers


def features(
    model: nn.Module, variables: Any, x: jax.Array, layers: Sequence[str], *, train: bool = False
) -> dict[str, jax.Array]:
    """Outputs of the named layers, before the ReLU where the network applies one outside the layer.

    A function for `jax.jit`, with the model and the names bound.

    Args:
        model: any network of this package.
        variables: its parameters and statistics.
        x: images (N, H, W, C).
        layers: names from `list_layers`.
        train: normalise by the batch, as in training; nothing is updated.

    Raises:
        ConfigError: unknown names, each with the nearest.
    """
    _, height, width, channels = x.shape
    known = [layer.name for layer in list_layers(model, (height, width, channels), variables)]
    wrong = [f'"{name}" ({nearest(name, known)})' for name in layers if name not in known]
    if wrong:
        raise ConfigError(f"no layer {', '.join(wrong)}")
    wanted = set(layers)
    _, kept = model.apply(
        variables,
        x,
        train=train,
        mutable=["intermediates", "batch_stats"],
        capture_intermediates=lambda module, method: (
            method == "__call__" and "/".join(module.path) in wanted
        ),
        rngs={"dropout": jax.random.key(0)},
    )
    flat = {"/".join(k[:-1]): v[0] for k, v in flatten_dict(kept.get("intermediates", {})).items()}
    return {name: flat[name] for name in layers}
