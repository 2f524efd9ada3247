"""Augmentation and normalisation on the device: batched array code inside the jitted step.

Every function takes a key and a batch of uint8 images (N, H, W, C) and returns one of the same
shape and dtype; `normalize` makes floats of it. The key is a function of (seed, step), so a resumed
run sees the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from classic_cnns.errors import ConfigError, nearest

Augment = Callable[[jax.Array, jax.Array], jax.Array]


def random_crop(
    key: jax.Array,
    images: jax.Array,
    padding: int,
    mode: Literal["reflect", "constant"] = "reflect",
) -> jax.Array:
    """Shifts every image by up to `padding` pixels in both directions.

    The same as padding all sides and cropping at a random place (He et al. 2016, section 4.2, with
    mode="constant" for their zeros); written as one gather, without the padded batch.
    """
    n, h, w, _ = images.shape
    shift = jax.random.randint(key, (2, n, 1), -padding, padding + 1)
    rows = jnp.arange(h)[None] + shift[0]
    cols = jnp.arange(w)[None] + shift[1]
    out = images[
        jnp.arange(n)[:, None, None], _mirror(rows, h)[:, :, None], _mirror(cols, w)[:, None]
    ]
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
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def cutout(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """Zeroes a square of `size` pixels around a random pixel of every image.

    The square may hang over the border (DeVries & Taylor, 2017, section 3.1).
    """
    n, h, w, _ = images.shape
    key_y, key_x = jax.random.split(key)
    top = jax.random.randint(key_y, (n, 1), 0, h) - size // 2
    left = jax.random.randint(key_x, (n, 1), 0, w) - size // 2
    y, x = jnp.arange(h)[None], jnp.arange(w)[None]
    hole = ((y >= top) & (y < top + size))[:, :, None] & ((x >= left) & (x < left + size))[:, None]
    return jnp.where(hole[..., None], jnp.zeros((), images.dtype), images)


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: Any = jnp.float32
) -> jax.Array:
    """(pixels / 255 − mean) / std per channel; uint8 (N, H, W, C) in, `dtype` out."""
    scale = 1 / (255 * np.asarray(std, np.float32))
    offset = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    shape = (1,) * (images.ndim - 1) + (-1,)
    out = images.astype(jnp.float32) * scale.reshape(shape) - offset.reshape(shape)
    return out.astype(dtype)


def create_augment(
    *,
    crop_padding: int = 0,
    crop_mode: Literal["reflect", "constant"] = "reflect",
    flip: bool = False,
    cutout_size: int = 0,
) -> Augment:
    """Crop, flip and cutout in that order, as one function of (key, images); 0 and False leave one
    out.
    """

    if crop_mode not in ("reflect", "constant"):
        fix = nearest(crop_mode, ("reflect", "constant"))
        raise ConfigError(f'unknown augment.crop_mode "{crop_mode}". Fix: {fix}')
    for name, value in (("crop_padding", crop_padding), ("cutout_size", cutout_size)):
        if value < 0:
            raise ConfigError(f"augment.{name} is {value}. Fix: use 0 or more")

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        if crop_padding:
            images = random_crop(keys[0], images, crop_padding, crop_mode)
        if flip:
            images = random_flip(keys[1], images)
        if cutout_size:
            images = cutout(keys[2], images, cutout_size)
        return images

    return augment
