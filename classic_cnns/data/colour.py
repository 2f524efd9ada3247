"""Colour operations with a strength per image, and colour jitter.

Images are (N, H, W, C) uint8 and stay it; a strength is a number or (N,) float32. Each operation
gives what torchvision's of the same name gives for uint8 tensors, at most one level beside it in
single pixels: fractions are cut, and all arithmetic is on integers, so that the same images come
out of any compilation. Grey images have no saturation and no hue: those leave them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_BITS = 20  # of a fraction; a strength up to 8 fits
_ONE = 1 << _BITS


def brightness(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Pixels times `factor` ≥ 0."""
    return _blend(images, 0, _per_image(images, factor))


def contrast(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Distance from the image's mean grey times `factor` ≥ 0."""
    grey, fixed = _grey(images), _fixed(_per_image(images, factor))
    mean = grey.sum((1, 2, 3), keepdims=True).astype(jnp.float32) * (1 / grey[0].size)
    middle = jnp.round(mean * (_ONE - fixed).astype(jnp.float32)).astype(jnp.int32)
    return _level(images.astype(jnp.int32) * fixed + middle)


def posterize(images: jax.Array, bits: jax.Array | int) -> jax.Array:
    """Keeps the highest `bits` of 8 bits."""
    mask = (0xFF00 >> _per_image(images, bits).astype(jnp.int32)) & 0xFF
    return images & mask.astype(jnp.uint8)


def solarize(images: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """Inverts pixels at or above `threshold`."""
    return jnp.where(images.astype(jnp.float32) >= _per_image(images, threshold), ~images, images)


def autocontrast(images: jax.Array) -> jax.Array:
    """Stretches every channel to 0…255; channels of one value stay."""
    n, h, w, c = images.shape
    rows = images.reshape(n, h, w * c)  # reduced along the height first: 16 times faster on CPU
    low = rows.min(1).reshape(n, 1, w, c).min(2, keepdims=True).astype(jnp.int32)
    high = rows.max(1).reshape(n, 1, w, c).max(2, keepdims=True).astype(jnp.int32)
    scale = jax.lax.div(255 * _ONE, jnp.maximum(high - low, 1))
    return jnp.where(high > low, _level((images.astype(jnp.int32) - low) * scale), images)


def equalize(images: jax.Array) -> jax.Array:
    """Makes the histogram of every channel as even as it can be, as Pillow's ImageOps does."""
    n, h, w, c = images.shape
    index = (images.astype(jnp.int32) + 256 * jnp.arange(c)[None, None, None]).reshape(n, -1)
    zeros, mode = jnp.zeros(256 * c, jnp.int32), "promise_in_bounds"
    counts = jax.vmap(lambda i: zeros.at[i].add(1, mode=mode))(index).reshape(n, c, 256)
    up_to = jnp.cumsum(counts, -1)
    # Pixels below the brightest level that occurs, shared by 255 steps.
    step = jax.lax.div(jnp.where(up_to < h * w, up_to, 0).max(-1), 255)[:, None, None]
    # Not a table of new levels: XLA on CPU would compute it anew for every pixel.
    darker = jnp.take_along_axis((up_to - counts).reshape(n, -1), index, 1, mode=mode)
    total = (darker.reshape(images.shape) + jax.lax.div(step, 2)).astype(jnp.float32)
    # An integer division as floats, which are faster; the half keeps whole results whole.
    spread = jnp.floor((total + 0.5) / jnp.maximum(step, 1).astype(jnp.float32))
    return jnp.where(step > 0, jnp.clip(spread, 0, 255).astype(jnp.uint8), images)


def saturation(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Distance of every pixel from its own grey times `factor` ≥ 0."""
    if images.shape[-1] != 3:
        return images
    return _blend(images, _grey(images), _per_image(images, factor))


def sharpness(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Distance of every pixel from its smoothed neighbourhood times `factor` ≥ 0; the edge stays.

    The smoothing kernel is 1 around 5, as in Pillow's ImageEnhance.
    """
    n, h, w, c = images.shape
    if min(h, w) < 3:
        return images
    flat = images.reshape(n, h, w * c).astype(jnp.int32)
    inside = flat[:, 1:-1, c:-c]
    total = flat[:, :-2] + flat[:, 1:-1] + flat[:, 2:]
    total = total[:, :, : -2 * c] + total[:, :, c:-c] + total[:, :, 2 * c :] + 4 * inside
    # total / 13 rounded: the product is that division, exact for all sums of nine pixels.
    smooth = ((2 * total + 13) * 40_330) >> 20
    out = _blend(inside, smooth, _per_image(images, factor)[..., 0])
    # Written into a copy: 15 times faster on CPU than padding.
    whole = jax.lax.dynamic_update_slice(images.reshape(n, h, w * c), out, (0, 1, c))
    return whole.reshape(images.shape)


def hue(images: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Turns the hue by `shift` −0.5…0.5 of a full circle."""
    if images.shape[-1] != 3:
        return images
    one = 1 << 16  # a sixth of the circle
    turn = jnp.round(_per_image(images, shift)[..., 0] * (6 * one)).astype(jnp.int32)
    pixels = images.astype(jnp.int32)
    high, low = pixels.max(-1), pixels.min(-1)
    r, g, b = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    chroma = high - low
    side = jnp.where(high == r, g - b, jnp.where(high == g, b - r, r - g))
    sixth = jnp.where(high == r, 0, jnp.where(high == g, 2 * one, 4 * one))
    fraction = side.astype(jnp.float32) / jnp.maximum(chroma, 1).astype(jnp.float32)
    angle = sixth + jnp.round(fraction * one).astype(jnp.int32) + turn
    offsets = jnp.array([5, 3, 1], jnp.int32)[None, None, None] * one
    k = (angle[..., None] + offsets) % (6 * one)
    share = jnp.clip(jnp.minimum(k, 4 * one - k), 0, one)
    out = high[..., None] * one - chroma[..., None] * share
    # The rounding that torchvision has between floats and uint8.
    return jnp.floor(out.astype(jnp.float32) * (255.999 / 255 / one)).astype(jnp.uint8)


def color_jitter(key: jax.Array, images: jax.Array, amounts: Sequence[float]) -> jax.Array:
    """Changes brightness, contrast, saturation and hue at random, each image by its own strengths.

    As torchvision's ColorJitter, but the random order of the four is one for the whole batch.

    Args:
        key: of the batch.
        images: (N, H, W, C) uint8.
        amounts: (brightness, contrast, saturation, hue). The first three multiply by a number
            even in 1 − amount … 1 + amount, from 0 on; hue turns by up to its amount of a circle
            either way. 0 leaves one out.
    """
    n, step = images.shape[0], 4096
    key_order, *keys = jax.random.split(key, 5)
    operations = []
    for function, amount, k in zip(
        (brightness, contrast, saturation, hue), amounts, keys, strict=True
    ):
        middle = 0 if function is hue else step
        low = middle - round(amount * step)
        if function is not hue:
            low = max(0, low)
        strength = jax.random.randint(k, (n,), low, middle + round(amount * step) + 1)
        if amount:
            operations.append((function, strength.astype(jnp.float32) / step))
    if not operations:
        return images
    branches = [lambda x, f=f, s=s: f(x, s) for f, s in operations]
    order = jax.random.permutation(key_order, len(branches))
    for i in range(len(branches)):
        images = jax.lax.switch(order[i], branches, images)
    return images


# ---- arithmetic on integers


def _per_image(images: jax.Array, value: jax.Array | float) -> jax.Array:
    """(N, 1, 1, 1) float32."""
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32), images.shape[:1])[:, None, None, None]


def _fixed(factor: jax.Array) -> jax.Array:
    return jnp.round(factor * _ONE).astype(jnp.int32)


def _blend(x: jax.Array, y: jax.Array | int, factor: jax.Array) -> jax.Array:
    """⌊y + factor · (x − y)⌋ within 0…255, uint8."""
    factor = _fixed(factor)
    return _level(x.astype(jnp.int32) * factor + y * (_ONE - factor))


def _level(x: jax.Array) -> jax.Array:
    # 2⁻¹² more than nothing, so that a whole number is not cut for a rounded factor.
    return jnp.clip((x + (_ONE >> 12)) >> _BITS, 0, 255).astype(jnp.uint8)


def _grey(images: jax.Array) -> jax.Array:
    """(N, H, W, 1) int32: 0.2989 R + 0.587 G + 0.114 B, cut, or the mean of other channels."""
    pixels = images.astype(jnp.int32)
    if images.shape[-1] != 3:
        return jax.lax.div(pixels.sum(-1, keepdims=True), images.shape[-1])
    # 23 bits hold the sum and are fine enough to cut every colour where the decimal weights do.
    weighted = (
        pixels[..., :1] * 2_507_355 + pixels[..., 1:2] * 4_924_113 + pixels[..., 2:] * 956_301
    )
    return (weighted + 200) >> 23
