"""Convolution on CPU: the fastest form for each shape, all of the same mathematics.

XLA:CPU's own choices are slow for some shapes (docs/performance.md has the figures):

* a 1×1 convolution is a matrix product;
* a convolution of few channels is one matrix product, with the kernel laid out as a banded
  (Toeplitz) matrix that gives a few neighbouring outputs at once;
* a convolution onto a map of a few pixels is one product with its patches, since XLA falls back to
  a naive loop where the map is smaller than the kernel; and there (3×3 on 2×2, 5×5 on 4×4) one
  product a pixel, with the part of the kernel that is not over padding;
* the weight gradient of any other convolution is summed over slices of the batch that fit the
  cache, because XLA transposes the whole activation for it.

The last is written with `jax.custom_jvp` and the others are plain array code, so forward mode,
reverse mode and any mixture of the two (Hessian-vector products) work.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Impl = Literal["auto", "lax"]
Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

_BAND_LIMIT = 2_500  # width × channels in × channels out, up to which the banded product wins
_SMALL_MAP = 4  # rows of output up to which patches win; XLA is 30 times slower on 2×2 maps
_SLICE_BYTES = 1 << 19  # part of a batch whose weight gradient is taken at once


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    groups: int = 1,
    impl: Impl = "auto",
) -> jax.Array:
    """Two-dimensional cross-correlation without bias.

    Args:
        x: images, (N, H, W, C).
        kernel: weights, (kh, kw, C // groups, O), same dtype as `x`.
        strides: step along height and width, in pixels.
        padding: zeros (before, after) along height and width, in pixels.
        groups: number of groups that channels are split into.
        impl: "auto" picks the fastest form for the platform and shape, "lax" is XLA's own.

    Returns:
        (N, H', W', O) with H' = (H + padding − kh) // stride + 1.
    """
    if impl not in ("auto", "lax"):
        raise ValueError(f'impl={impl!r} is unknown. Fix: use "auto" or "lax".')
    if impl == "lax" or jax.default_backend() != "cpu" or groups > 1:
        return _lax_conv(x, kernel, strides, padding, groups)
    kh, kw, c, o = kernel.shape
    if (kh, kw) == (1, 1) and padding == ((0, 0), (0, 0)):
        return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]
    if x.shape[2] * c * o <= _BAND_LIMIT:
        return _banded_conv(x, kernel, strides, padding)
    h_out, w_out = map(_out_size, x.shape[1:3], (kh, kw), strides, padding)
    if kh >= x.shape[1] and kw >= x.shape[2] and max(h_out, w_out) <= _SMALL_MAP:
        return _pixels_conv(x, kernel, strides, padding)
    if h_out <= _SMALL_MAP:
        return _patches_conv(x, kernel, strides, padding)
    if jax.device_count() > 1:  # slices of a batch that is spread over devices would move it
        return _lax_conv(x, kernel, strides, padding)
    return _sliced_conv(x, kernel, strides, padding)


def _lax_conv(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, groups: int = 1
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _banded_conv(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """Each block of neighbouring outputs in a row is [what it reads, flattened] @ band, one product
    for all blocks.
    """
    n, _, _, c = x.shape
    kh, kw, _, o = kernel.shape
    sh, sw = strides
    w_out = _out_size(x.shape[2], kw, sw, padding[1])
    # About as wide as the kernel: a wide band is mostly zeros, of a narrow one the blocks overlap.
    block = min(range(kw + 1, kw // 2, -1), key=lambda size: -w_out % size)
    surplus = -w_out % block
    blocks, read = (w_out + surplus) // block, (block - 1) * sw + kw
    x = jnp.pad(x, ((0, 0), padding[0], (padding[1][0], padding[1][1] + surplus * sw), (0, 0)))
    h_out = _out_size(x.shape[1], kh, sh, (0, 0))
    # place[j, u, v] = 1 where the block's output v reads its input u through kernel column j.
    place = np.zeros((kw, read, block), np.float32)
    for j, v in np.ndindex(kw, block):
        place[j, v * sw + j, v] = 1
    band = jnp.einsum("ijco,juv->iucvo", kernel, place.astype(kernel.dtype))
    x = x.reshape(n, x.shape[1], -1)
    parts = [
        x[:, i : i + (h_out - 1) * sh + 1 : sh, first : first + read * c]
        for first in range(0, blocks * block * sw * c, block * sw * c)
        for i in range(kh)
    ]
    rows = jnp.concatenate(parts, axis=-1).reshape(n, h_out, blocks, kh * read * c)
    out = rows @ band.reshape(kh * read * c, block * o)
    return out.reshape(n, h_out, w_out + surplus, o)[:, :, :w_out]


def _out_size(size: int, kernel: int, stride: int, padding: Pair) -> int:
    return (size + sum(padding) - kernel) // stride + 1


def _pixels_conv(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """Every output pixel is the part of the image under the kernel @ the part of the kernel that
    lies on the image, a product each; the patches would be mostly padding.
    """
    n, h, w, _ = x.shape
    kh, kw, _, o = kernel.shape
    h_out = _out_size(h, kh, strides[0], padding[0])
    w_out = _out_size(w, kw, strides[1], padding[1])
    pixels = []
    for row, col in np.ndindex(h_out, w_out):
        top, left = row * strides[0] - padding[0][0], col * strides[1] - padding[1][0]
        image = x[:, max(top, 0) : max(top + kh, 0), max(left, 0) : max(left + kw, 0)]
        weights = kernel[max(-top, 0) : max(h - top, 0), max(-left, 0) : max(w - left, 0)]
        pixels.append(image.reshape(n, -1) @ weights.reshape(-1, o))
    return jnp.stack(pixels, axis=1).reshape(n, h_out, w_out, o)


def _patches_conv(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """Every output pixel is its flattened patch of the input @ the kernel, one product for all."""
    kh, kw, c, o = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h_out = _out_size(x.shape[1], kh, strides[0], (0, 0))
    w_out = _out_size(x.shape[2], kw, strides[1], (0, 0))
    shifted = [
        x[:, i : i + (h_out - 1) * strides[0] + 1 : strides[0]][
            :, :, j : j + (w_out - 1) * strides[1] + 1 : strides[1]
        ]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(kh * kw * c, o)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _sliced_conv(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """XLA's convolution, whose derivative by the kernel is a sum over slices of the batch."""
    return _lax_conv(x, kernel, strides, padding)


@_sliced_conv.defjvp
def _sliced_conv_jvp(strides: Pair, padding: Padding, primals: Any, tangents: Any) -> Any:
    (x, kernel), (dx, dkernel) = primals, tangents
    out = _lax_conv(x, kernel, strides, padding)
    size = max(1, _SLICE_BYTES // (x[0].size * x.dtype.itemsize))
    slices = [
        _lax_conv(x[i : i + size], dkernel, strides, padding) for i in range(0, x.shape[0], size)
    ]
    return out, _lax_conv(dx, kernel, strides, padding) + jnp.concatenate(slices)
