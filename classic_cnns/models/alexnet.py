"""AlexNet.

`alexnet2012`: A. Krizhevsky, I. Sutskever, G. E. Hinton, "ImageNet Classification with Deep
Convolutional Neural Networks", NIPS 2012, section 3 and figure 2; its two towers are the groups of
convolutions 2, 4 and 5. `alexnet`: the single column of A. Krizhevsky, "One weird trick for
parallelizing convolutional neural networks", arXiv:1404.5997, as in torchvision.

Below 63 px both become `variant="cifar"`: the single column with pools of 2 and one dense layer.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from classic_cnns.models.layers import (
    BatchNorm,
    Conv,
    adaptive_avg_pool,
    local_response_norm,
    max_pool,
)
from classic_cnns.models.lowering import Impl

# Features, kernel, stride, padding, groups, pooled afterwards.
Row = tuple[int, int, int, tuple[int, int], int, bool]
TABLES: dict[str, tuple[Row, ...]] = {
    "column": (
        (64, 11, 4, (2, 2), 1, True),
        (192, 5, 1, (2, 2), 1, True),
        (384, 3, 1, (1, 1), 1, False),
        (256, 3, 1, (1, 1), 1, False),
        (256, 3, 1, (1, 1), 1, True),
    ),
    "towers": (
        (96, 11, 4, (1, 2), 1, True),  # 224 px to 55, which the paper gives
        (256, 5, 1, (2, 2), 2, True),
        (384, 3, 1, (1, 1), 1, False),
        (384, 3, 1, (1, 1), 2, False),
        (256, 3, 1, (1, 1), 2, True),
    ),
    "cifar": (
        (64, 11, 4, (5, 5), 1, True),
        (192, 5, 1, (2, 2), 1, True),
        (384, 3, 1, (1, 1), 1, False),
        (256, 3, 1, (1, 1), 1, False),
        (256, 3, 1, (1, 1), 1, True),
    ),
}

# Kernels of convolutions and of dense layers, biases of layers 2, 4, 5 and of hidden dense layers.
# paper: section 5, N(0, 0.01) and ones; torchvision: PyTorch's default, U(±1/√fan-in).
_torch = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_glorot = nn.initializers.xavier_uniform()
INITS = {
    "paper": (nn.initializers.normal(0.01), nn.initializers.normal(0.01), nn.initializers.ones),
    "torchvision": (_torch, _torch, nn.initializers.zeros),
    "keras": (_glorot, _glorot, nn.initializers.zeros),
}


class AlexNet(nn.Module):
    """Five convolutions and three dense layers.

    Attributes:
        variant: "column" (torchvision), "towers" (2012) or "cifar".
        num_classes: outputs.
        batch_norm: a BatchNorm after every convolution, in place of response normalisation.
        dropout: before both hidden dense layers, in training.
        weight_init: "paper", "torchvision" or "keras", see `INITS`.
        dtype: of the computation.
        impl: see `lowering.conv`.
    """

    variant: Literal["column", "towers", "cifar"] = "column"
    num_classes: int = 1000
    batch_norm: bool = False
    dropout: float = 0.5
    weight_init: Literal["paper", "torchvision", "keras"] = "torchvision"
    dtype: Any = jnp.float32
    impl: Impl = "auto"

    def min_size(self) -> int:
        """Smallest image side in pixels."""
        return 29

    def stem_for(self, size: int) -> str:
        """The variant that fresh weights get for images of this side in pixels."""
        return "cifar" if size < 63 else self.variant

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) in float32, for images (N, H, W, C)."""
        variant = self._variant(x)
        conv_init, dense_init, ones = INITS[self.weight_init]
        drop = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=dense_init)
        for i, (features, kernel, stride, pad, groups, pooled) in enumerate(TABLES[variant], 1):
            x = Conv(
                features,
                (kernel, kernel),
                (stride, stride),
                (pad, pad),
                groups,
                dtype=self.dtype,
                impl=self.impl,
                kernel_init=conv_init,
                bias_init=ones if i in (2, 4, 5) else nn.initializers.zeros,
                name=f"conv{i}",
            )(x)
            if self.batch_norm:
                x = BatchNorm(not train, dtype=self.dtype, impl=self.impl, name=f"bn{i}")(x)
            x = nn.relu(x)
            if variant == "towers" and i in (1, 2) and not self.batch_norm:
                x = local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0)
            if pooled:
                x = max_pool(x, 2 if variant == "cifar" else 3, 2, impl=self.impl)
        if variant == "cifar":
            x = x.mean((1, 2))
        else:
            x = adaptive_avg_pool(x, 6).reshape(x.shape[0], -1)
            x = nn.relu(dense(4096, bias_init=ones, name="fc1")(drop(name="drop1")(x)))
            x = nn.relu(dense(4096, bias_init=ones, name="fc2")(drop(name="drop2")(x)))
        return dense(self.num_classes, name="head")(x).astype(jnp.float32)

    def _variant(self, x: jax.Array) -> str:
        if not self.is_initializing():
            return self.variant if self.has_variable("params", "fc1") else "cifar"
        return self.stem_for(min(x.shape[1:3]))


alexnet = functools.partial(AlexNet, variant="column")
alexnet2012 = functools.partial(AlexNet, variant="towers", weight_init="paper")
