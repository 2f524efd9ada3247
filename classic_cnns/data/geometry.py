"""Where pixels go: crops, flips, affine maps, and parts that are erased.

Batched array code without loops over images; images are (N, H, W, C) uint8 and stay it. Positions
and weights are integers wherever they decide about a pixel, so that the same key gives the same
pixels in any compilation and on any number of devices.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from classic_cnns.errors import ConfigError

_ONE = 1 << 18  # of a coefficient of an affine map
_LARGEST = 2000  # pixels of a side up to which no sum of an affine map leaves 32 bits
_WEIGHT = 1 << 16  # sum of the resampling weights of a pixel: 255 · 2¹⁶ is exact in float32
_TRIES = 10  # rectangles that are drawn to find one that fits, as torchvision and timm do


def random_crop(
    key: jax.Array,
    images: jax.Array,
    padding: int,
    mode: Literal["reflect", "constant"] = "reflect",
) -> jax.Array:
    """Shifts every image by up to `padding` pixels in both directions.

    The same as padding all sides and cropping at a random place (He et al. 2016, section 4.2, with
    mode="constant" for their zeros); written as one gather, without the padded batch.

    Raises:
        ConfigError: the padding is as large as the image.
    """
    n, h, w, _ = images.shape
    if padding >= min(h, w):
        raise ConfigError(
            f"augment.crop_padding is {padding}, images have {h}×{w} px. Fix: "
            f"augment.crop_padding={min(h, w) // 8}"
        )
    shift = jax.random.randint(key, (2, n, 1), -padding, padding + 1)
    rows = jnp.arange(h)[None] + shift[0]
    cols = jnp.arange(w)[None] + shift[1]
    out = jax.vmap(lambda image, r, c: image[r[:, None], c])(
        images, _mirror(rows, h), _mirror(cols, w)
    )
    if mode == "reflect":
        return out
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((cols >= 0) & (cols < w))[:, None]
    return jnp.where(inside[..., None], out, jnp.zeros((), out.dtype))


def _mirror(index: jax.Array, size: int) -> jax.Array:
    """−1 → 1, size → size − 2: reflection without repeating the edge."""
    index = jnp.abs(index)
    return jnp.clip(jnp.where(index >= size, 2 * (size - 1) - index, index), 0, size - 1)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors every image left to right with probability 1/2."""
    return _flip(images, jax.random.bernoulli(key, 0.5, images.shape[:1]))


def alternating_flip(
    key: jax.Array, images: jax.Array, index: jax.Array, epoch: jax.Array
) -> jax.Array:
    """Mirrors every image left to right in exactly every other epoch (Jordan 2024).

    Whether an image starts mirrored is a coin thrown once, so that about half of the images are
    mirrored in each epoch, and two epochs in a row show both sides of every image.

    Args:
        key: the same at every step.
        images: (N, H, W, C).
        index: (N,) int32, which example each image is.
        epoch: (N,) int32, how often it was seen before.
    """
    coin = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), (), jnp.uint8))(index)
    return _flip(images, (coin + epoch) % 2 == 1)


def _flip(images: jax.Array, which: jax.Array) -> jax.Array:
    return jnp.where(which[:, None, None, None], images[:, :, ::-1], images)


