"""ResNet: K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR
2016.

Table 1 gives 18, 34, 50, 101 and 152 layers. 10, 14, 16 and 26 layers are not in the paper: here
they are basic blocks in the same four stages. A network has 2 + 2·blocks (basic) or 2 + 3·blocks
(bottleneck) weighted layers on its longest path.

`stem="imagenet"` is the paper's 7×7 stride 2 and max-pool; `stem="cifar"` is one 3×3, as everyone
uses these widths at 32 px. "auto" takes "cifar" below 64 px, and follows the weights once there are
some.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from classic_cnns.models.layers import BatchNorm, Conv, Impl, max_pool

# Name → (block, blocks in each of the four stages). Table 1, and the four home-made depths.
TABLE = {
    "resnet10": ("basic", (1, 1, 1, 1)),
    "resnet14": ("basic", (2, 2, 1, 1)),
    "resnet16": ("basic", (2, 2, 2, 1)),
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet26": ("basic", (3, 3, 3, 3)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """Residual network with four stages of 64, 128, 256, 512 channels (×4 after a bottleneck).

    Attributes:
        block: "basic" (two 3×3) or "bottleneck" (1×1, 3×3, 1×1).
        stage_sizes: blocks in each stage; the first block of stages 2 to 4 halves the map.
        num_classes: outputs.
        stem: "imagenet", "cifar" or "auto", see the top of this file.
        bottleneck_stride: the convolution of a bottleneck that carries the stride: "3x3"
            (torchvision, "v1.5") or "1x1" (the paper, Keras). Both have the same parameters.
        zero_init_last: start the last scale of each branch at 0, so that blocks start as identity
            (Goyal et al., 2017, section 5.1).
        bn_momentum, bn_epsilon: of every BatchNorm.
        dtype: of the computation.
        impl: see `layers.conv`.
    """

    block: Literal["basic", "bottleneck"]
    stage_sizes: tuple[int, ...]
    num_classes: int = 1000
    stem: Literal["auto", "imagenet", "cifar"] = "auto"
    bottleneck_stride: Literal["3x3", "1x1"] = "3x3"
    zero_init_last: bool = True
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    dtype: Any = jnp.float32
    impl: Impl = "auto"

    def min_size(self) -> int:
        """Smallest image side in pixels at which the last stage sees at least one real pixel."""
        return 32 if self.stem == "imagenet" else 8

    def stem_for(self, size: int) -> str:
        """The stem that `stem` means for fresh weights and images of this side in pixels."""
        return self.stem if self.stem != "auto" else "cifar" if size < 64 else "imagenet"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) in float32, for images (N, H, W, C)."""
        conv = functools.partial(
            Conv, use_bias=False, dtype=self.dtype, impl=self.impl, kernel_init=he_init
        )
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            dtype=self.dtype,
            impl=self.impl,
        )
        last_init = nn.initializers.zeros if self.zero_init_last else nn.initializers.ones
        if self._stem(x) == "imagenet":
            x = conv(64, (7, 7), (2, 2), ((3, 3), (3, 3)), name="conv_init")(x)
            x = nn.relu(norm(name="bn_init")(x))
            x = max_pool(x, 3, 2, ((1, 1), (1, 1)), impl=self.impl)
        else:
            x = conv(64, (3, 3), padding=((1, 1), (1, 1)), name="conv_init")(x)
            x = nn.relu(norm(name="bn_init")(x))
        make = (
            BasicBlock
            if self.block == "basic"
            else functools.partial(BottleneckBlock, stride_on=self.bottleneck_stride)
        )
        for i, blocks in enumerate(self.stage_sizes):
            for j in range(blocks):
                x = make(
                    features=64 * 2**i,
                    stride=2 if i > 0 and j == 0 else 1,
                    conv=conv,
                    norm=norm,
                    last_init=last_init,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)

    def _stem(self, x: jax.Array) -> str:
        if self.stem == "auto" and not self.is_initializing():
            kernel: jax.Array = self.get_variable("params", "conv_init")["kernel"]
            return "imagenet" if kernel.shape[0] == 7 else "cifar"
        return self.stem_for(min(x.shape[1:3]))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (figure 5, left)."""

    features: int
    stride: int
    conv: Any
    norm: Any
    last_init: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H/stride, W/stride, features)."""
        pad = ((1, 1), (1, 1))
        y = self.conv(self.features, (3, 3), (self.stride,) * 2, pad, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, (3, 3), padding=pad, name="conv2")(y)
        y = self.norm(scale_init=self.last_init, name="bn2")(y)
        return nn.relu(y + shortcut(self, x, y.shape[-1]))


class BottleneckBlock(nn.Module):
    """1×1 reduce, 3×3, 1×1 expand by 4, and a shortcut (figure 5, right)."""

    features: int
    stride: int
    conv: Any
    norm: Any
    last_init: Any
    stride_on: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H/stride, W/stride, 4·features)."""
        first, second = (1, self.stride) if self.stride_on == "3x3" else (self.stride, 1)
        y = self.conv(self.features, (1, 1), (first, first), name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, (3, 3), (second, second), ((1, 1), (1, 1)), name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        y = self.conv(4 * self.features, (1, 1), name="conv3")(y)
        y = self.norm(scale_init=self.last_init, name="bn3")(y)
        return nn.relu(y + shortcut(self, x, y.shape[-1]))


def shortcut(block: BasicBlock | BottleneckBlock, x: jax.Array, features: int) -> jax.Array:
    """Identity where shapes agree, else a projection (section 3.3, option B)."""
    if block.stride == 1 and x.shape[-1] == features:
        return x
    x = block.conv(features, (1, 1), (block.stride,) * 2, name="conv_proj")(x)
    return block.norm(name="bn_proj")(x)


# He et al. 2015 (section 3.4 of the paper): normal with variance 2 / fan-out, as torchvision does.
he_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _resnet(name: str, **kwargs: Any) -> ResNet:
    block, sizes = TABLE[name]
    return ResNet(block=block, stage_sizes=sizes, **kwargs)  # type: ignore[arg-type]


resnet10 = functools.partial(_resnet, "resnet10")
resnet14 = functools.partial(_resnet, "resnet14")
resnet16 = functools.partial(_resnet, "resnet16")
resnet18 = functools.partial(_resnet, "resnet18")
resnet26 = functools.partial(_resnet, "resnet26")
resnet34 = functools.partial(_resnet, "resnet34")
resnet50 = functools.partial(_resnet, "resnet50")
resnet101 = functools.partial(_resnet, "resnet101")
resnet152 = functools.partial(_resnet, "resnet152")
