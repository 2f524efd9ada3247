"""Convolution on CPU: the fastest form for each shape, all of the same mathematics.

XLA:CPU's own choices are slow for some shapes (docs/performance.md has the figures):

* a 1×1 convolution is a matrix product, and its weight gradient a sum of products over slices of
  the batch: XLA lays out a transposed activation in memory for the whole, and computes what led to
  it once more for that;
* a convolution of few channels is a few matrix products that give a block of neighbouring outputs
  at once, from blocks of input pixels;
* a convolution onto a map of a few pixels is one product with its patches, since XLA falls back to
  a naive loop where the map is smaller than the kernel; and there (3×3 on 2×2, 5×5 on 4×4) one
  product a pixel, with the part of the kernel that is not over padding;
* a 3×3 convolution of many channels in float32 is Winograd's sixteen products for tiles of four
  outputs: 4 multiplications an output in place of 9;
* groups are convolutions of their own, of which each takes its fastest form;
* any other convolution is XLA's; its weight gradient is summed over slices of the batch that fit
  the cache, because XLA transposes the whole activation for it.

Inside loops XLA has its fast kernel only for convolutions that read NHWC and HWIO and write NHWC,
and a naive one for all others. So the derivatives of the last are written as such convolutions, and
a loop of training steps is as fast as they are. It and the first are written with `jax.custom_jvp`
and the others are plain array code, so forward mode, reverse mode and any mixture of the two
(Hessian-vector products) work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from classic_cnns.models import winograd

Impl = Literal["auto", "lax"]
Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

BLOCK_OUTPUTS = 16  # channels out, up to which products of blocks win, and
_BLOCK_LIMIT = 4  # channels in × channels out over the kernel's area
_WINOGRAD_CHANNELS = 24  # in and out, and
_WINOGRAD_PIXELS = 128  # outputs of a batch, from which on Winograd's form wins
_WINOGRAD_BYTES = 1 << 21  # part of a batch that is transformed at once
_PRODUCT_BYTES = 1 << 21  # inputs and outputs of a product that its weight gradient reads at once
_SMALL_MAP = 4  # rows of output up to which patches win; XLA is 30 times slower on 2×2 maps
_MOST_GROUPS = 8  # that are convolved one by one
_SLICE_BYTES = 1 << 19  # part of a batch whose weight gradient is taken at once


def conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    groups: int = 1,
    impl: Impl = "auto",
) -> jax.Array:
    """Two-dimensional cross-correlation.

    Args:
        x: images, (N, H, W, C).
        kernel: weights, (kh, kw, C // groups, O), same dtype as `x`.
        bias: added to every output pixel, (O,), same dtype as `x`.
        strides: step along height and width, in pixels.
        padding: zeros (before, after) along height and width, in pixels.
        groups: number of groups that channels are split into.
        impl: "auto" picks the fastest form for the platform and shape, "lax" is XLA's own.

    Returns:
        (N, H', W', O) with H' = (H + padding − kh) // stride + 1.
    """
    if impl not in ("auto", "lax"):
        raise ValueError(f'impl={impl!r} is unknown. Fix: use "auto" or "lax".')
    kh, kw, c, o = kernel.shape
    if impl == "lax" or jax.default_backend() != "cpu" or groups > _MOST_GROUPS:
        out = _lax_conv(x, kernel, strides, padding, groups)
    elif groups > 1:
        split = functools.partial(jnp.split, indices_or_sections=groups, axis=-1)
        each = functools.partial(conv, strides=strides, padding=padding)
        out = jnp.concatenate([*map(each, split(x), split(kernel))], axis=-1)
    elif (kh, kw) == (1, 1) and padding == ((0, 0), (0, 0)):
        out = _product(x[:, :: strides[0], :: strides[1]], kernel[0, 0])
    elif strides == (1, 1) and o <= BLOCK_OUTPUTS and c * o <= _BLOCK_LIMIT * kh * kw:
        return _blocked_conv(x, kernel, bias, padding)
    else:
        out = _general_conv(x, kernel, strides, padding)
    return out if bias is None else out + bias[None, None, None]


def slow_in_loops(impl: str) -> bool:
    """Whether convolutions of this `impl` are slow in loops here: XLA's own on CPU are."""
    return impl == "lax" and jax.default_backend() == "cpu"


@jax.custom_jvp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


@_product.defjvp
def _product_jvp(primals: Any, tangents: Any) -> Any:
    (x, kernel), (dx, dkernel) = primals, tangents
    size = _at_once(_PRODUCT_BYTES // (sum(kernel.shape) * x.dtype.itemsize), x.size)
    return x @ kernel, dx @ kernel + _sliced_product(x, dkernel, size)


@functools.partial(jax.jit, static_argnums=2)  # traced once for all layers of a shape
def _sliced_product(x: jax.Array, kernel: jax.Array, size: int) -> jax.Array:
    """x @ kernel, for `size` pixels at once."""
    pixels = x.reshape(-1, x.shape[-1])
    if len(pixels) <= size:
        return x @ kernel
    out = _map_slices(lambda part: part @ kernel, pixels, size)
    return out.reshape(*x.shape[:-1], -1)


def _general_conv(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """The fastest form where it is neither 1×1 nor in blocks."""
    kh, kw = kernel.shape[:2]
    h_out, w_out = map(_out_size, x.shape[1:3], (kh, kw), strides, padding)
    if kh >= x.shape[1] and kw >= x.shape[2] and max(h_out, w_out) <= _SMALL_MAP:
        return _pixels_conv(x, kernel, strides, padding)
    if (
        (kh, kw, *strides, x.dtype) == (3, 3, 1, 1, jnp.float32)
        and min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS
        and x.shape[0] * h_out * w_out >= _WINOGRAD_PIXELS
    ):
        pixels = x.shape[1] * x.shape[2]
        image = pixels * max(kernel.shape[2:]) * x.dtype.itemsize
        size = _at_once(_WINOGRAD_BYTES // image, x.shape[0])
        return _winograd_conv(x, kernel, padding, size)
    if h_out <= _SMALL_MAP:
        return _patches_conv(x, kernel, strides, padding)
    size = _at_once(_SLICE_BYTES // (x[0].size * x.dtype.itemsize), x.shape[0])
    return _sliced_conv(x, kernel, strides, padding, size)


@functools.partial(jax.jit, static_argnums=(2, 3))  # traced once for all layers of a shape
def _winograd_conv(x: jax.Array, kernel: jax.Array, padding: Padding, size: int) -> jax.Array:
    """3×3, stride 1, by `winograd.conv`. What is multiplied there is four times the image, so it is
    made for `size` images at once, which fit the cache, and made again for the gradient.
    """
    transform: Callable[[jax.Array], jax.Array] = functools.partial(
        winograd.conv, weights=winograd.transform_kernel(kernel), padding=padding
    )
    if x.shape[0] <= size:
        return transform(x)
    return _map_slices(jax.checkpoint(transform, prevent_cse=False), x, size)


def _at_once(size: int, everything: int) -> int:
    """The size of a slice; of a batch that is spread over devices slices would move it."""
    return everything if jax.device_count() > 1 else max(1, size)


def _map_slices(f: Callable[[jax.Array], jax.Array], x: jax.Array, size: int) -> jax.Array:
    """`f` of about `size` rows of x at once, one slice after the other."""
    n = x.shape[0]
    size = next((d for d in range(size, size // 2, -1) if n % d == 0), size)
    slices = -(-n // size)
    x = jnp.pad(x, ((0, slices * size - n), *((0, 0) for _ in x.shape[1:])))
    out = lax.map(f, x.reshape(slices, size, *x.shape[1:]))
    return out.reshape(slices * size, *out.shape[2:])[:n]


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


def _blocked_conv(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, padding: Padding
) -> jax.Array:
    """Stride 1. A block of neighbouring outputs is [the blocks of input it reads, flattened] @ the
    kernel shifted to each output of the block; one product for each row of blocks that is read.

    The outputs come sorted by whether their row and column are even or odd, four images that are
    then interleaved: a 2×2 pooling takes them apart again (`layers.max_pool`), and XLA cancels the
    two, so that the image is laid out for none but who looks at it.
    """
    (n, h, w, c), (kh, kw, _, o) = x.shape, kernel.shape
    h_out, w_out = _out_size(h, kh, 1, padding[0]), _out_size(w, kw, 1, padding[1])
    # Outputs a block; input is cut into blocks of the same size. Two rows where the last four would
    # have half or more beyond the image.
    rows, cols = 4 if h_out % 4 in (0, 3) else 2, 2
    h_blocks, w_blocks = -(-h_out // rows), -(-w_out // cols)
    h_read, w_read = -(-(rows + kh - 1) // rows), -(-(cols + kw - 1) // cols)  # in blocks
    h_all, w_all = h_blocks + h_read - 1, w_blocks + w_read - 1
    # What the outputs beyond the last read; rows that no output reads are cut off.
    (top, _), (left, _) = padding
    tails = (top, h_all * rows - h - top, 0), (left, w_all * cols - w - left, 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *tails, (0, 0, 0)))
    x = x.reshape(n, h_all, rows, w_all, cols, c).swapaxes(2, 3)
    x = x.reshape(n, h_all, w_all, rows * cols * c)
    x = jnp.concatenate([x[:, :, j : j + w_blocks] for j in range(w_read)], axis=-1)
    pairs = rows // 2
    down = _placement(kh, h_read * rows, rows).reshape(kh, -1, pairs, 2).astype(kernel.dtype)
    right = _placement(kw, w_read * cols, cols).astype(kernel.dtype)
    shifted = jnp.einsum("ijco,iaup,jbq->abcpquo", kernel, down, right)
    shifted = shifted.reshape(h_read, rows, w_read, cols, c, rows * cols * o).swapaxes(1, 2)
    shifted = shifted.reshape(h_read, -1, rows * cols * o)
    read = (x[:, i : i + h_blocks].reshape(n * h_blocks * w_blocks, -1) for i in range(h_read))
    products = (a @ b for a, b in zip(read, shifted, strict=True))
    out = functools.reduce(jnp.add, products)
    quarters = [
        part.reshape(n, h_blocks, w_blocks, pairs, o)
        .swapaxes(2, 3)
        .reshape(n, h_blocks * pairs, 1, w_blocks, 1, o)
        for part in lax.split(out, (pairs * o,) * 4, axis=1)
    ]
    if bias is not None:  # so late, since gradients that two read are not computed while laid out
        quarters = [part + bias[None, None, None, None, None] for part in quarters]
    even = lax.concatenate(quarters[:2], 4)
    odd = lax.concatenate(quarters[2:], 4)
    out = lax.concatenate((even, odd), 2).reshape(n, h_blocks * rows, w_blocks * cols, o)
    return out[:, :h_out, :w_out]


def _placement(size: int, read: int, block: int) -> np.ndarray:
    """1 at [i, u, v] where a block's output v reads input u through the kernel's row (column) i."""
    place = np.zeros((size, read, block), np.float32)
    for i, v in np.ndindex(size, block):
        place[i, i + v, v] = 1
    return place


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _sliced_conv(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, size: int
) -> jax.Array:
    """XLA's convolution, whose derivative by the kernel is a sum over slices of `size` images."""
    return _lax_conv(x, kernel, strides, padding)


@_sliced_conv.defjvp
def _sliced_conv_jvp(
    strides: Pair, padding: Padding, size: int, primals: Any, tangents: Any
) -> Any:
    # Layouts such that what reverse mode makes of these two, by exchanging what is read and what is
    # written, reads NHWC and HWIO and writes NHWC.
    (x, kernel), (dx, dkernel) = primals, tangents
    conv = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding)
    by_x = conv(dx, kernel.swapaxes(2, 3), dimension_numbers=("NHWC", "HWOI", "NHWC"))
    dkernel = dkernel.transpose(2, 0, 1, 3)
    slices = (x[i : i + size].transpose(3, 1, 2, 0) for i in range(0, x.shape[0], size))
    by_kernel = [conv(s, dkernel, dimension_numbers=("CHWN", "IHWO", "HWNC")) for s in slices]
    out = _lax_conv(x, kernel, strides, padding)
    return out, by_x + jnp.concatenate(by_kernel, axis=2).transpose(2, 0, 1, 3)
