"""Decoding: the fast path against Pillow, geometry, crops, files that are not what they seem."""

import concurrent.futures
import contextlib
import io
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from classic_cnns.data import decode
from classic_cnns.data.decode import read_file
from classic_cnns.data.preprocess import (
    DRAWS,
    Preprocess,
    crop_box,
    decode_image,
    random_resized_crop,
)
from classic_cnns.errors import ConfigError


def photo(height=120, width=160, channels=3, seed=0):
    """Something like a photo: smooth, with edges and a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, channels), np.uint8)
    image = Image.fromarray(coarse.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).astype(int).reshape(height, width, channels)
    pixels[20:60, 30:90] //= 2
    noise = rng.normal(0, 1, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8).squeeze())


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def pillow_only(monkeypatch):
    monkeypatch.setattr(decode.ImageFile, "_jpeg_header", lambda self: None)


@pytest.mark.parametrize("size", [(120, 160), (112, 112), (56, 40), (20, 25), (9, 9), (200, 300)])
@pytest.mark.parametrize("gray", [False, True])
def test_both_decoders_give_the_same_pixels(size, gray, monkeypatch):
    data = jpeg(photo(channels=1 if gray else 3))
    for channels in (3, 1):
        fast = decode_image(data, *size, channels)
        with monkeypatch.context() as context:
            pillow_only(context)
            np.testing.assert_array_equal(decode_image(data, *size, channels), fast)


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_turned_upright(turn, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = jpeg(photo(), exif=exif)
    fast = decode_image(data, 30, 40)
    pillow_only(monkeypatch)
    np.testing.assert_array_equal(decode_image(data, 30, 40), fast)


@pytest.mark.parametrize("kind", ["tiff", "damaged jpeg", "gray of a colour jpeg"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_an_image_that_is_turned_is_cropped_where_it_should_be(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    photo().save(buffer, "TIFF" if kind == "tiff" else "JPEG", exif=exif)
    data = buffer.getvalue()
    if kind == "damaged jpeg":
        data = data[:-20] + data[-2:]  # simplejpeg refuses it, Pillow does not
    channels = 1 if kind.startswith("gray") else 3
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(
        "L" if channels == 1 else "RGB"
    )
    image = decode.ImageFile(data)
    assert (image.width, image.height) == upright.size
    corner = np.asarray(upright.crop((0, 0, 100, 60))).reshape(60, 100, channels)
    pixels = image.pixels(channels, 1)
    got = decode.resize(pixels, 60, 100, box=image.inside((0, 0, 100, 60), pixels))
    assert np.abs(got.astype(int) - corner).max() <= 2
    draws = np.random.default_rng(0).random(DRAWS).tolist()
    assert random_resized_crop(data, 40, draws, channels=channels).shape == (40, 40, channels)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", [(2, 2, b"6\0\0\0"), (7, 1, b"\6\0\0\0"), (3, 1, b"\x09\0\0\0")])
def test_an_orientation_that_is_no_number_from_1_to_8_says_nothing(format, kind):
    number, count, value = kind  # ASCII, undefined, and a short that is 9
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x112, number, count) + value + bytes(4)
    plain, odd = io.BytesIO(), io.BytesIO()
    photo().save(plain, format)
    photo().save(odd, format, exif=exif)
    expected = decode_image(plain.getvalue(), 30, 40)
    np.testing.assert_array_equal(decode_image(odd.getvalue(), 30, 40), expected)


def test_squash_crop_and_letterbox():
    image = photo(100, 200)
    data = jpeg(image)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    source = Image.fromarray(pixels)
    squash = source.resize((80, 80), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(Preprocess((80, 80, 3))(data), squash)

    crop = Preprocess((80, 80, 3), mode="crop", resize=100)(data)
    np.testing.assert_array_equal(crop, pixels[10:90, 60:140])  # of the size itself: no resampling

    box = Preprocess((100, 100, 3), mode="letterbox", mean=(0.5, 0.25, 0.0))(data)
    inner = source.resize((100, 50), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(box[25:75], inner)
    assert box[0, 0].tolist() == box[-1, -1].tolist() == [128, 64, 0]
    with pytest.raises(ConfigError, match='did you mean "letterbox"'):
        Preprocess((8, 8, 3), mode="leterbox")


def test_centre_crop_is_torchvisions():
    # Resize(64) then CenterCrop(56), computed by resizing in two steps.
    image = photo(120, 160)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    ours = Preprocess((56, 56, 3), mode="crop", resize=64)(buffer.getvalue()).astype(int)
    resized = np.asarray(image.resize((85, 64), Image.Resampling.BILINEAR)).astype(int)
    apart = [abs(ours - resized[4:60, left : left + 56]).mean() for left in (11, 14, 17)]
    assert apart[1] < 5  # theirs rounds to whole pixels
    assert apart[1] < 0.5 * min(apart[0], apart[2])


def test_preprocess_survives_json():
    import dataclasses
    import json

    before = Preprocess((8, 9, 1), mode="crop", resize=11, mean=(0.5,), std=(0.25,))
    saved = json.loads(json.dumps(dataclasses.asdict(before) | {"unknown": 1}))
    assert Preprocess.from_dict(saved) == before


def test_random_crops_are_close_to_the_exact_ones():
    differences = []
    for seed in range(40):
        data = jpeg(photo(300, 400, seed=seed))
        ours = random_resized_crop(data, 64, np.random.default_rng(seed).random(DRAWS)).astype(int)
        left, top, width, height = crop_box(np.random.default_rng(seed).random(DRAWS), 300, 400)
        box = (left, top, left + width, top + height)
        full = Image.open(io.BytesIO(data))
        exact = np.asarray(full.resize((64, 64), Image.Resampling.BILINEAR, box)).astype(int)
        differences.append(abs(ours - exact).mean())
    assert np.mean(differences) < 3
    assert max(differences) < 8


def test_crop_boxes_have_torchvisions_statistics():
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(rng.random(DRAWS), 300, 400, (0.2, 0.6)) for _ in range(3000)])
    area, aspect = boxes[:, 2] * boxes[:, 3] / 120_000, boxes[:, 2] / boxes[:, 3]
    assert 0.198 < area.min() < area.max() < 0.602
    assert 0.74 < aspect.min() < aspect.max() < 1.35
    assert abs(area.mean() - 0.4) < 0.01
    assert abs(np.log(aspect).mean()) < 0.01
    assert (boxes[:, 0] + boxes[:, 2]).max() == 400
    assert (boxes[:, 1] + boxes[:, 3]).max() == 300
    assert crop_box(rng.random(DRAWS), 10, 1000, (0.9, 1.0)) == (
        493.3333333333333,
        0.0,
        13.333333333333332,
        10,
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_tiny_and_thin_images(size):
    data = jpeg(Image.new("RGB", size[::-1], (10, 200, 30)))
    for mode in ("squash", "crop", "letterbox"):
        out = Preprocess((32, 32, 3), mode=mode)(data)
        assert abs(out[14:18, 14:18].astype(int) - (10, 200, 30)).max(-1).min() <= 4
    assert random_resized_crop(data, 32, np.random.default_rng(0).random(DRAWS)).shape == (
        32,
        32,
        3,
    )


@pytest.mark.parametrize("cut", [10, 40, 1000])
def test_a_truncated_jpeg_is_refused(cut):
    data = jpeg(photo())
    with pytest.raises(ValueError, match=r"[Tt]runcated|broken"):
        decode_image(data[:-cut], 32, 32)
    with pytest.raises(ValueError, match=r"[Tt]runcated|broken"):
        random_resized_crop(data[:-cut], 32, np.random.default_rng(0).random(DRAWS))


def test_a_jpeg_without_its_last_marker_is_whole():
    data = jpeg(photo())
    np.testing.assert_array_equal(decode_image(data[:-2], 32, 32), decode_image(data, 32, 32))


def test_reasons(tmp_path, monkeypatch):
    def reason(data):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            decode_image(data, 8, 8)
        return str(error.value)

    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert reason(tmp_path / "empty.jpg") == "empty file"
    assert reason(tmp_path / "folder.jpg") == "Is a directory"
    assert reason(tmp_path / "loop.jpg") == "Too many levels of symbolic links"
    assert reason(tmp_path / "none.jpg") == "No such file or directory"
    assert reason(b"<html>404</html>") == "not an image of a supported format"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").startswith("not an image")
    assert reason(b"\xff\xd8\xff\xe0 and no more") == "Truncated File Read"
    webp = io.BytesIO()
    photo(11, 10).save(webp, "webp")
    monkeypatch.setattr(decode, "MAX_WEBP_PIXELS", 109)
    assert reason(webp.getvalue()) == "10×11 pixels, more than 109"
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    assert reason(jpeg(photo(11, 10))) == "10×11 pixels, more than 100"
    monkeypatch.setattr(decode, "MAX_BYTES", 100)
    (tmp_path / "big.jpg").write_bytes(bytes(101))
    assert reason(tmp_path / "big.jpg") == "more than 100 bytes"


def test_odd_kinds_of_jpeg_go_through_pillow():
    ink = jpeg(Image.new("CMYK", (8, 8), (0, 0, 0, 0)))
    assert (decode_image(ink, 8, 8) == 255).all()
    junk_before_the_end = bytearray(jpeg(photo()))
    junk_before_the_end[-2:-2] = b"junk"  # simplejpeg refuses it, Pillow does not
    assert decode_image(bytes(junk_before_the_end), 8, 8).shape == (8, 8, 3)


def test_a_jpeg_turned_after_a_colour_profile_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = jpeg(photo()), jpeg(photo(), exif=exif)
    segment = turned[2 : turned.index(b"\xff\xdb")]
    segment = segment[segment.index(b"\xff\xe1") :]
    profile = b"ICC_PROFILE\0\1\1" + b"\xff\xda\xff\xdb" * 10_000
    icc = b"\xff\xe2" + (len(profile) + 2).to_bytes(2) + profile
    data = plain[:2] + icc + b"\xff" + segment + plain[2:]  # with one byte of filling
    upright = decode_image(data, 40, 30)
    np.testing.assert_array_equal(upright, decode_image(turned, 40, 30))
    assert not (upright == decode_image(plain, 40, 30)).all()


def test_reading_a_file_takes_no_more_memory_than_it_has(tmp_path):
    (tmp_path / "a.jpg").write_bytes(bytes(1000))
    tracemalloc.start()
    assert read_file(tmp_path / "a.jpg") == bytes(1000)
    assert tracemalloc.get_traced_memory()[1] < 20_000
    tracemalloc.stop()


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def kinds_of_png():
    color = photo()
    clear = color.copy()
    clear.putalpha(photo(channels=1, seed=1))
    deep = np.arange(120 * 160, dtype=np.uint16).reshape(120, 160) * 3
    exif = Image.Exif()
    exif[0x0112] = 6
    yield from (png(color), png(clear), png(clear.convert("LA")), png(color.convert("1")))
    yield png(color.convert("P"), transparency=3)
    yield png(color, transparency=color.getpixel((3, 3)))
    yield png(Image.fromarray(deep))
    yield png(clear, exif=exif)


@pytest.mark.parametrize("channels", [1, 3])
def test_strips_change_no_pixel(channels, monkeypatch):
    for data in kinds_of_png():
        whole = decode.ImageFile(data).pixels(channels, 1)
        with monkeypatch.context() as context:
            context.setattr(decode, "STRIP", 1000)  # six of 160 pixels
            np.testing.assert_array_equal(decode.ImageFile(data).pixels(channels, 1), whole)


def test_alpha_is_laid_over_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 1] = pixels[1, 0] = (200, 100, 0, 255)
    pixels[1, 1] = (200, 100, 0, 51)
    out = decode.ImageFile(png(Image.fromarray(pixels))).pixels(3, 1)
    assert out.tolist() == [[[255] * 3, [200, 100, 0]], [[200, 100, 0], [244, 224, 204]]]


def test_orientation_that_a_png_tells_after_its_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    before = png(photo(), exif=exif)
    start = before.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(before[start : start + 4])
    chunk, rest = before[start:stop], before[:start] + before[stop:]
    after = rest[:-12] + chunk + rest[-12:]
    early, late = decode.ImageFile(before), decode.ImageFile(after)
    assert (early.height, early.width) == (late.height, late.width) == (160, 120)
    np.testing.assert_array_equal(early.pixels(3, 1), late.pixels(3, 1))


@pytest.mark.parametrize("limit", [120 * 160, 120 * 160 - 1])
def test_large_images_go_one_by_one(limit, monkeypatch):
    data, inside, most = png(photo()), [], []

    def pixels(*_):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return np.zeros((120, 160, 3), np.uint8)

    monkeypatch.setattr(decode, "LARGE", limit)
    monkeypatch.setattr(decode.ImageFile, "pixels", pixels)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(Preprocess((8, 8, 3)), [data] * 8))
    assert (max(most) == 1) == (limit < 120 * 160)


def test_libtiff_writes_nothing_to_the_terminal(capfd):
    buffer = io.BytesIO()
    photo().convert("1").save(buffer, "TIFF", compression="group4")
    data = bytearray(buffer.getvalue())
    data[20:60] = bytes(range(7, 47))  # "Fax4Decode: Bad code word …"
    with contextlib.suppress(ValueError):
        decode_image(bytes(data), 8, 8)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_memory_of_the_largest_images_at_once(tmp_path):
    """Six PNGs of 79 megapixels with alpha, by six threads, in less than 700 MB."""
    pixels = np.zeros((8900, 8900, 4), np.uint8)
    pixels[..., 3] = np.arange(8900) % 256
    Image.fromarray(pixels).save(tmp_path / "large.png", compress_level=1)
    script = (
        "import concurrent.futures, resource, sys;"
        "from classic_cnns.data.preprocess import Preprocess;"
        "pool = concurrent.futures.ThreadPoolExecutor(6);"
        "list(pool.map(Preprocess((224, 224, 3)), [sys.argv[1]] * 6));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "large.png")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 700
