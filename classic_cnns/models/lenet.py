"""LeNet-5: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied to Document
Recognition", Proc. IEEE 86(11), 1998, section II.B and figure 2.

`lenet5` is the network as everyone trains it today: full connections, max-pooling, ReLU and a
linear classifier (61,706 parameters for 10 classes of 32×32×1). `lenet5_1998` is the network as
published.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from classic_cnns.errors import ConfigError
from classic_cnns.models.layers import Conv, max_pool
from classic_cnns.models.lowering import Impl, conv

# Table I of the paper: the S2 maps that each of the 16 maps of C3 reads.
C3_TABLE = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)  # fmt: skip

# Output codes in the manner of figure 3: 7×12 drawings of the digits, one line a row of all ten.
DIGITS = """
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
..###.. ...#... .#####. .#####. ....##. ####### ..####. ####### .#####. .#####.
.##.##. ..##... ##...## ##...## ...###. ##..... .##.... ##...## ##...## ##...##
##...## .###... .....## .....## ..####. ##..... ##..... .....## ##...## ##...##
##...## ...#... .....## .....## .##.##. ##..... ##..... ....##. ##...## ##...##
##...## ...#... ....##. ..####. ##..##. ######. ######. ....##. .#####. .######
##...## ...#... ...##.. .....## ##..##. .....## ##...## ...##.. ##...## .....##
##...## ...#... ..##... .....## ####### .....## ##...## ...##.. ##...## .....##
.##.##. ...#... .##.... ##...## ....##. ##...## ##...## ..##... ##...## ....##.
..###.. .#####. ####### .#####. ....##. .#####. .#####. ..##... .#####. .####..
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
"""


class LeNet5(nn.Module):
    """Modern LeNet-5: conv 6, conv 16, dense 120, 84, classes.

    Input (N, H, W, C) with any C. At 28 px the first convolution pads by 2, so that 28 and 32 px
    give the same parameters; other sizes from 16 px change the first dense layer alone.
    """

    num_classes: int = 10
    dtype: Any = jnp.float32
    impl: Impl = "auto"

    def min_size(self) -> int:
        """Smallest image side in pixels."""
        return 16

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits (N, num_classes), float32."""
        del train
        pad = 2 if x.shape[1] == 28 else 0
        for name, features, p in (("conv1", 6, pad), ("conv2", 16, 0)):
            x = Conv(
                features,
                (5, 5),
                padding=((p, p), (p, p)),
                dtype=self.dtype,
                impl=self.impl,
                name=name,
            )(x)
            x = nn.relu(max_pool(x, 2, 2, impl=self.impl))  # the same, of a quarter of the values
        x = x.reshape(x.shape[0], -1)
        for name, features in (("fc1", 120), ("fc2", 84)):
            x = nn.relu(nn.Dense(features, dtype=self.dtype, name=name)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class LeNet5Published(nn.Module):
    """LeNet-5 as published: 60,000 trainable parameters for one channel.

    C1 156, S2 12, C3 1,516 (table I), S4 32, C5 48,120, F6 10,164; every layer ends in the scaled
    tanh of appendix A; the outputs are distances of F6 to fixed codes of ±1 (equation 7). Logits
    are minus those distances, so that softmax cross-entropy is the paper's criterion (equation 9)
    without its constant j. Codes are drawings of the ten digits, or random (section II.B allows
    both) when there are more classes.
    """

    num_classes: int = 10
    dtype: Any = jnp.float32
    impl: Impl = "auto"

    def min_size(self) -> int:
        """Smallest image side in pixels."""
        return 28

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits (N, num_classes), float32; x is (N, 32, 32, C), or (N, 28, 28, C), then padded."""
        del train
        if x.shape[1] == 28:
            x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
        if x.shape[1:3] != (32, 32):
            raise ConfigError(
                f"lenet5_1998 takes 28 or 32 px images, not {x.shape[1:3]}. Fix: resize."
            )
        x = x.astype(self.dtype)
        x = squash(
            Conv(6, (5, 5), dtype=self.dtype, impl=self.impl, kernel_init=_init, name="c1")(x)
        )
        x = squash(Subsample(name="s2")(x))
        x = squash(TableConv(impl=self.impl, name="c3")(x))
        x = squash(Subsample(name="s4")(x))
        x = squash(
            nn.Dense(120, dtype=self.dtype, kernel_init=_init, name="c5")(x.reshape(len(x), -1))
        )
        x = squash(nn.Dense(84, dtype=self.dtype, kernel_init=_init, name="f6")(x))
        x = x.astype(jnp.float32)
        codes = output_codes(self.num_classes)
        return -jnp.square(x[:, None, :] - codes[None]).sum(-1)


class Subsample(nn.Module):
    """Sum of 2×2 neighbours, times one trainable coefficient a map, plus a trainable bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H/2, W/2, C)."""
        n, h, w, c = x.shape
        scale = self.param("scale", nn.initializers.constant(0.25), (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).sum((2, 4))
        return x * scale.astype(x.dtype)[None, None, None] + bias.astype(x.dtype)[None, None, None]


class TableConv(nn.Module):
    """C3: a 5×5 convolution that stores and uses only the connections of table I."""

    impl: Impl = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, 6) to (N, H − 4, W − 4, 16)."""
        used = [(i, o) for o, inputs in enumerate(C3_TABLE) for i in inputs]
        index = np.full((6, 16), len(used))  # the last entry is the zero appended below
        for k, (i, o) in enumerate(used):
            index[i, o] = k
        fan_in = np.array([25 * len(C3_TABLE[o]) for _, o in used], np.float32)
        weights = self.param("kernel", _uniform(fan_in), (5, 5, len(used)), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (16,), jnp.float32)
        kernel = jnp.pad(weights, ((0, 0), (0, 0), (0, 1)))[:, :, index]
        return conv(x, kernel.astype(x.dtype), bias.astype(x.dtype), impl=self.impl)


def squash(x: jax.Array) -> jax.Array:
    """f(a) = 1.7159·tanh(2a/3), appendix A of the paper: f(±1) = ±1."""
    return 1.7159 * jnp.tanh(x * (2 / 3))


def output_codes(num_classes: int) -> np.ndarray:
    """The fixed ±1 codes of the output units: (num_classes, 84), float32."""
    if num_classes > 10:
        codes = np.random.Generator(np.random.Philox(1998)).integers(0, 2, (num_classes, 84))
    else:
        rows = [line.split() for line in DIGITS.split("\n") if line]
        codes = np.array(
            [[r[d][k] == "#" for r in rows for k in range(7)] for d in range(num_classes)]
        )
    return np.where(codes, 1, -1).astype(np.float32)


def _init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Appendix A: uniform in ±2.4 / fan-in."""
    return _uniform(np.float32(np.prod(shape[:-1])))(key, shape, dtype)


def _uniform(fan_in: Any) -> Any:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        limit = jnp.broadcast_to(jnp.asarray(2.4 / fan_in, dtype), shape)
        return jax.random.uniform(key, shape, dtype, -1, 1) * limit

    return init


def lenet5(**kwargs: Any) -> LeNet5:
    """LeNet-5 as everyone trains it; 61,706 parameters at 32×32×1 and 10 classes."""
    return LeNet5(**kwargs)


def lenet5_1998(**kwargs: Any) -> LeNet5Published:
    """LeNet-5 as published; 60,000 trainable parameters at 32×32×1."""
    return LeNet5Published(**kwargs)
