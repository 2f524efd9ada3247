"""RandAugment and TrivialAugment: one operation of fourteen, drawn for every image.

Every image goes through the same array code: one gather by its own affine map, one for equalize,
and elementwise operations, which XLA makes one pass of. The result of the operation that was drawn
is selected. So there is no branch for each image, and it compiles for any device.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from classic_cnns.data import colour, geometry

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
LEVELS = 31  # strengths of an operation, from none to the strongest
_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


class Strongest(NamedTuple):
    """What the operations do at the last level; they do nothing at level 0."""

    shear: float  # pixels per pixel
    translate_x: float  # pixels
    translate_y: float  # pixels
    rotate: float  # degrees
    enhance: float  # brightness, color, contrast and sharpness are 1 ± this
    bits: int  # that posterize takes away


def randaugment(
    key: jax.Array, images: jax.Array, num_ops: int = 2, magnitude: int = 9
) -> jax.Array:
    """Applies `num_ops` random operations, one after the other (Cubuk et al. 2020).

    Operations and their ranges are torchvision's, up or down at random where they have a sign.

    Args:
        key: of the batch.
        images: (N, H, W, C) uint8.
        num_ops: operations for each image.
        magnitude: level 0…30 of all operations.
    """
    h, w = images.shape[1:3]
    strongest = Strongest(0.3, 150 / 331 * w, 150 / 331 * h, 30.0, 0.9, 4)
    level = jnp.full(images.shape[0], magnitude, jnp.int32)
    for k in jax.random.split(key, num_ops):
        images = apply_operation(images, *_draw(k, images.shape[0]), level, strongest)
    return images


def trivialaugment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Applies one random operation at a random level (Müller & Hutter 2021, "wide").

    Args:
        key: of the batch.
        images: (N, H, W, C) uint8.
    """
    key_operation, key_level = jax.random.split(key)
    n = images.shape[0]
    level = jax.random.randint(key_level, (n,), 0, LEVELS)
    strongest = Strongest(0.99, 32.0, 32.0, 135.0, 0.99, 6)
    return apply_operation(images, *_draw(key_operation, n), level, strongest)


def _draw(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Number of the operation and whether it goes down, for every image."""
    key_operation, key_sign = jax.random.split(key)
    operation = jax.random.randint(key_operation, (n,), 0, len(OPERATIONS))
    return operation, jax.random.randint(key_sign, (n,), 0, 2)


def apply_operation(
    images: jax.Array,
    operation: jax.Array,
    down: jax.Array,
    level: jax.Array,
    strongest: Strongest,
) -> jax.Array:
    """Each image through its own operation.

    Args:
        images: (N, H, W, C) uint8.
        operation: (N,) int32, index into `OPERATIONS`.
        down: (N,) int32, 1 for the negative direction of those that have one.
        level: (N,) int32, 0…30.
        strongest: what level 30 stands for.
    """
    strength = jnp.asarray(_strengths(strongest))[operation, level, down]
    matrices = _matrices(strongest, *images.shape[1:3])
    moved = geometry.affine(images, jnp.asarray(matrices)[operation, level, down])
    results = {
        ("brightness",): colour.brightness(images, strength),
        ("color",): colour.saturation(images, strength),
        ("contrast",): colour.contrast(images, strength),
        ("sharpness",): colour.sharpness(images, strength),
        ("posterize",): colour.posterize(images, strength),
        ("solarize",): colour.solarize(images, strength),
        ("autocontrast",): colour.autocontrast(images),
        ("equalize",): colour.equalize(images),
        _GEOMETRIC: moved,
    }
    out = images
    for names, result in results.items():
        drawn = jnp.isin(operation, jnp.array([OPERATIONS.index(name) for name in names]))
        out = jnp.where(drawn[:, None, None, None], result, out)
    return out


def _strengths(strongest: Strongest) -> np.ndarray:
    """(operations, levels, 2) float32: strength of colour operations; 0 for the others."""
    out = np.zeros((len(OPERATIONS), LEVELS, 2))
    level = np.arange(LEVELS) / (LEVELS - 1)
    for name in ("brightness", "color", "contrast", "sharpness"):
        change = strongest.enhance * level
        out[OPERATIONS.index(name)] = np.stack([1 + change, 1 - change], -1)
    out[OPERATIONS.index("posterize")] = np.round(8 - strongest.bits * level)[:, None]
    out[OPERATIONS.index("solarize")] = (255 * (1 - level))[:, None]
    return out.astype(np.float32)


def _matrices(strongest: Strongest, h: int, w: int) -> np.ndarray:
    """(operations, levels, 2, 2, 3) float32: affine maps; the identity for colour operations."""
    out = np.zeros((len(OPERATIONS), LEVELS, 2, 2, 3), np.float32)
    out[:] = geometry.translation(0, 0)
    for level in range(LEVELS):
        for down, sign in enumerate((1, -1)):
            part = sign * level / (LEVELS - 1)
            amount = part * strongest.shear
            # Whole pixels; the tiny addition is for whole numbers that are not, as floats.
            shift_x = sign * int(abs(part) * strongest.translate_x + 1e-6)
            shift_y = sign * int(abs(part) * strongest.translate_y + 1e-6)
            out[1 : 1 + len(_GEOMETRIC), level, down] = (
                geometry.shear(amount, 0, h, w),
                geometry.shear(0, amount, h, w),
                geometry.translation(shift_x, 0),
                geometry.translation(0, shift_y),
                geometry.rotation(part * strongest.rotate),
            )
    return out
