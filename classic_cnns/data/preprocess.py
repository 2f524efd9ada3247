"""From an image file to the pixels that a network takes: squash, crop, letterbox, random crops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from classic_cnns.data.decode import ImageFile, power_of_two, resize
from classic_cnns.errors import ConfigError, nearest

DRAWS = 40  # random numbers for a box: ten tries of four
MODES = ("squash", "crop", "letterbox")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image file becomes what the network takes; kept in run.json, so that evaluation,
    prediction and export do what the training did.

    Attributes:
        image_shape: (height, width, channels) of the result.
        mode: "squash" both sides to their size; "crop" the centre after the short side has been
            resized to `resize`; "letterbox": fit the whole image and pad with the mean colour.
        resize: see "crop"; 0 = the crop's side times 8/7 (256 for 224).
        mean, std: per channel, of pixels on the scale 0…1.
        interpolation: "bilinear" or "bicubic", both with anti-aliasing.
    """

    image_shape: tuple[int, int, int]
    mode: str = "squash"
    resize: int = 0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                f'unknown data.resize "{self.mode}". Fix: {nearest(self.mode, MODES)}'
            )

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Preprocess:
        """From `dataclasses.asdict` as it comes back from JSON; other keys are left out."""
        fields: dict[str, Any] = {
            f.name: tuple(saved[f.name]) if isinstance(saved[f.name], list) else saved[f.name]
            for f in dataclasses.fields(cls)
            if f.name in saved
        }
        return cls(**fields)

    def __str__(self) -> str:
        """One line for people."""
        mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        shape = "×".join(map(str, self.image_shape))
        return f"{shape}, {self.mode}, pixels / 255 normalised with mean ({mean}), std ({std})"

    def __call__(self, source: bytes | str | Path) -> np.ndarray:
        """Decodes one file: `image_shape` uint8, in RGB order.

        Raises:
            ValueError: not an image of a supported format, damaged or too large; the message is
                the reason.
        """
        height, width, channels = self.image_shape
        image = ImageFile(source)
        whole: tuple[float, float] = (height, width)  # of the image after resizing
        size, box = (height, width), None
        if self.mode == "crop":
            scale = (self.resize or round(min(height, width) * 8 / 7)) / min(
                image.height, image.width
            )
            whole = scale * image.height, scale * image.width
            rows, cols = height / scale, width / scale
            box = ((image.width - cols) / 2, (image.height - rows) / 2, cols, rows)
        elif self.mode == "letterbox":
            scale = min(height / image.height, width / image.width)
            size = max(1, round(scale * image.height)), max(1, round(scale * image.width))
            whole = size
        divisor = image.divisor(*whole)
        with image.in_turn(divisor):
            pixels = image.pixels(channels, divisor)
            inner = resize(pixels, *size, self.interpolation, box and image.inside(box, pixels))
        if self.mode != "letterbox":
            return inner
        out = np.empty((height, width, channels), np.uint8)
        out[:] = np.rint(255 * np.asarray(self.mean))
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        out[top : top + size[0], left : left + size[1]] = inner
        return out


def decode_image(
    source: bytes | str | Path, height: int, width: int, channels: int = 3
) -> np.ndarray:
    """One image file, upright, squashed to a size; see `Preprocess`.

    The file's content, not its name, decides the format. EXIF orientation is applied, transparency
    is laid over white, 16-bit values are scaled to 8 bits, and the first frame of an animation is
    taken. Resizing is bilinear with anti-aliasing; JPEGs of more than four times the size are first
    scaled while decoding.

    Returns:
        (height, width, channels) uint8.

    Raises:
        ValueError: not an image of a supported format, damaged or too large; the message is the
            reason.
    """
    return Preprocess((height, width, channels))(source)


def random_resized_crop(
    source: bytes | str | Path,
    size: int,
    draws: Sequence[float],
    *,
    channels: int = 3,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A random part of an image file, resized (Szegedy et al., 2015; the usual crop of training).

    A JPEG is halved while decoding as long as its part stays no smaller than the result, and the
    rest is bilinear, after means of two where more than two pixels become one. That is faster than
    `Preprocess`, and for photos of 426×320 on average 0.7 grey levels from it at 224 pixels and
    3.0 at 112.

    Args:
        source: the file or its bytes.
        size: side of the result in pixels.
        draws: `DRAWS` numbers that decide the box, see `crop_box`.
        channels: 3 or 1.
        scale, ratio: see `crop_box`.

    Returns:
        (size, size, channels) uint8.

    Raises:
        ValueError: see `decode_image`.
    """
    import cv2

    image = ImageFile(source)
    box = crop_box(draws, image.height, image.width, scale, ratio)
    divisor = power_of_two(min(box[2], box[3]) / size)
    with image.in_turn(divisor):
        pixels = image.pixels(channels, divisor)
        left, top, width, height = (round(v) for v in image.inside(box, pixels))
        part = pixels[top : top + max(1, height), left : left + max(1, width)]
        while max(part.shape[:2]) > 2 * size:  # linear to a half is the mean of two
            height, width = (side // 2 if side > 2 * size else side for side in part.shape[:2])
            part = cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR)
        part = cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)
        return part.reshape(size, size, channels)


def crop_box(
    draws: Sequence[float],
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a random part, by torchvision's rule.

    The share of the area is uniform in `scale`, the logarithm of width / height in `ratio`; after
    ten boxes that do not fit, the largest one in the centre within `ratio`.

    Args:
        draws: `DRAWS` numbers, uniform in [0, 1), such as `rng.random(DRAWS)`; four a box.
        height, width: of the image.
        scale, ratio: see above.
    """
    lowest, highest = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, DRAWS, 4):
        share, shape, x, y = draws[i : i + 4]
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = math.exp(lowest + shape * (highest - lowest))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    across, down = min(width, height * aspect), min(height, width / aspect)
    return (width - across) / 2, (height - down) / 2, across, down
