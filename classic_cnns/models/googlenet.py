"""GoogLeNet: C. Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, table 1 and section 5.

`googlenet2014` is the published network: biases, no BatchNorm, response normalisation in the stem.
`googlenet` has a BatchNorm after every convolution instead (as Inception v2 introduced it), and is
what one trains today. arch="torchvision" differs from it as torchvision does: 3×3 in place of the
5×5 convolutions, a 2×2 last pool, adaptive pooling in the auxiliary heads.
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

# Table 1: #1×1, #3×3 reduce, #3×3, #5×5 reduce, #5×5, pool projection.
TABLE = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}

# paper: not given there; Glorot's, as in the authors' Caffe file. torchvision: normal of 0.01.
INITS = {
    "paper": nn.initializers.xavier_uniform(),
    "torchvision": nn.initializers.normal(0.01),
    "keras": nn.initializers.xavier_uniform(),
    "he": nn.initializers.he_normal(),
}


class GoogLeNet(nn.Module):
    """Nine Inception modules between a stem and a linear classifier.

    In training the auxiliary classifiers on 4a and 4d put their logits into the collection
    "aux_logits"; `steps.train_step` adds their losses with weight 0.3 (section 5). They are made at
    initialisation in any mode and never run in inference.

    Attributes:
        arch: "bn", "2014" or "torchvision", see the top of this file.
        num_classes: outputs.
        aux: with auxiliary classifiers.
        stem: "imagenet" (table 1), "cifar" (one 3×3 of 192 channels), or "auto": "cifar" below 64
            px, and what the weights say once there are some.
        dropout, aux_dropout: before the classifier and before the auxiliary ones, in training.
        weight_init: see `INITS`.
        remat: "block" recomputes each module in the backward pass, for memory.
        dtype: of the computation.
        impl: see `lowering.conv`.
        freeze_bn: BatchNorm uses its stored statistics while training, too.
    """

    arch: Literal["bn", "2014", "torchvision"] = "bn"
    num_classes: int = 1000
    aux: bool = True
    stem: Literal["auto", "imagenet", "cifar"] = "auto"
    dropout: float = 0.4
    aux_dropout: float = 0.7
    weight_init: Literal["paper", "torchvision", "keras", "he"] = "he"
    remat: Literal["none", "block"] = "none"
    dtype: Any = jnp.float32
    impl: Impl = "auto"
    freeze_bn: bool = False

    def min_size(self) -> int:
        """Smallest image side in pixels."""
        if self.stem == "imagenet":  # a last pooling of 3×3 needs two rows
            return 15 if self.arch == "torchvision" else 31
        return 8

    def stem_for(self, size: int) -> str:
        """The stem that `stem` means for fresh weights and images of this side in pixels."""
        return self.stem if self.stem != "auto" else "cifar" if size < 64 else "imagenet"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) in float32, for images (N, H, W, C)."""
        unit = functools.partial(
            ConvUnit,
            batch_norm=self.arch != "2014",
            train=train and not self.freeze_bn,
            kernel_init=INITS[self.weight_init],
            dtype=self.dtype,
            impl=self.impl,
        )
        pool = functools.partial(max_pool, ceil_mode=True, impl=self.impl)
        if self._stem(x) == "cifar":
            x = unit(192, 3, padding=1, name="conv1")(x)
        else:
            x = pool(unit(64, 7, stride=2, padding=3, name="conv1")(x), 3, 2)
            x = self._response_norm(x)
            x = unit(192, 3, padding=1, name="conv3")(unit(64, 1, name="conv2")(x))
            x = pool(self._response_norm(x), 3, 2)
        block = nn.remat(Inception) if self.remat == "block" else Inception
        for name, widths in TABLE.items():
            if name == "4a":
                x = pool(x, 3, 2)
            elif name == "5a":
                x = pool(x, 2 if self.arch == "torchvision" else 3, 2)
            large = 3 if self.arch == "torchvision" else 5
            x = block(widths, large, unit, impl=self.impl, name=f"inception{name}")(x)
            if self.aux and name in ("4a", "4d") and (train or self.is_initializing()):
                head = AuxHead(
                    self.num_classes,
                    unit,
                    adaptive=self.arch == "torchvision",
                    dropout=self.aux_dropout,
                    train=train,
                    dtype=self.dtype,
                    name="aux1" if name == "4a" else "aux2",
                )
                logits = head(x)
                if not self.is_initializing():
                    self.sow("aux_logits", f"{head.name}_logits", logits)
        x = nn.Dropout(self.dropout, deterministic=not train, name="drop")(x.mean((1, 2)))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)

    def _response_norm(self, x: jax.Array) -> jax.Array:
        if self.arch != "2014":
            return x
        return local_response_norm(x, size=5, alpha=1e-4 / 5, beta=0.75, k=1.0)

    def _stem(self, x: jax.Array) -> str:
        if self.stem == "auto" and not self.is_initializing():
            return "imagenet" if self.has_variable("params", "conv2") else "cifar"
        return self.stem_for(min(x.shape[1:3]))


class ConvUnit(nn.Module):
    """Convolution, BatchNorm (or a bias), ReLU."""

    features: int
    kernel: int
    stride: int = 1
    padding: int = 0
    batch_norm: bool = True
    train: bool = False
    kernel_init: Any = nn.initializers.he_normal()
    dtype: Any = jnp.float32
    impl: Impl = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H', W', features)."""
        x = Conv(
            self.features,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            ((self.padding, self.padding),) * 2,
            use_bias=not self.batch_norm,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            impl=self.impl,
            name="conv",
        )(x)
        if self.batch_norm:
            x = BatchNorm(
                not self.train, epsilon=1e-3, dtype=self.dtype, impl=self.impl, name="bn"
            )(x)
        return nn.relu(x)


class Inception(nn.Module):
    """Four branches side by side (figure 2b)."""

    widths: tuple[int, ...]
    large: int
    unit: Any
    impl: Impl = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H, W, sum of the branches)."""
        n1, r3, n3, r5, n5, np_ = self.widths
        unit = self.unit
        pooled = max_pool(x, 3, 1, ((1, 1), (1, 1)), impl=self.impl)
        branches = [
            unit(n1, 1, name="b1")(x),
            unit(n3, 3, padding=1, name="b2")(unit(r3, 1, name="b2_reduce")(x)),
            unit(n5, self.large, padding=self.large // 2, name="b3")(
                unit(r5, 1, name="b3_reduce")(x)
            ),
            unit(np_, 1, name="b4")(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class AuxHead(nn.Module):
    """Auxiliary classifier (section 5): average pool to 4×4, 1×1 of 128, dense 1024, classes."""

    num_classes: int
    unit: Any
    adaptive: bool
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (N, num_classes) in float32, for a map (N, H, W, C)."""
        if self.adaptive or x.shape[1:3] != (14, 14):
            x = adaptive_avg_pool(x, 4)
        else:
            x = nn.avg_pool(x, (5, 5), (3, 3), ((0, 0), (0, 0)))
        x = self.unit(128, 1, name="conv")(x).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(1024, dtype=self.dtype, name="fc1")(x))
        x = nn.Dropout(self.dropout, deterministic=not self.train, name="drop")(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc2")(x).astype(jnp.float32)


googlenet = functools.partial(GoogLeNet, arch="bn")
googlenet2014 = functools.partial(GoogLeNet, arch="2014", weight_init="paper")
