"""Image files to uint8 arrays."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 80_000_000


def decode_image(path: Path, height: int, width: int, channels: int = 3) -> np.ndarray:
    """One image file, upright, squashed to a size.

    The file's content, not its name, decides the format. EXIF orientation is applied, transparency
    is laid over white, 16-bit values are scaled to 8 bits, and the first frame of an animation is
    taken. Resizing is bilinear with anti-aliasing; large JPEGs are first scaled while decoding.

    Returns:
        (height, width, channels) uint8.

    Raises:
        ValueError: not an image of a supported format, damaged or too large; the message is the
            reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise ValueError(f"{file.width}×{file.height} pixels, more than {MAX_PIXELS:,}")
                file.draft("RGB", (2 * width, 2 * height))
                image = _to_eight_bits(ImageOps.exif_transpose(file), channels)
                image = image.resize((width, height), Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow raises many kinds for damaged files; each is a reason
        raise ValueError(str(error) or type(error).__name__) from error
    return np.asarray(image, np.uint8).reshape(height, width, channels)


def _to_eight_bits(image: Image.Image, channels: int) -> Image.Image:
    mode = "RGB" if channels == 3 else "L"
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def resize_images(images: np.ndarray, size: int) -> np.ndarray:
    """(N, H, W, C) uint8 to (N, size, size, C), bilinear with anti-aliasing."""
    if images.shape[1:3] == (size, size):
        return images
    out = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for i, pixels in enumerate(images):
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        image = image.resize((size, size), Image.Resampling.BILINEAR)
        out[i] = np.asarray(image).reshape(size, size, -1)
    return out
