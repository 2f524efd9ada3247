"""VGG: K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015, table 1, configurations A (11), B (13), D (16) and E (19), plain or with
BatchNorm.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from classic_cnns.models.layers import BatchNorm, Conv, adaptive_avg_pool, max_pool
from classic_cnns.models.lowering import Impl

# Convolutions of 64, 128, 256, 512, 512 channels before each of the five pools: table 1.
TABLE = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)

# Kernels of convolutions and of dense layers. paper: section 3.1, N(0, 0.01), which only the
# shallow nets learn from; torchvision: He et al. 2015 by fan-out.
INITS = {
    "paper": (nn.initializers.normal(0.01), nn.initializers.normal(0.01)),
    "torchvision": (
        nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        nn.initializers.normal(0.01),
    ),
    "keras": (nn.initializers.xavier_uniform(), nn.initializers.xavier_uniform()),
}


class VGG(nn.Module):
    """3×3 convolutions in five stages, then a head.

    Attributes:
        depth: 11, 13, 16 or 19.
        num_classes: outputs.
        batch_norm: a BatchNorm after every convolution.
        head: "imagenet" (adaptive pooling to 7×7, dense 4096, 4096, classes), "mlp" (the same on
            the map's mean, as CIFAR code does), "cifar" or "gap" (the map's mean to classes), or
            "auto": "cifar" below 64 px, else "imagenet", and what the weights say once there are
            some.
        dropout: after both hidden dense layers, in training.
        weight_init: "paper", "torchvision" or "keras", see `INITS`.
        remat: "block" recomputes each stage in the backward pass, for memory.
        dtype: of the computation.
        impl: see `lowering.conv`.
        freeze_bn: BatchNorm uses its stored statistics while training, too.
    """

    depth: int
    num_classes: int = 1000
    batch_norm: bool = False
    head: Literal["auto", "imagenet", "mlp", "cifar", "gap"] = "auto"
    dropout: float = 0.5
    weight_init: Literal["paper", "torchvision", "keras"] = "torchvision"
    remat: Literal["none", "block"] = "none"
    dtype: Any = jnp.float32
    impl: Impl = "auto"
    freeze_bn: bool = False

    def min_size(self) -> int:
        """Smallest image side in pixels: five pools leave one."""
        return 32

    def stem_for(self, size: int) -> str:
        """The head that `head` means for fresh weights and images of this side in pixels."""
        return self.head if self.head != "auto" else "cifar" if size < 64 else "imagenet"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) in float32, for images (N, H, W, C)."""
        head = self._head(x)
        conv_init, dense_init = INITS[self.weight_init]

        def stage(module: VGG, x: jax.Array, i: int) -> jax.Array:
            for j in range(1, TABLE[self.depth][i] + 1):
                x = Conv(
                    WIDTHS[i],
                    (3, 3),
                    padding=((1, 1), (1, 1)),
                    dtype=self.dtype,
                    impl=self.impl,
                    kernel_init=conv_init,
                    name=f"conv{i + 1}_{j}",
                )(x)
                if self.batch_norm:
                    name = f"bn{i + 1}_{j}"
                    still = not train or self.freeze_bn
                    x = BatchNorm(still, dtype=self.dtype, impl=self.impl, name=name)(x)
                x = nn.relu(x)
            return max_pool(x, 2, 2, impl=self.impl)

        run = nn.remat(stage, static_argnums=(2,)) if self.remat == "block" else stage
        for i in range(5):
            x = run(self, x, i)
        x = adaptive_avg_pool(x, 7) if head == "imagenet" else x.mean((1, 2), keepdims=True)
        x = x.reshape(x.shape[0], -1)
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=dense_init)
        if head in ("imagenet", "mlp"):
            for k in (1, 2):
                x = nn.relu(dense(4096, name=f"fc{k}")(x))
                x = nn.Dropout(self.dropout, deterministic=not train, name=f"drop{k}")(x)
        return dense(self.num_classes, name="head")(x).astype(jnp.float32)

    def _head(self, x: jax.Array) -> str:
        if self.head == "auto" and not self.is_initializing():
            if not self.has_variable("params", "fc1"):
                return "cifar"
            return (
                "mlp"
                if self.get_variable("params", "fc1")["kernel"].shape[0] == 512
                else "imagenet"
            )
        return self.stem_for(min(x.shape[1:3]))


vgg11 = functools.partial(VGG, depth=11)
vgg13 = functools.partial(VGG, depth=13)
vgg16 = functools.partial(VGG, depth=16)
vgg19 = functools.partial(VGG, depth=19)
vgg11_bn = functools.partial(VGG, depth=11, batch_norm=True)
vgg13_bn = functools.partial(VGG, depth=13, batch_norm=True)
vgg16_bn = functools.partial(VGG, depth=16, batch_norm=True)
vgg19_bn = functools.partial(VGG, depth=19, batch_norm=True)
