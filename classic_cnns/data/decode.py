"""Image files to uint8 arrays, told apart by content.

JPEG goes through simplejpeg, whose pixels are those of Pillow and which refuses truncated files;
everything else, and what it refuses, goes through Pillow. Both are libraries for one image; the
loader calls them from threads, and both let go of the interpreter while they work.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, _imaging
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 80_000_000
MAX_WEBP_PIXELS = 40_000_000  # at 16 bytes each in Pillow's reader, where others take 4 to 8
MAX_BYTES = 200_000_000
LARGE = 16_000_000  # pixels; see `ImageFile.in_turn`
LATE = re.compile(rb"eXIf|XML:com\.adobe\.xmp|Raw profile type ")  # may come after PNG's pixels
STRIP = 1 << 20  # pixels that are converted at a time

_LARGE = threading.Lock()  # of the process, since it is the memory of the process that is limited


class ImageFile:
    """An image file whose size is known and whose pixels have not been decoded yet."""

    height: int
    width: int
    image: Any  # of Pillow
    gray = False

    def __init__(self, source: bytes | str | Path) -> None:
        with _reasons():
            if not isinstance(source, bytes):
                source = read_file(source)
            self.data = source
            self.turn = 1  # EXIF orientation
            self.fast = False
            if source.startswith(b"\xff\xd8"):
                self._jpeg_header()
            if not self.fast:
                self._pillow_header()
        limit = MAX_WEBP_PIXELS if self.kind()[0] == "WEBP" else MAX_PIXELS
        if self.height * self.width > limit:
            raise ValueError(f"{self.width}×{self.height} pixels, more than {limit:,}")
        if self.turn >= 5:
            self.height, self.width = self.width, self.height

    def _jpeg_header(self) -> None:
        try:
            self.height, self.width, space, _ = simplejpeg.decode_jpeg_header(self.data)
        except ValueError:
            return
        self.gray = space == "Gray"
        self.fast = space in ("YCbCr", "Gray")
        if self.fast and _has_exif(self.data):
            with self._open() as image:
                self.turn = _orientation(image.getexif())

    def _pillow_header(self) -> None:
        image = self._open()
        self.height, self.width = image.height, image.width
        if image.format == "TIFF":  # of the pixels as they are stored: Pillow turns its own size
            self.height, self.width = image.tag_v2[IMAGELENGTH], image.tag_v2[IMAGEWIDTH]
        if image.format == "PNG" and not LATE.search(self.data, self.data.find(b"IDAT") + 4):
            exif = Image.Image.getexif(image)  # that of PNG decodes the image to look behind it
        else:
            exif = image.getexif()
        self.turn = _orientation(exif)
        self.image = image

    def _open(self) -> Any:
        # Of Pillow alone and for good: to restore the filters is not safe between threads.
        warnings.filterwarnings("ignore", module="PIL")
        _silence()
        return Image.open(io.BytesIO(self.data), formats=FORMATS)

    def divisor(self, height: float, width: float) -> int:
        """The largest of 1, 2, 4, 8 (fast in libjpeg-turbo) that leaves at least twice a size."""
        return power_of_two(min(self.height / (2 * height), self.width / (2 * width)))

    def kind(self) -> tuple[str, str, bool]:
        """Format, kind of colour ("RGB", "L", …), and whether there are more frames than the
        first; before `pixels`.
        """
        if self.fast:
            return "JPEG", "L" if self.gray else "RGB", False
        image = self.image
        return image.format or "", image.mode, bool(getattr(image, "is_animated", False))

    def inside(
        self, box: tuple[float, float, float, float], pixels: np.ndarray
    ) -> tuple[float, float, float, float]:
        """A box of the full image in pixels of the decoded one."""
        y, x = pixels.shape[0] / self.height, pixels.shape[1] / self.width
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y

    def pixels(self, channels: int, divisor: int) -> np.ndarray:
        """Upright pixels (H, W, channels) uint8, a JPEG scaled down by 1, 2, 4 or 8."""
        with _reasons():
            if self.fast and (channels == 3 or self.gray):
                sides = (self.width, self.height) if self.turn >= 5 else (self.height, self.width)
                h, w = (math.ceil(s / divisor) if divisor > 1 else 0 for s in sides)
                space = "RGB" if channels == 3 else "GRAY"
                with contextlib.suppress(ValueError):  # perhaps Pillow reads it all the same
                    out = simplejpeg.decode_jpeg(self.data, space, min_height=h, min_width=w)
                    return _upright(out, self.turn)
            if self.fast:
                self.image = self._open()
            with contextlib.closing(self.image) as image:  # frees its pixels, too
                if divisor > 1:
                    image.draft("RGB", (image.width // divisor, image.height // divisor))
                image.load()
                turn = _orientation(image.getexif())  # TIFF is upright by now
                out = _to_eight_bits(image, channels)
            return _upright(out, turn)

    @contextlib.contextmanager
    def in_turn(self, divisor: int) -> Iterator[None]:
        """Around decoding and resizing: threads go through it one by one where an image is large.

        The largest image allowed takes 0.6 GB for a moment, whatever the number of threads.
        """
        decoded = self.height * self.width // (divisor**2 if self.fast else 1)
        if decoded <= LARGE:
            yield
            return
        with _LARGE:
            try:
                yield
            finally:
                _give_back_memory()


def read_file(path: str | Path) -> bytes:
    """The bytes of a file of at most `MAX_BYTES`.

    Raises:
        ValueError: larger, empty, or no regular file.
        OSError: cannot be read.
    """
    # Opening a pipe must not wait for what comes out of it.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # What is asked for is laid out in memory first: for MAX_BYTES that takes a tenth of the
        # time of decoding.
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            kind = "Is a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ValueError(kind)
        size = min(status.st_size, MAX_BYTES) + 1
        data = os.read(file, size)
        while len(data) < size and (more := os.read(file, size - len(data))):
            data += more
    finally:
        os.close(file)
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    if not data:
        raise ValueError("empty file")
    return data


def power_of_two(ratio: float) -> int:
    """The largest of 1, 2, 4 and 8 that is no more than a ratio, or 1."""
    return 1 << max(0, min(3, int(math.log2(max(1.0, ratio)))))


def _has_exif(data: bytes) -> bool:
    """Whether one of the segments before a JPEG's pixels is EXIF data."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at : at + 2] != b"\xff\xda":
        if data[at + 4 : at + 10] == b"Exif\0\0":
            return True
        fill = data[at + 1 : at + 2] == b"\xff"
        at += 1 if fill else 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


