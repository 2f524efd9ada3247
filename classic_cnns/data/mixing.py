"""Two images in one: mixup and CutMix, with a target of two labels.

The partner of an image is the one at the same place counted from the end of the batch, whose order
is random anyway. The share of the partner is one for the whole batch, as in both papers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from classic_cnns.data.geometry import rectangle

Batch = dict[str, jax.Array]


def mixup(key: jax.Array, batch: Batch, alpha: float) -> Batch:
    """Blends every image with its partner (Zhang et al. 2018).

    Args:
        key: of the batch.
        batch: "image" (N, H, W, C) and "label" (N,) int32.
        alpha: the share of an image itself is Beta(alpha, alpha).

    Returns:
        The batch with "image" as float32 on the same scale, "label2" (N,) int32, the partner's
        label, and "share2" (N,) float32, the partner's share of image and target.
    """
    return mix(key, batch, mixup_alpha=alpha)


def cutmix(key: jax.Array, batch: Batch, alpha: float) -> Batch:
    """Puts a rectangle of its partner into every image (Yun et al. 2019).

    Args:
        key: of the batch.
        batch: "image" (N, H, W, C) and "label" (N,) int32.
        alpha: the share of an image itself is Beta(alpha, alpha), before the rectangle is cut at
            the border.

    Returns:
        The batch with "image" of the same dtype, "label2" (N,) int32, the partner's label, and
        "share2" (N,) float32, the rectangle's exact share of the image.
    """
    return mix(key, batch, cutmix_alpha=alpha)


def mix(key: jax.Array, batch: Batch, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> Batch:
    """Mixup or CutMix; where both alphas are above 0, either with probability 1/2 for a batch.

    See `mixup` and `cutmix`; images are float32 wherever mixup is possible.
    """
    key_which, key_mixup, key_cutmix = jax.random.split(key, 3)
    images = batch["image"]
    if cutmix_alpha:
        box, share = _cutmix_box(key_cutmix, images.shape[1], images.shape[2], cutmix_alpha)
        weight = box.astype(jnp.float32)
    if mixup_alpha:
        blend = 1 - jax.random.beta(key_mixup, mixup_alpha, mixup_alpha)
        images = images.astype(jnp.float32)
        if cutmix_alpha:
            which = jax.random.bernoulli(key_which)
            weight, share = jnp.where(which, weight, blend), jnp.where(which, share, blend)
        else:
            weight = share = blend
        weight = jnp.broadcast_to(weight, (1, *images.shape[1:3], 1))
        images = images * (1 - weight) + images[::-1] * weight
    elif cutmix_alpha:
        images = jnp.where(box, images[::-1], images)
    else:
        return batch
    label2 = batch["label"][::-1]
    share2 = jnp.full(label2.shape, share, jnp.float32)
    return {**batch, "image": images, "label2": label2, "share2": share2}


def _cutmix_box(key: jax.Array, h: int, w: int, alpha: float) -> tuple[jax.Array, jax.Array]:
    """(1, H, W, 1) bool, the partner's rectangle, and its share of the image.

    Its sides are √(1 − λ) of the image's, its centre is anywhere (section 3.2).
    """
    key_share, key_y, key_x = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(key_share, alpha, alpha, (1,)))
    height, width = ((side * size).astype(jnp.int32) for size in (h, w))
    top = jax.random.randint(key_y, (1,), 0, h) - height // 2
    left = jax.random.randint(key_x, (1,), 0, w) - width // 2
    box = rectangle(h, w, top, left, height, width)[..., None]
    return box, box.sum() * (1 / (h * w))
