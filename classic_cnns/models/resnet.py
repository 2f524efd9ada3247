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

from classic_cnns.errors import ConfigError
from classic_cnns.models.layers import BatchNorm, Conv, max_pool
from classic_cnns.models.lowering import Impl

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


# Of convolutions. paper (section 3.4) and torchvision: He et al. 2015, by fan-in and by fan-out.
INITS = {
    "paper": nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
    "torchvision": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    "keras": nn.initializers.xavier_uniform(),
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
        weight_init: "paper", "torchvision" or "keras", see `INITS`.
        remat: "block" recomputes each block in the backward pass, for memory.
        dtype: of the computation.
        impl: see `lowering.conv`.
        freeze_bn: BatchNorm uses its stored statistics while training, too.
    """

    block: Literal["basic", "bottleneck"]
    stage_sizes: tuple[int, ...]
    num_classes: int = 1000
    stem: Literal["auto", "imagenet", "cifar"] = "auto"
    bottleneck_stride: Literal["3x3", "1x1"] = "3x3"
    zero_init_last: bool = True
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    weight_init: Literal["paper", "torchvision", "keras"] = "torchvision"
    remat: Literal["none", "block"] = "none"
    dtype: Any = jnp.float32
    impl: Impl = "auto"
    freeze_bn: bool = False

    def min_size(self) -> int:
        """Smallest image side in pixels at which the last stage sees at least one real pixel."""
        return 32 if self.stem == "imagenet" else 8

    def stem_for(self, size: int) -> str:
        """The stem that `stem` means for fresh weights and images of this side in pixels."""
        return self.stem if self.stem != "auto" else "cifar" if size < 64 else "imagenet"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) in float32, for images (N, H, W, C)."""
        conv, norm, last_init = _bind(self, train)
        if self._stem(x) == "imagenet":
            x = conv(64, (7, 7), (2, 2), ((3, 3), (3, 3)), name="conv_init")(x)
            x = nn.relu(norm(name="bn_init")(x))
            x = max_pool(x, 3, 2, ((1, 1), (1, 1)), impl=self.impl)
        else:
            x = conv(64, (3, 3), padding=((1, 1), (1, 1)), name="conv_init")(x)
            x = nn.relu(norm(name="bn_init")(x))
        kind: Any = BasicBlock if self.block == "basic" else BottleneckBlock
        make = nn.remat(kind) if self.remat == "block" else kind
        if self.block == "bottleneck":
            make = functools.partial(make, stride_on=self.bottleneck_stride)
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


class CifarResNet(nn.Module):
    """The networks of section 4.2 for 32 px: 6n + 2 layers in three stages of 16, 32, 64 channels.

    Attributes:
        depth: 20, 32, 44, 56 or 110.
        num_classes: outputs.
        shortcut: where shapes differ, "A" subsamples and adds channels of zeros on both sides,
            without parameters (the paper's choice here); "B" projects.
        zero_init_last, weight_init, remat, dtype, impl, freeze_bn, bn_momentum, bn_epsilon: as in
            `ResNet`.
    """

    depth: int
    num_classes: int = 10
    shortcut: Literal["A", "B"] = "A"
    zero_init_last: bool = False
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    weight_init: Literal["paper", "torchvision", "keras"] = "torchvision"
    remat: Literal["none", "block"] = "none"
    dtype: Any = jnp.float32
    impl: Impl = "auto"
    freeze_bn: bool = False

    def min_size(self) -> int:
        """Smallest image side in pixels."""
        return 8

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) in float32, for images (N, H, W, C)."""
        conv, norm, last_init = _bind(self, train)
        x = conv(16, (3, 3), padding=((1, 1), (1, 1)), name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        block = nn.remat(BasicBlock) if self.remat == "block" else BasicBlock
        for i in range(3):
            for j in range((self.depth - 2) // 6):
                x = block(
                    features=16 * 2**i,
                    stride=2 if i > 0 and j == 0 else 1,
                    conv=conv,
                    norm=norm,
                    last_init=last_init,
                    option=self.shortcut,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


def _bind(model: ResNet | CifarResNet, train: bool) -> tuple[Any, Any, Any]:
    """Convolution, norm and initialiser of a branch's last scale, with the model's settings."""
    conv = functools.partial(
        Conv,
        use_bias=False,
        dtype=model.dtype,
        impl=model.impl,
        kernel_init=INITS[model.weight_init],
    )
    norm = functools.partial(
        BatchNorm,
        use_running_average=not train or model.freeze_bn,
        momentum=model.bn_momentum,
        epsilon=model.bn_epsilon,
        dtype=model.dtype,
        impl=model.impl,
    )
    return conv, norm, nn.initializers.zeros if model.zero_init_last else nn.initializers.ones


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (figure 5, left)."""

    features: int
    stride: int
    conv: Any
    norm: Any
    last_init: Any
    option: str = "B"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H/stride, W/stride, features)."""
        pad = ((1, 1), (1, 1))
        y = self.conv(self.features, (3, 3), (self.stride,) * 2, pad, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, (3, 3), padding=pad, name="conv2")(y)
        y = self.norm(scale_init=self.last_init, name="bn2")(y)
        return residual_relu(y + shortcut(self, x, y.shape[-1]))


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
        return residual_relu(y + shortcut(self, x, y.shape[-1]))


@jax.custom_jvp
def residual_relu(x: jax.Array) -> jax.Array:
    """max(x, 0) of a block's sum; NaN stays NaN, the derivative at 0 is 0, as in `nn.relu`.

    As a choice and with a derivative that reads its output, because XLA:CPU computes a maximum, and
    the sum under it, again wherever it is read: each block all those before it in its stage.
    """
    return jnp.where(x <= 0, 0, x)


@residual_relu.defjvp
def _residual_relu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    out = residual_relu(*primals)
    return out, jnp.where(out > 0, *tangents, 0)


def shortcut(block: BasicBlock | BottleneckBlock, x: jax.Array, features: int) -> jax.Array:
    """Identity where shapes agree, else zeros (section 3.3, option A) or a projection (B)."""
    if block.stride == 1 and x.shape[-1] == features:
        return x
    if getattr(block, "option", "B") == "A":
        extra = (features - x.shape[-1]) // 2
        x = x[:, :: block.stride, :: block.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra, extra)))
    x = block.conv(features, (1, 1), (block.stride,) * 2, name="conv_proj")(x)
    return block.norm(name="bn_proj")(x)


def _resnet(name: str, **kwargs: Any) -> ResNet:
    block, sizes = TABLE[name]
    sizes = kwargs.get("stage_sizes", sizes)
    if not (isinstance(sizes, tuple) and sizes and all(type(n) is int and n > 0 for n in sizes)):
        raise ConfigError(
            f"stage_sizes is {sizes!r}. Fix: the blocks of each stage, such as (1, 1, 2, 2)"
        )
    return ResNet(**{"block": block, "stage_sizes": sizes} | kwargs)


resnet10 = functools.partial(_resnet, "resnet10")
resnet14 = functools.partial(_resnet, "resnet14")
resnet16 = functools.partial(_resnet, "resnet16")
resnet18 = functools.partial(_resnet, "resnet18")
resnet26 = functools.partial(_resnet, "resnet26")
resnet34 = functools.partial(_resnet, "resnet34")
resnet50 = functools.partial(_resnet, "resnet50")
resnet101 = functools.partial(_resnet, "resnet101")
resnet152 = functools.partial(_resnet, "resnet152")

resnet20_cifar = functools.partial(CifarResNet, depth=20)
resnet32_cifar = functools.partial(CifarResNet, depth=32)
resnet44_cifar = functools.partial(CifarResNet, depth=44)
resnet56_cifar = functools.partial(CifarResNet, depth=56)
resnet110_cifar = functools.partial(CifarResNet, depth=110)