def cutout(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """Zeroes a square of `size` pixels around a random pixel of every image.

    The square may hang over the border (DeVries & Taylor, 2017, section 3.1).
    """
    n, h, w, _ = images.shape
    key_y, key_x = jax.random.split(key)
    top = jax.random.randint(key_y, (n,), 0, h) - size // 2
    left = jax.random.randint(key_x, (n,), 0, w) - size // 2
    hole = rectangle(h, w, top, left, size, size)
    return jnp.where(hole[..., None], jnp.zeros((), images.dtype), images)


def random_erasing(
    key: jax.Array,
    images: jax.Array,
    probability: float,
    mode: Literal["const", "pixel"] = "const",
) -> jax.Array:
    """Erases a rectangle inside an image with a probability (Zhong et al. 2017, algorithm 1).

    It takes 2…33 % of the image, with height / width between 0.3 and 3.3, even in logarithm. Where
    none of ten draws fits into the image, it stays whole.

    Args:
        key: of the batch.
        images: (N, H, W, C) uint8.
        probability: of an image to be erased.
        mode: "const" makes the rectangle black, "pixel" draws every value evenly from 0…255.
    """
    n, h, w, _ = images.shape
    key_hit, key_box, key_pixels = jax.random.split(key, 3)
    top, left, height, width, fits = _boxes(key_box, n, h, w, (0.02, 1 / 3), (0.3, 1 / 0.3), 1)
    hit = fits & jax.random.bernoulli(key_hit, probability, (n,))
    hole = rectangle(h, w, top, left, height, width) & hit[:, None, None]
    fill = jnp.zeros((), images.dtype)
    if mode == "pixel":
        fill = _noise(key_pixels, images.shape)
    return jnp.where(hole[..., None], fill, images)


def _noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random bytes, four of each random word: 25 times faster on CPU than a word for each."""
    n, size = shape[0], math.prod(shape[1:])
    words = jax.random.bits(key, (n, -(-size // 4)), jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(n, -1)[:, :size].reshape(shape)


def rectangle(
    h: int,
    w: int,
    top: jax.Array,
    left: jax.Array,
    height: jax.Array | int,
    width: jax.Array | int,
) -> jax.Array:
    """(N, H, W) bool, true inside rectangles (N,) in pixels, which may hang over the border."""
    y, x = jnp.arange(h)[None], jnp.arange(w)[None]
    rows = (y >= top[:, None]) & (y < (top + height)[:, None])
    cols = (x >= left[:, None]) & (x < (left + width)[:, None])
    return rows[:, :, None] & cols[:, None]


def _boxes(
    key: jax.Array,
    n: int,
    h: int,
    w: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    margin: int,
) -> tuple[jax.Array, ...]:
    """Random rectangles within an image, the first of ten draws that leaves `margin` pixels.

    Returns:
        top, left, height, width, each (N,) int32, and whether any draw fitted, (N,) bool. Where
        none did, height and width are the image's.
    """
    key_area, key_ratio, key_y, key_x = jax.random.split(key, 4)
    share = jax.random.uniform(key_area, (n, _TRIES), minval=area[0], maxval=area[1])
    log_ratio = jax.random.uniform(
        key_ratio, (n, _TRIES), minval=math.log(ratio[0]), maxval=math.log(ratio[1])
    )
    heights = jnp.round(jnp.sqrt(h * w * share * jnp.exp(log_ratio))).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(h * w * share * jnp.exp(-log_ratio))).astype(jnp.int32)
    fit = (heights > 0) & (widths > 0) & (heights <= h - margin) & (widths <= w - margin)
    first = fit.argmax(1)[:, None]
    fits = fit.any(1)
    height = jnp.where(fits, jnp.take_along_axis(heights, first, 1)[:, 0], h)
    width = jnp.where(fits, jnp.take_along_axis(widths, first, 1)[:, 0], w)
    top = jax.random.randint(key_y, (n,), 0, h - height + 1)
    left = jax.random.randint(key_x, (n,), 0, w - width + 1)
    return top, left, height, width, fits


def random_resized_crop(
    key: jax.Array,
    images: jax.Array,
    scale: tuple[float, float] = (0.08, 1.0),
    size: int = 0,
) -> jax.Array:
    """Crops a random part of every image and resizes it (Szegedy et al. 2015, section 6).

    The area is even in `scale`, the logarithm of width / height even between 3/4 and 4/3, the place
    even. Where none of ten draws fits into the image, all of it is taken. Resizing is bilinear
    with anti-aliasing and sees nothing outside the crop: what Pillow does to the cropped image.

    Args:
        key: of the batch.
        images: (N, H, W, C) uint8.
        scale: smallest and largest share of the area.
        size: side of the result in pixels; 0 keeps height and width.

    Returns:
        (N, size, size, C) uint8.
    """
    n, h, w, _ = images.shape
    top, left, height, width, _ = _boxes(key, n, h, w, scale, (3 / 4, 4 / 3), 0)
    return resize_box(images, top, left, height, width, size or h, size or w)


def resize_box(
    images: jax.Array,
    top: jax.Array,
    left: jax.Array,
    height: jax.Array,
    width: jax.Array,
    out_h: int,
    out_w: int,
) -> jax.Array:
    """The part of every image in its own rectangle, at (out_h, out_w), as two matrix products."""
    rows = _triangle(top, height, images.shape[1], out_h)
    cols = _triangle(left, width, images.shape[2], out_w)
    # Pixels and weights are integers of so few bits that no sum is ever rounded.
    exact = jax.lax.Precision.HIGHEST
    out = jnp.einsum("npw,nhwc->nhpc", cols, images.astype(jnp.float32), precision=exact)
    out = jnp.einsum("noh,nhpc->nopc", rows, _from_weights(out), precision=exact)
    return _from_weights(out).astype(jnp.uint8)


def _from_weights(x: jax.Array) -> jax.Array:
    """Sums of weighted pixels to pixels, rounded."""
    return jnp.clip(jnp.floor(x * (1 / _WEIGHT) + 0.5), 0, 255)


def _triangle(start: jax.Array, length: jax.Array, size: int, out: int) -> jax.Array:
    """(N, out, size) weights of input pixels for every output pixel, whole numbers in float32.

    Output pixel i lies at start + (i + 1/2) · length / out; the filter falls to zero one step of
    the coarser of the two grids away from it. All of it times 2 · out is an integer.
    """
    start, length = start[:, None, None], length[:, None, None]
    i, j = jnp.arange(out)[None, :, None], jnp.arange(size)[None, None]
    distance = jnp.abs((2 * (j - start) + 1) * out - (2 * i + 1) * length)
    weight = jnp.maximum(2 * jnp.maximum(length, out) - distance, 0)
    weight = jnp.where((j >= start) & (j < start + length), weight, 0)
    total = weight.sum(-1, keepdims=True)
    return jax.lax.div(weight * _WEIGHT + total // 2, total).astype(jnp.float32)


def affine(images: jax.Array, matrices: jax.Array) -> jax.Array:
    """Affine map of every image about its centre, nearest pixel, black outside.

    Args:
        images: (N, H, W, C) uint8.
        matrices: (N, 2, 3) float32, from an output position (x, y, 1) in pixels from the centre of
            the image to the input position (x, y) it shows; see `rotation` and `shear`.

    Raises:
        ConfigError: a side of more than 2,000 pixels.
    """
    n, h, w, c = images.shape
    if max(h, w) > _LARGEST:
        raise ConfigError(
            f"images of {h}×{w} px cannot be rotated or sheared. Fix: data.image_size of "
            f"{_LARGEST} or less, or augment.auto_augment=none"
        )
    m = jnp.round(matrices * _ONE).astype(jnp.int32)[..., None, None]
    x, y = (2 * jnp.arange(w) - (w - 1))[None, None], (2 * jnp.arange(h) - (h - 1))[None, :, None]

    def nearest_pixel(k: int, size: int) -> jax.Array:
        """⌊position + size / 2⌋ of coordinate k; x, y and the sum are twice the positions."""
        twice = m[:, k, 0] * x + m[:, k, 1] * y + 2 * m[:, k, 2]
        return (twice + size * _ONE) >> _ONE.bit_length()

    col, row = nearest_pixel(0, w), nearest_pixel(1, h)
    inside = (col >= 0) & (col < w) & (row >= 0) & (row < h)
    source = jnp.where(inside, row * w + col, 0).reshape(n, h * w, 1)
    out = jnp.take_along_axis(images.reshape(n, h * w, c), source, 1).reshape(images.shape)
    return jnp.where(inside[..., None], out, jnp.zeros((), images.dtype))


def rotation(degrees: float) -> np.ndarray:
    """(2, 3) matrix for `affine` that turns an image counter-clockwise."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, -sin, 0], [sin, cos, 0]], np.float32)


def shear(x: float, y: float, height: int, width: int) -> np.ndarray:
    """(2, 3) matrix for `affine` that shows x + `x` · y and y + `y` · x, seen from the top left."""
    return np.array([[1, x, x * height / 2], [y, 1, y * width / 2]], np.float32)


def translation(x: int, y: int) -> np.ndarray:
    """(2, 3) matrix for `affine` that moves an image right by `x` and down by `y` pixels."""
    return np.array([[1, 0, -x], [0, 1, -y]], np.float32)
