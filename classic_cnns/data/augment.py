"""Augmentation and normalisation on the device: batched array code inside the jitted step.

Each augmentation is a plain function of a key and a batch of uint8 images (N, H, W, C), in
`geometry`, `colour` and `policies`, or of a key and a whole batch, in `mixing`. `create_augment`
composes them. The key is a function of (seed, step), so a resumed run sees the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from classic_cnns.data import colour, geometry, mixing, policies
from classic_cnns.data.colour import color_jitter
from classic_cnns.data.geometry import (
    alternating_flip,
    cutout,
    random_crop,
    random_erasing,
    random_flip,
    random_resized_crop,
)
from classic_cnns.data.mixing import Batch, cutmix, mixup
from classic_cnns.data.policies import randaugment, trivialaugment
from classic_cnns.errors import ConfigError, nearest

__all__ = [
    "Augment",
    "Batch",
    "alternating_flip",
    "color_jitter",
    "create_augment",
    "cutmix",
    "cutout",
    "mixup",
    "normalize",
    "randaugment",
    "random_crop",
    "random_erasing",
    "random_flip",
    "random_resized_crop",
    "trivialaugment",
]

Augment = Callable[[jax.Array, Batch], Batch]

_CHOICES = {
    "crop_mode": ("reflect", "constant"),
    "flip": ("none", "random", "alternating"),
    "auto_augment": ("none", "randaugment", "trivialaugment"),
    "erasing_mode": ("const", "pixel"),
}


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: Any = jnp.float32
) -> jax.Array:
    """(pixels / 255 − mean) / std per channel; uint8 or floats (N, H, W, C) in, `dtype` out."""
    scale = 1 / (255 * np.asarray(std, np.float32))
    offset = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    shape = (1,) * (images.ndim - 1) + (-1,)
    out = images.astype(jnp.float32) * scale.reshape(shape) - offset.reshape(shape)
    return out.astype(dtype)


def apart(f: Callable[[Batch], Batch], batch: Batch, step: jax.Array | int) -> Batch:
    """`f(batch)`, computed once on CPU.

    XLA:CPU computes elementwise code and gathers again for every operation that reads them, and a
    convolution in blocks reads each pixel several times. It does not reach over the border of a
    loop that has more than one turn for all it knows.

    Args:
        f: from batches to batches; on CPU without reverse-mode derivatives by what it reads.
        batch: arrays.
        step: at least 0 and, for the border, not known when this is compiled.
    """
    if jax.default_backend() != "cpu":
        return f(batch)
    f = jax.jit(f)  # traced once
    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(f, batch))
    return jax.lax.fori_loop(0, jnp.minimum(step, 0) + 1, lambda i, _: f(batch), empty)


def create_augment(
    *,
    random_resized_crop: Sequence[float] = (),
    size: int = 0,
    crop_padding: int = 0,
    crop_mode: Literal["reflect", "constant"] = "reflect",
    flip: Literal["none", "random", "alternating"] = "none",
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none",
    color_jitter: Sequence[float] = (),
    random_erasing: float = 0.0,
    erasing_mode: Literal["const", "pixel"] = "const",
    cutout_size: int = 0,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    seed: int = 0,
) -> Augment:
    """The augmentations that are asked for, in the order of the arguments, as one function.

    It takes a key and a batch: "image" (N, H, W, C) uint8, "label" (N,) int32 where images are
    mixed, "index" and "epoch" (N,) int32 where flips alternate. It returns the batch with other
    images; mixing adds "label2" and "share2", see `mixup`.

    Args:
        random_resized_crop: smallest and largest share of the area; () leaves it out.
        size: side of its result in pixels; 0 = that of the images.
        crop_padding: in pixels, of `random_crop`; 0 leaves it out.
        crop_mode: of `random_crop`.
        flip: `random_flip`, `alternating_flip` or neither.
        auto_augment: `randaugment` with two operations of magnitude 9, `trivialaugment` or neither.
        color_jitter: brightness, contrast, saturation, hue; () leaves it out.
        random_erasing: probability; 0 leaves it out.
        erasing_mode: of `random_erasing`.
        cutout_size: in pixels; 0 leaves it out.
        mixup_alpha, cutmix_alpha: 0 leaves it out; with both, one of them by the toss of a coin
            for each batch.
        seed: of the alternating flip, which must not depend on the step.

    Raises:
        ConfigError: values out of range, all in one message. Later, from the function itself:
            flips alternate and the batch does not say which images it holds.
    """
    _check(locals())

    def augment(key: jax.Array, batch: Batch) -> Batch:
        keys = jax.random.split(key, 8)
        images = batch["image"]
        if random_resized_crop:
            low, high = random_resized_crop
            images = geometry.random_resized_crop(keys[0], images, (low, high), size)
        if crop_padding:
            images = geometry.random_crop(keys[1], images, crop_padding, crop_mode)
        if flip == "random":
            images = geometry.random_flip(keys[2], images)
        elif flip == "alternating":
            index, epoch = _seen(batch)
            images = geometry.alternating_flip(jax.random.key(seed), images, index, epoch)
        if auto_augment == "randaugment":
            images = policies.randaugment(keys[3], images)
        elif auto_augment == "trivialaugment":
            images = policies.trivialaugment(keys[3], images)
        if color_jitter:
            images = colour.color_jitter(keys[4], images, color_jitter)
        if random_erasing:
            images = geometry.random_erasing(keys[5], images, random_erasing, erasing_mode)
        if cutout_size:
            images = geometry.cutout(keys[6], images, cutout_size)
        return mixing.mix(keys[7], {**batch, "image": images}, mixup_alpha, cutmix_alpha)

    return augment


def _seen(batch: Batch) -> tuple[jax.Array, jax.Array]:
    if "index" not in batch or "epoch" not in batch:
        raise ConfigError(
            'augment.flip="alternating" needs "index" and "epoch" in the batch, which has only '
            f'{", ".join(sorted(batch))}. Fix: augment.flip="random", or batches that say which '
            "example each image is and how often it was seen"
        )
    return batch["index"], batch["epoch"]


def _check(fields: dict[str, Any]) -> None:
    """Raises ConfigError with everything that is wrong with the arguments of create_augment."""
    wrong: dict[str, str] = {}
    for name, choices in _CHOICES.items():
        if fields[name] not in choices:
            wrong[name] = nearest(str(fields[name]), choices)
    for name in ("crop_padding", "cutout_size", "mixup_alpha", "cutmix_alpha"):
        if not fields[name] >= 0:
            wrong[name] = "use 0 or more"
    if not 0 <= fields["random_erasing"] <= 1:
        wrong["random_erasing"] = "a probability from 0 to 1"
    scale = fields["random_resized_crop"]
    if scale and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        wrong["random_resized_crop"] = "two shares, 0 < smallest ≤ largest ≤ 1, or ()"
    jitter = fields["color_jitter"]
    limits = (5, 5, 5, 0.5)
    if jitter and not (
        len(jitter) == 4 and all(0 <= x <= top for x, top in zip(jitter, limits, strict=True))
    ):
        wrong["color_jitter"] = (
            "(brightness, contrast, saturation, hue), from 0 to 5, hue to 0.5, or ()"
        )
    if wrong:
        found = ", ".join(f"augment.{name} is {fields[name]!r}" for name in wrong)
        fix = "; ".join(f"{name}: {text}" for name, text in wrong.items())
        raise ConfigError(f"{found}. Fix: {fix}")
