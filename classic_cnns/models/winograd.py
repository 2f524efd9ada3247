"""Winograd's F(2×2, 3×3): four outputs of a 3×3 convolution from 16 multiplications in place of 36.

Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1. The
one-dimensional algorithm F(2, 3) gives two neighbouring outputs from four inputs with four
multiplications; it is nested, along the width and then the height.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def conv(
    x: jax.Array,
    weights: Sequence[jax.Array],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> jax.Array:
    """A 3×3 cross-correlation with stride 1, as sixteen matrix products.

    Args:
        x: images, (N, H, W, C).
        weights: from `transform_kernel`, four of (4, C, O).
        padding: zeros (before, after) along height and width, in pixels.

    Returns:
        (N, H', W', O) with H' = H + padding − 2.
    """
    (n, h, w, c), o = x.shape, weights[0].shape[-1]
    h_out, w_out = h + sum(padding[0]) - 2, w + sum(padding[1]) - 2
    h_tiles, w_tiles = -(-h_out // 2), -(-w_out // 2)
    (top, _), (left, _) = padding
    tails = (top, 2 * h_tiles + 2 - h - top, 0), (left, 2 * w_tiles + 2 - w - left, 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *tails, (0, 0, 0)))
    inputs = _inputs(jnp.stack(_inputs(x)))  # 4 of (4, N, tiles, tiles, C)
    products = [
        (a.reshape(4, -1, c) @ b).reshape(4, n, h_tiles, w_tiles, o)
        for a, b in zip(inputs, weights, strict=True)
    ]
    columns = lax.split(_outputs(products), (1,) * 4)
    return _outputs([column[0] for column in columns])[:, :h_out, :w_out]


def transform_kernel(kernel: jax.Array) -> list[jax.Array]:
    """What `conv` multiplies with, four of (4, C, O), for a kernel (3, 3, C, O)."""
    rows = _weights(lax.split(kernel, (1, 1, 1)))
    return [jnp.concatenate(_weights(lax.split(row[0], (1, 1, 1)))) for row in rows]


def _inputs(x: jax.Array) -> list[jax.Array]:
    """Along axis 2, of every tile of four inputs (one each two) what is multiplied."""
    x = x.reshape(*x.shape[:2], x.shape[2] // 2, 2, *x.shape[3:])
    even, odd = (part[:, :, :, 0] for part in lax.split(x, (1, 1), axis=3))
    a, b, c, d = even[:, :, :-1], odd[:, :, :-1], even[:, :, 1:], odd[:, :, 1:]
    return [a - c, b + c, c - b, b - d]


def _weights(kernel: Sequence[jax.Array]) -> list[jax.Array]:
    a, b, c = kernel
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _outputs(products: Sequence[jax.Array]) -> jax.Array:
    """Two outputs from four products, side by side along axis 2."""
    a, b, c, d = products
    x = jnp.stack([a + b + c, b - c - d], axis=3)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