def _orientation(exif: Image.Exif) -> int:
    """1 to 8; what is no such number says nothing, as for Pillow."""
    turn = exif.get(0x0112, 1)
    return int(turn) if turn in range(1, 9) else 1


def _give_back_memory() -> None:
    """Lets glibc return what is free to the system; it keeps some for each thread otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _silence() -> None:
    """Keeps Pillow and the libtiff that it is linked with from writing to the terminal what they
    think of a file: what matters becomes an exception, too, and that can name the file.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with contextlib.suppress(OSError, AttributeError):  # a Pillow without libtiff
        linked = ctypes.CDLL(_imaging.__file__)
        linked.TIFFSetErrorHandler(None)
        linked.TIFFSetWarningHandler(None)


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turns whatever a decoder raises for a damaged file into a ValueError with the reason."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        raise ValueError("not an image of a supported format") from error
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files; each is a reason
        raise ValueError(str(error) or type(error).__name__) from error


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Undoes an EXIF orientation."""
    if turn in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def resize(
    pixels: np.ndarray,
    height: int,
    width: int,
    interpolation: str = "bilinear",
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """A box (left, top, width, height) of (H, W, C) uint8, by default everything, resized."""
    if box is None and pixels.shape[:2] == (height, width):
        return pixels
    limits = None
    if box is not None:
        left, top = max(0.0, box[0]), max(0.0, box[1])
        right, bottom = min(left + box[2], pixels.shape[1]), min(top + box[3], pixels.shape[0])
        limits = (left, top, right, bottom)
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    kind = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    return np.asarray(image.resize((width, height), kind, limits)).reshape(height, width, -1)


def _to_eight_bits(image: Image.Image, channels: int) -> np.ndarray:
    """(H, W, channels) uint8, made in strips, which take less memory than whole copies."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    out = np.empty((image.height, image.width, channels), np.uint8)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        part = image
        if rows < image.height:
            part = image.crop((0, top, image.width, min(top + rows, image.height)))
        values = np.asarray(_strip_to_eight_bits(part, "RGB" if channels == 3 else "L"))
        out[top : top + rows] = values.reshape(*values.shape[:2], channels)
    return out


def _strip_to_eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
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
        out[i] = resize(pixels, size, size)
    return out
