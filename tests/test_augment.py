"""Augmentation: every operation against a slow reference, statistics, mixing, the training step."""

import colorsys
import functools
import inspect
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image, ImageOps
from scipy import stats

from classic_cnns.config import augment_from
from classic_cnns.data import augment, colour, create_dataset, geometry, mixing, policies
from classic_cnns.data.loaders import ResidentLoader
from classic_cnns.data.sources import fake
from classic_cnns.diagnose import explain_non_finite
from classic_cnns.errors import ConfigError
from classic_cnns.losses import create_loss, mixed
from classic_cnns.metrics import TrainMetrics
from classic_cnns.models.lowering import conv
from classic_cnns.plots import batch_labels, plot_batch
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import augmented, train_step
from classic_cnns.train_state import create_train_state

pytestmark = pytest.mark.usefixtures("quick_compile")

EVERYTHING = {
    "random_resized_crop": (0.3, 1.0),
    "crop_padding": 2,
    "flip": "alternating",
    "auto_augment": "randaugment",
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "random_erasing": 0.5,
    "erasing_mode": "pixel",
    "cutout_size": 3,
    "mixup_alpha": 0.4,
    "cutmix_alpha": 1.0,
}
MOVES = ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute(")  # between devices
WITHOUT_MIXING = EVERYTHING | {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}


@functools.cache
def jit(f, *static):
    """One program; eagerly, each operation would be compiled alone."""
    return jax.jit(f, static_argnums=static)


def noise(n=32, h=9, w=None, channels=3, low=0):
    """Random pixels, no two images alike."""
    return np.random.default_rng(5).integers(low, 256, (n, h, w or h, channels), np.uint8)


def pictures(h=20, w=24):
    """Smooth, dark, grey, two-valued, constant and noisy images."""
    y, x = np.mgrid[:h, :w]
    smooth = np.stack([x * 255 // w, y * 255 // h, (x + y) * 255 // (h + w)], -1)
    grey = np.repeat(smooth[..., :1], 3, -1)
    two = np.where(smooth > 120, 9, 8)
    rows = [smooth, smooth // 3 + 20, grey, two, np.full_like(smooth, 77), *noise(3, h, w)]
    return np.stack(rows).astype(np.uint8)


def batch_of(images, classes=10):
    n = len(images)
    return {
        "image": jnp.asarray(images),
        "label": jnp.asarray(np.arange(n, dtype=np.int32) % classes),
        "index": jnp.asarray(np.arange(n, dtype=np.int32)),
        "epoch": jnp.asarray(np.zeros(n, np.int32)),
    }


# ---- geometry


@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_crop_is_pad_and_crop_at_even_places(mode):
    x, pad = noise(1000, 5, 6, 1, low=1), 2
    out = np.asarray(jit(augment.random_crop, 2, 3)(jax.random.key(0), x, pad, mode))
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=mode)
    count = np.zeros((2 * pad + 1, 2 * pad + 1), int)
    for r, c in np.ndindex(count.shape):
        count[r, c] = (out == padded[:, r : r + 5, c : c + 6]).all((1, 2, 3)).sum()
    assert count.sum() == 1000
    assert stats.chisquare(count.ravel()).pvalue > 0.001


def test_flip_mirrors_about_half():
    x = noise(1000, 4)
    out = np.asarray(jit(augment.random_flip)(jax.random.key(0), x))
    same, mirrored = ((out == y).all((1, 2, 3)) for y in (x, x[:, :, ::-1]))
    assert (same ^ mirrored).all()
    assert 440 < int(mirrored.sum()) < 560


def test_alternating_flip_mirrors_every_other_epoch():
    x, index, flip = noise(400, 3), np.arange(400) * 7, jit(augment.alternating_flip)
    mirrored = []
    for epoch in range(4):
        order = np.random.default_rng(epoch).permutation(400)
        out = np.asarray(flip(jax.random.key(3), x[order], index[order], np.full(400, epoch)))
        mirrored.append(np.empty(400, bool))
        mirrored[-1][order] = (out == x[order][:, :, ::-1]).all((1, 2, 3))
        assert 160 < mirrored[-1].sum() < 240
    for a, b in itertools.pairwise(mirrored):
        np.testing.assert_array_equal(a, ~b)
    other = np.asarray(flip(jax.random.key(4), x, index, np.zeros(400, int)))
    differs = (other == x[:, :, ::-1]).all((1, 2, 3)) != mirrored[0]
    assert 140 < differs.sum() < 260


def test_alternating_flip_of_a_batch_that_does_not_say_what_it_holds():
    f = augment.create_augment(flip="alternating")
    batch = {"image": jnp.zeros((2, 4, 4, 1), jnp.uint8), "label": jnp.zeros(2, jnp.int32)}
    with pytest.raises(
        ConfigError, match=r'needs "index" and "epoch".*image, label\. Fix: augment'
    ):
        f(jax.random.key(0), batch)


def test_alternating_flip_does_not_depend_on_the_step():
    batch = batch_of(noise(50))
    first, later, other = (
        augmented(batch, augment.create_augment(flip="alternating", seed=seed), 0, step)["image"]
        for seed, step in ((0, 0), (0, 9), (1, 0))
    )
    np.testing.assert_array_equal(first, later)
    assert not np.array_equal(first, other)


def holes(images):
    """(top, left, height, width) of the black part of every image, which must be a rectangle."""
    for image in np.asarray(images):
        rows, cols = np.nonzero((image == 0).all(-1))
        if not len(rows):
            yield 0, 0, 0, 0
            continue
        height, width = np.ptp(rows) + 1, np.ptp(cols) + 1
        assert len(rows) == height * width
        yield rows[0], cols[0], height, width


def test_cutout_zeroes_one_square():
    found = list(holes(jit(augment.cutout, 2)(jax.random.key(0), noise(200, 9, low=1), 4)))
    sizes = {(height, width) for _, _, height, width in found}
    assert max(max(size) for size in sizes) == 4
    assert {(4, 4), (2, 4), (4, 2)} <= sizes


def test_erased_rectangles_are_distributed_as_in_the_paper():
    n, h, w = 2500, 32, 40
    out = jit(augment.random_erasing, 2)(jax.random.key(0), noise(n, h, w, low=1), 0.4)
    found = np.array(list(holes(out)))
    found = found[found[:, 2] > 0]
    assert abs(len(found) / n - 0.4) < 0.03
    top, left, height, width = found.T
    share = height * width / (h * w)
    assert 0.01 < share.min() < 0.025 < 0.3 < share.max() < 0.36
    # Tall and wide ones rarely fit, so compare with the procedure of section 3.2 itself.
    rng, expected = np.random.default_rng(1), []
    while len(expected) < 3000:
        area, ratio = (
            rng.uniform(0.02, 1 / 3) * h * w,
            np.exp(rng.uniform(np.log(0.3), -np.log(0.3))),
        )
        size = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if size[0] < h and size[1] < w:
            expected.append(size)
    expected = np.array(expected)
    assert stats.ks_2samp(share, expected.prod(1) / (h * w)).pvalue > 0.001
    assert stats.ks_2samp(height / width, expected[:, 0] / expected[:, 1]).pvalue > 0.001
    middle = (top + height / 2) / h, (left + width / 2) / w
    assert all(abs(m.mean() - 0.5) < 0.02 for m in middle)


def test_erasing_with_noise_of_every_value():
    x = np.zeros((400, 24, 24, 3), np.uint8)
    erase = jit(augment.random_erasing, 2, 3)
    out = np.asarray(erase(jax.random.key(1), x, 1.0, "pixel"))
    erased = out[(out > 0).any(-1)]
    counts = np.bincount(erased.ravel(), minlength=256)
    assert stats.chisquare(counts).pvalue > 0.001
    assert abs(np.corrcoef(erased.T.astype(float))[np.triu_indices(3, 1)]).max() < 0.02
    np.testing.assert_array_equal(erase(jax.random.key(1), x + 9, 0.0, "pixel"), 9)


def triangle_reference(image, size):
    """Anti-aliased bilinear resizing of both axes in float64."""
    for _ in range(2):
        length = image.shape[0]
        at = (np.arange(size) + 0.5) * length / size
        weights = np.arange(length) + 0.5 - at[:, None]
        weights = np.maximum(0, 1 - abs(weights) / max(1, length / size))
        image = np.tensordot(weights / weights.sum(1, keepdims=True), image, 1)
        image = image.swapaxes(0, 1)
    return image


drawn_boxes = jit(geometry._boxes, 1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("size", [7, 24, 40])
def test_resized_crop_is_the_anti_aliased_crop(size):
    images = np.concatenate([pictures(24, 24), noise(8, 24)])
    n = len(images)
    key = jax.random.key(size)
    boxes = drawn_boxes(key, n, 24, 24, (0.08, 1.0), (3 / 4, 4 / 3), 0)[:4]
    boxes = np.stack([np.asarray(b) for b in boxes], 1)
    out = np.asarray(jit(augment.random_resized_crop, 2, 3)(key, images, (0.08, 1.0), size))
    assert len(np.unique(boxes, axis=0)) == n
    for image, (top, left, height, width), got in zip(images, boxes, out, strict=True):
        part = image[top : top + height, left : left + width]
        assert abs(triangle_reference(part.astype(float), size) - got).max() <= 1.01
        pillow = np.asarray(Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR))
        difference = abs(pillow.astype(int) - got)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.12
    np.testing.assert_array_equal(out[4], 77)


def test_resized_crop_draws_area_and_ratio_evenly():
    # Small shares always fit; the large image makes rounding small.
    top, left, height, width, fits = map(
        np.asarray,
        drawn_boxes(jax.random.key(2), 3000, 400, 500, (0.1, 0.4), (3 / 4, 4 / 3), 0),
    )
    assert fits.all()
    share = height * width / (400 * 500)
    assert stats.kstest(share, "uniform", (0.1, 0.3)).pvalue > 0.001
    ratio = np.log(height / width)
    assert stats.kstest(ratio, "uniform", (np.log(3 / 4), 2 * np.log(4 / 3))).pvalue > 0.001
    assert stats.kstest(top / (400 - height), "uniform").pvalue > 0.001
    assert stats.kstest(left / (500 - width), "uniform").pvalue > 0.001
    assert (
        abs(np.corrcoef([share, ratio, top / (400 - height)])[np.triu_indices(3, 1)]).max() < 0.06
    )
    *box, fits = drawn_boxes(jax.random.key(2), 5, 20, 90, (1.0, 1.0), (3 / 4, 4 / 3), 0)
    assert not fits.any()
    assert [b.tolist() for b in box] == [[0] * 5, [0] * 5, [20] * 5, [90] * 5]


def affine_reference(image, matrix, margin=0.002):
    """Nearest pixel in float64, and where two pixels are equally near to within a margin."""
    h, w = image.shape[:2]
    y, x = np.mgrid[:h, :w]
    place = np.stack([x - (w - 1) / 2, y - (h - 1) / 2, np.ones((h, w))])
    col, row = np.tensordot(matrix, place, 1) + np.array([(w - 1) / 2, (h - 1) / 2])[:, None, None]
    unclear = (abs(col % 1 - 0.5) < margin) | (abs(row % 1 - 0.5) < margin)
    col, row = (np.floor(v + 0.5).astype(int) for v in (col, row))
    inside = (col >= 0) & (col < w) & (row >= 0) & (row < h)
    out = image[np.clip(row, 0, h - 1), np.clip(col, 0, w - 1)]
    return np.where(inside[..., None], out, 0), unclear


@pytest.mark.parametrize(("h", "w"), [(16, 16), (15, 22)])
def test_affine_maps_are_exact(h, w):
    def sheared(x, y):  # about the corner of the top left pixel
        return np.array([[1, x, x * h / 2], [y, 1, y * w / 2]])

    def turned(degrees):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        return np.array([[c, -s, 0], [s, c, 0]])

    cases = [(geometry.rotation(a), turned(a)) for a in (-135, -31, -4.5, 0, 11, 60, 180)]
    cases += [(geometry.shear(a, 0, h, w), sheared(a, 0)) for a in (-0.97, -0.09, 0.31)]
    cases += [(geometry.shear(0, a, h, w), sheared(0, a)) for a in (-0.5, 0.07, 0.99)]
    images = noise(len(cases), h, w)
    out = np.asarray(jit(geometry.affine)(images, np.stack([ours for ours, _ in cases])))
    for image, (_, matrix), got in zip(images, cases, out, strict=True):
        expected, unclear = affine_reference(image, matrix)
        np.testing.assert_array_equal(got[~unclear], expected[~unclear])
        assert unclear.mean() < 0.15
    np.testing.assert_array_equal(out[3], images[3])
    np.testing.assert_array_equal(out[6], images[6, ::-1, ::-1])


def test_the_largest_images_of_affine_maps():
    side = 2000
    image = noise(1, side)
    for x, y in ((0.99, 0), (-0.99, 0), (0, 0.99), (0, -0.99)):
        matrix = geometry.shear(x, y, side, side)
        expected, unclear = affine_reference(image[0], matrix, 0.01)
        (got,) = np.asarray(jit(geometry.affine)(image, matrix[None]))
        np.testing.assert_array_equal(got[~unclear], expected[~unclear])
        assert unclear.mean() < 0.05
    with pytest.raises(ConfigError, match="2001×16 px cannot be rotated"):
        geometry.affine(jnp.zeros((1, 2001, 16, 1), jnp.uint8), matrix[None])


def test_crops_have_something_of_the_image():
    geometry.random_crop(jax.random.key(0), noise(2, 5, 9), 4)
    with pytest.raises(ConfigError, match=r"crop_padding is 8, images have 8×9 px. Fix: .*=1"):
        geometry.random_crop(jax.random.key(0), noise(2, 8, 9), 8)


def test_directions_of_affine_maps():
    x = noise(3, 6)
    moves = [geometry.translation(2, 0), geometry.translation(0, -1), geometry.rotation(90)]
    right, up, turned = np.asarray(jit(geometry.affine)(x, np.stack(moves)))
    np.testing.assert_array_equal(right[:, 2:], x[0, :, :-2])
    assert (right[:, :2] == 0).all()
    np.testing.assert_array_equal(up[:-1], x[1, 1:])
    np.testing.assert_array_equal(turned, np.rot90(x[2]))  # counter-clockwise


# ---- colour


def assert_cut(out, exact, margin=0.001):
    """`out` is ⌊exact⌋ in 0…255, either way within `margin` of a whole number."""
    low, high = (np.floor(np.clip(exact + d, 0, 255)) for d in (-margin, margin))
    assert ((low <= out) & (out <= high)).all()


def grey_of(x):
    return np.floor(np.round(x @ np.array([0.2989, 0.587, 0.114]), 9))[..., None]


def test_grey_is_cut_where_the_decimal_weights_are():
    x = noise(64).astype(int)
    grey = (x @ np.array([2989, 5870, 1140]))[..., None] // 10_000
    found = jit(colour.saturation)(x.astype(np.uint8), 0.0)
    np.testing.assert_array_equal(found, np.broadcast_to(grey, x.shape))


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.75, 1.0, 1.27, 1.9])
def test_enhancements_against_float64(factor):
    images = pictures()
    x, f = images.astype(float), np.float32(factor).astype(float)
    assert_cut(jit(colour.brightness)(images, factor), x * f)
    middle = grey_of(x).mean((1, 2, 3), keepdims=True)
    assert_cut(jit(colour.contrast)(images, factor), middle + f * (x - middle))
    assert_cut(jit(colour.saturation)(images, factor), grey_of(x) + f * (x - grey_of(x)))
    smooth = sum(
        x[:, i : x.shape[1] - 2 + i, j : x.shape[2] - 2 + j] * (5 if i == j == 1 else 1)
        for i in range(3)
        for j in range(3)
    )
    expected = x.copy()
    inside = expected[:, 1:-1, 1:-1]
    inside += (f - 1) * (inside - np.round(smooth / 13))
    out = np.asarray(jit(colour.sharpness)(images, factor))
    assert_cut(out, expected)
    if factor == 1.0:
        for operation in (colour.brightness, colour.contrast, colour.saturation, colour.sharpness):
            np.testing.assert_array_equal(jit(operation)(images, factor), images)


@pytest.mark.parametrize("shift", [-0.5, -0.21, 0.0, 0.04, 0.37])
def test_hue_against_the_standard_library(shift):
    pixels = np.concatenate(
        [noise(1, 12)[0].reshape(-1, 3), pictures()[:3, ::5, ::5].reshape(-1, 3)]
    )
    out = np.asarray(jit(colour.hue)(pixels[None, None], shift))[0, 0]
    turned = []
    for pixel in pixels / 255:
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        turned.append(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
    assert_cut(out, np.array(turned) * 255.999, margin=0.02)
    if shift == 0:
        np.testing.assert_array_equal(out, pixels)


def test_operations_on_levels_are_those_of_pillow():
    images = pictures()
    pillow = [Image.fromarray(i) for i in images]
    for bits in range(1, 9):
        expected = np.stack([ImageOps.posterize(i, bits) for i in pillow])
        np.testing.assert_array_equal(jit(colour.posterize)(images, bits), expected)
    for threshold in (0, 57, 255):
        expected = np.stack([ImageOps.solarize(i, threshold) for i in pillow])
        np.testing.assert_array_equal(jit(colour.solarize)(images, threshold), expected)
    expected = np.stack([ImageOps.equalize(i) for i in pillow])
    np.testing.assert_array_equal(jit(colour.equalize)(images), expected)
    out = np.asarray(jit(colour.autocontrast)(images))
    low, high = (f(images.astype(int), (1, 2), keepdims=True) for f in (np.min, np.max))
    exact = (images - low) * 255 // np.maximum(high - low, 1)
    np.testing.assert_array_equal(out, np.where(high > low, exact, images))
    expected = np.stack([ImageOps.autocontrast(i) for i in pillow])
    assert abs(out.astype(int) - expected).max() <= 1  # Pillow's floats fall just below


def test_strengths_are_per_image():
    images = pictures()
    factors = np.linspace(0, 2, len(images), dtype=np.float32)
    for operation in (colour.brightness, colour.contrast, colour.saturation, colour.sharpness):
        out = np.asarray(jit(operation)(images, factors))
        for i in range(len(images)):
            np.testing.assert_array_equal(out[i], jit(operation)(images[i : i + 1], factors[i])[0])


def test_color_jitter_draws_strengths_and_order():
    images = pictures()[:2]
    brightness, contrast = jit(colour.brightness), jit(colour.contrast)
    jitter = jax.jit(functools.partial(augment.color_jitter, amounts=(0.4, 0.9, 0.0, 0.0)))
    # Brightness alone, on a level that no factor clips: the factor can be read off.
    level = np.full((2000, 1, 1, 3), 100, np.uint8)
    out = jit(augment.color_jitter, 2)(jax.random.key(0), level, (0.4, 0, 0, 0))
    out = np.asarray(out)[:, 0, 0, 0]
    assert stats.kstest(out + 0.5, "uniform", (60, 81)).pvalue > 0.001
    # Two operations that do not commute, both orders.
    seen = set()
    for seed in range(12):
        key = jax.random.key(seed)
        _, first, second, _, _ = jax.random.split(key, 5)
        a, b = (
            jax.random.randint(k, (2,), 4096 - round(d * 4096), 4096 + round(d * 4096) + 1) / 4096
            for k, d in ((first, 0.4), (second, 0.9))
        )
        got = jitter(key, images)
        orders = contrast(brightness(images, a), b), brightness(contrast(images, b), a)
        seen.add(next(i for i, o in enumerate(orders) if np.array_equal(got, o)))
    assert seen == {0, 1}


@pytest.mark.parametrize("channels", [1, 2])
def test_images_without_colour(channels):
    x = noise(16, 12, channels=channels)
    np.testing.assert_array_equal(jit(colour.saturation)(x, 0.3), x)
    np.testing.assert_array_equal(jit(colour.hue)(x, 0.3), x)
    f = jax.jit(augment.create_augment(auto_augment="randaugment", color_jitter=(0.4,) * 4))
    out = f(jax.random.key(0), batch_of(x))
    assert out["image"].shape == x.shape
    assert not np.array_equal(out["image"], x)
    if channels == 1:
        mean = x.astype(float).mean((1, 2, 3), keepdims=True)
        assert_cut(jit(colour.contrast)(x, 0.5), mean + 0.5 * (x - mean))


ALONE = [  # function, what follows the key and the images, which of that is static
    *((f, (0.4,), ()) for f in (colour.brightness, colour.contrast, colour.saturation)),
    *((f, (0.4,), ()) for f in (colour.sharpness, colour.hue)),
    *((f, (), ()) for f in (colour.autocontrast, colour.equalize)),
    (colour.posterize, (3,), ()),
    (colour.solarize, (99,), ()),
    (geometry.affine, (np.stack([geometry.rotation(11)] * 2),), ()),
    (augment.random_crop, (2, "reflect"), (2, 3)),
    (augment.random_flip, (), ()),
    (augment.alternating_flip, (np.arange(2), np.zeros(2, int)), ()),
    (augment.cutout, (3,), (2,)),
    (augment.random_erasing, (1.0, "pixel"), (2, 3)),
    (augment.random_resized_crop, ((0.3, 1.0), 9), (2, 3)),
    (augment.color_jitter, ((0.4, 0.4, 0.4, 0.1),), (2,)),
]


@pytest.mark.parametrize(("f", "arguments", "static"), ALONE, ids=[f.__name__ for f, *_ in ALONE])
def test_functions_work_outside_a_program(f, arguments, static):
    key = (jax.random.key(0),) if "key" in inspect.signature(f).parameters else ()
    arguments = (*key, noise(2, 9), *arguments)
    np.testing.assert_array_equal(f(*arguments), jit(f, *static)(*arguments))


# ---- policies

APPLY_OPERATION = policies.apply_operation


def expected_operation(name, images, level, down, kind):
    """One operation by torchvision's tables, from the plain functions."""
    h, w = images.shape[1:3]
    n, part = len(images), level / 30
    wide = kind == "trivialaugment"
    sign = -1 if down else 1
    affine = {
        "shear_x": lambda: geometry.shear(sign * part * (0.99 if wide else 0.3), 0, h, w),
        "shear_y": lambda: geometry.shear(0, sign * part * (0.99 if wide else 0.3), h, w),
        "translate_x": lambda: geometry.translation(
            sign * int(level * 32 / 30 if wide else part * 150 / 331 * w), 0
        ),
        "translate_y": lambda: geometry.translation(
            0, sign * int(level * 32 / 30 if wide else part * 150 / 331 * h)
        ),
        "rotate": lambda: geometry.rotation(sign * part * (135 if wide else 30)),
    }
    if name in affine:
        return jit(geometry.affine)(images, np.broadcast_to(affine[name](), (n, 2, 3)))
    factor = np.float32(1 + sign * part * (0.99 if wide else 0.9))
    bits = round(8 - level * (6 if wide else 4) / 30)
    return {
        "identity": lambda: images,
        "brightness": lambda: jit(colour.brightness)(images, factor),
        "color": lambda: jit(colour.saturation)(images, factor),
        "contrast": lambda: jit(colour.contrast)(images, factor),
        "sharpness": lambda: jit(colour.sharpness)(images, factor),
        "posterize": lambda: jit(colour.posterize)(images, bits),
        "solarize": lambda: jit(colour.solarize)(images, 255 - 8.5 * level),
        "autocontrast": lambda: jit(colour.autocontrast)(images),
        "equalize": lambda: jit(colour.equalize)(images),
    }[name]()


@pytest.fixture
def recorded(monkeypatch):
    """Arguments of every operation that a policy applies, instead of the operation."""
    calls = []

    def record(images, *arguments):
        calls.append(arguments)
        return images

    monkeypatch.setattr(policies, "apply_operation", record)
    return calls


@pytest.mark.parametrize("kind", ["randaugment", "trivialaugment"])
def test_each_image_gets_its_own_operation(kind, recorded):
    images = np.repeat(noise(1, 18, 21), 14, axis=0) // 2 + 30
    getattr(policies, kind)(jax.random.key(0), images)
    strongest = recorded[0][3]
    f = jax.jit(APPLY_OPERATION, static_argnums=4)
    order = np.random.default_rng(0).permutation(14)
    for level in (0, 9, 15, 22, 30) if kind == "trivialaugment" else (9, 30):
        for down in (0, 1):
            out = f(images, order, np.full(14, down), np.full(14, level), strongest)
            for i, k in enumerate(order):
                name = policies.OPERATIONS[k]
                expected = expected_operation(name, images, level, down, kind)[0]
                np.testing.assert_array_equal(out[i], expected, err_msg=f"{name} {level} {down}")


def test_operations_levels_and_directions_are_drawn_evenly(recorded):
    x = np.zeros((14_000, 1, 1, 1), np.uint8)
    policies.trivialaugment(jax.random.key(1), x)
    policies.randaugment(jax.random.key(1), x)
    (operation, down, levels, _), (first, _, nine, _), (second, _, _, _) = recorded
    table = np.histogram2d(operation, down, (14, 2))[0]
    assert stats.chisquare(table.ravel()).pvalue > 0.001
    assert stats.chisquare(np.bincount(levels, minlength=31)).pvalue > 0.001
    assert stats.chi2_contingency(np.histogram2d(operation, levels, (14, 31))[0]).pvalue > 0.001
    assert set(nine.tolist()) == {9}
    assert stats.chi2_contingency(np.histogram2d(first, second, 14)[0]).pvalue > 0.001


def test_two_operations_follow_each_other():
    x, key = jnp.asarray(pictures()), jax.random.key(3)
    strongest = policies.Strongest(0.3, 150 / 331 * 24, 150 / 331 * 20, 30.0, 0.9, 4)
    f = jax.jit(policies.apply_operation, static_argnums=4)
    expected = x
    for k in jax.random.split(key, 2):
        expected = f(expected, *policies._draw(k, len(x)), jnp.full(len(x), 9), strongest)
    np.testing.assert_array_equal(jax.jit(policies.randaugment)(key, x), expected)
    assert not np.array_equal(expected, x)


# ---- mixing


def test_mixup_blends_with_the_partner():
    batch = batch_of(noise(6))
    out = jit(augment.mixup, 2)(jax.random.key(1), batch, 0.4)
    x, share = np.asarray(batch["image"], float), np.asarray(out["share2"], float)
    assert out["image"].dtype == jnp.float32
    assert len(set(share)) == 1
    assert 0 < share[0] < 1
    expected = (1 - share[0]) * x + share[0] * x[::-1]
    np.testing.assert_allclose(out["image"], expected, atol=1e-4)
    assert out["label"].tolist() == [0, 1, 2, 3, 4, 5]
    assert out["label2"].tolist() == [5, 4, 3, 2, 1, 0]


def test_cutmix_pastes_a_rectangle_of_the_share():
    batch = batch_of(noise(4, 10, 14))
    x = np.asarray(batch["image"])
    f = jax.jit(functools.partial(augment.cutmix, batch=batch, alpha=1.0))
    sizes = set()
    for seed in range(20):
        out = f(jax.random.key(seed))
        image, share = np.asarray(out["image"]), float(out["share2"][0])
        assert image.dtype == np.uint8
        pasted = (image == x[::-1]).all((0, 3))
        rows, cols = np.nonzero(pasted)
        area = np.count_nonzero(pasted)
        assert share == pytest.approx(area / 140, rel=1e-6)
        if area:
            assert area == (np.ptp(rows) + 1) * (np.ptp(cols) + 1)
            sizes.add((np.ptp(rows) + 1, np.ptp(cols) + 1))
        np.testing.assert_array_equal(image, np.where(pasted[None, ..., None], x[::-1], x))
    assert len(sizes) > 8


def shares(n=2000, **alphas):
    batch = batch_of(np.zeros((2, 40, 40, 1), np.uint8))
    f = jax.jit(jax.vmap(lambda k: mixing.mix(k, batch, **alphas)["share2"][0]))
    return np.asarray(f(jax.random.split(jax.random.key(0), n)))


def test_shares_follow_the_beta_distribution():
    for alpha in (0.2, 1.0):
        assert stats.kstest(shares(mixup_alpha=alpha), "beta", (alpha, alpha)).pvalue > 0.001
    # CutMix: sides √share, cut at the border, against the paper's procedure.
    rng = np.random.default_rng(0)
    side = np.sqrt(rng.beta(1, 1, 4000)) * 40
    y, x = rng.integers(0, 40, (2, 4000))
    sides = [np.minimum(c + side / 2, 40) - np.maximum(c - side / 2, 0) for c in (y, x)]
    expected = sides[0] * sides[1] / 1600
    got = shares(cutmix_alpha=1.0)
    assert abs(got.mean() - expected.mean()) < 0.02
    quantiles = np.linspace(0.1, 0.9, 9)
    assert abs(np.quantile(got, quantiles) - np.quantile(expected, quantiles)).max() < 0.04


def test_either_mixing_half_of_the_time():
    batch = batch_of(np.full((2, 6, 6, 1), [[[[0]]], [[[200]]]], np.uint8))
    f = jax.jit(jax.vmap(lambda k: mixing.mix(k, batch, mixup_alpha=1.0, cutmix_alpha=1.0)))
    out = f(jax.random.split(jax.random.key(0), 400))
    image, share = np.asarray(out["image"]), np.asarray(out["share2"])
    pasted = np.isin(image, (0, 200)).all((1, 2, 3, 4))
    assert 160 < pasted.sum() < 240
    np.testing.assert_allclose(image[:, 0].mean((1, 2, 3)), 200 * share[:, 0], rtol=1e-4, atol=1e-3)


# ---- composition


@functools.cache
def without_mixing():
    return jax.jit(augment.create_augment(**WITHOUT_MIXING))


def test_augmentation_is_a_function_of_seed_and_step():
    f, batch = without_mixing(), batch_of(noise(16, 12))
    runs = [augmented(batch, f, seed, step) for seed, step in ((0, 4), (0, 4), (0, 5), (1, 4))]
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    assert not np.array_equal(runs[0]["image"], runs[2]["image"])
    assert not np.array_equal(runs[0]["image"], runs[3]["image"])
    same = augment.create_augment()(jax.random.key(1), batch)
    jax.tree.map(np.testing.assert_array_equal, same, batch)
    assert augmented(batch, None, 0, 0) is batch


def test_a_convolution_does_not_augment_again_what_it_reads_several_times():
    batch, kernel = batch_of(noise(4, 32)), jnp.ones((5, 5, 3, 6))
    crop = augment.create_augment(crop_padding=4, flip="random")

    def whole(around, batch, step):
        batch = around(functools.partial(crop, jax.random.key(0)), batch, step)
        return conv(augment.normalize(batch["image"], (0.5,) * 3, (0.25,) * 3), kernel)

    def blocks_that_gather(program):  # the fusions, and which of them lay out blocks of input
        fusions = program.as_text().split("\n\n")
        gathering = [f for f in fusions if re.search(r"u8\[\S+ gather\(", f)]
        assert gathering
        return [f for f in gathering if re.search(r"f32\[\S+ concatenate\(", f)]

    args = batch, jnp.int32(3)
    ours = jax.jit(functools.partial(whole, augment.apart)).lower(*args).compile()
    plain = jax.jit(functools.partial(whole, lambda f, b, _: f(b))).lower(*args).compile()
    assert blocks_that_gather(plain), "what this is about"
    assert not blocks_that_gather(ours)
    np.testing.assert_allclose(ours(*args), plain(*args), rtol=1e-6, atol=1e-5)


def test_images_do_not_influence_each_other():
    x = noise(16, 12)
    other = x.copy()
    other[5] = 255 - other[5]
    a, b = (
        np.asarray(without_mixing()(jax.random.key(0), batch_of(i))["image"]) for i in (x, other)
    )
    assert (a != b).any((1, 2, 3)).nonzero()[0].tolist() == [5]
    same = np.repeat(noise(1, 12), 16, axis=0)
    out = np.asarray(without_mixing()(jax.random.key(0), batch_of(same))["image"])
    assert len(np.unique(out, axis=0)) == 16


@pytest.fixture(params=["quickly", pytest.param("as for users", marks=pytest.mark.slow)])
def together(request):
    """The program of all operations, compiled in both ways: it is about bits."""
    if request.param == "quickly":
        return without_mixing()
    jax.config.update("jax_disable_most_optimizations", False)
    return jax.jit(augment.create_augment(**WITHOUT_MIXING))


def test_the_same_bits_on_eight_devices(together):
    key, batch = jax.random.key(0), batch_of(noise(16, 12))
    spread = jax.device_put(batch, NamedSharding(create_mesh(8), PartitionSpec("data")))
    compiled = together.lower(key, spread).compile()
    sharded = compiled(key, spread)
    assert sharded["image"].sharding.spec == PartitionSpec("data")
    assert not any(moves in compiled.as_text() for moves in MOVES)
    jax.tree.map(np.testing.assert_array_equal, together(key, batch), sharded)


@pytest.mark.slow
def test_the_same_bits_one_by_one(together):
    key, batch = jax.random.key(0), batch_of(noise(16, 12))
    options = {"crop_mode", "erasing_mode", "mixup_alpha", "cutmix_alpha"}
    one_by_one = batch
    for name, value in WITHOUT_MIXING.items():
        if name not in options:
            settings = {name: value} | ({"erasing_mode": "pixel"} if "erasing" in name else {})
            one_by_one = jax.jit(augment.create_augment(**settings))(key, one_by_one)
            assert not np.array_equal(one_by_one["image"], batch["image"])
    jax.tree.map(np.testing.assert_array_equal, together(key, batch), one_by_one)


@pytest.mark.parametrize("settings", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0}])
def test_mixing_on_eight_devices(settings):
    f = jax.jit(augment.create_augment(**settings))
    key, batch = jax.random.key(0), batch_of(noise(16, 12))
    spread = jax.device_put(batch, NamedSharding(create_mesh(8), PartitionSpec("data")))
    compiled = f.lower(key, spread).compile()
    one, eight = f(key, batch), compiled(key, spread)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), one, eight)
    assert any(moves in compiled.as_text() for moves in MOVES)


def test_all_wrong_fields_in_one_message():
    with pytest.raises(ConfigError) as error:
        augment.create_augment(
            crop_padding=-1,
            crop_mode="zero",
            flip=True,
            auto_augment="trivial",
            color_jitter=(0.1, 0.1, 0.1, 0.6),
            random_resized_crop=(0.5, 0.1),
            random_erasing=1.5,
            cutout_size=-2,
            mixup_alpha=float("nan"),
            cutmix_alpha=-1.0,
        )
    text = str(error.value)
    for part in (
        "augment.crop_padding is -1",
        "augment.crop_mode is 'zero'",
        "flip: use one of none, random, alternating",
        'auto_augment: did you mean "trivialaugment"?',
        "augment.color_jitter is (0.1, 0.1, 0.1, 0.6)",
        "random_resized_crop: two shares",
        "random_erasing: a probability",
        "augment.cutout_size is -2",
        "augment.mixup_alpha is nan",
        "augment.cutmix_alpha is -1.0",
    ):
        assert part in text
    assert text.count("Fix:") == 1
    with pytest.raises(ConfigError, match="color_jitter is"):
        augment.create_augment(color_jitter=(0.1,))


def test_every_preset_builds_its_augmentation():
    from configs.default import DATASETS, get_config

    data = create_dataset("fake", image_size=64)
    for dataset in DATASETS:
        batch = batch_of(noise(2, 64))
        out = jax.jit(augment_from(get_config(dataset), data))(jax.random.key(0), batch)
        assert np.array_equal(out["image"], batch["image"]) == (dataset == "fake")


def test_normalize():
    x = jnp.array([[[[0, 255]]]], jnp.uint8)
    for images in (x, x.astype(jnp.float32)):
        out = augment.normalize(images, (0.5, 0.2), (0.25, 0.4))
        np.testing.assert_allclose(out.ravel(), [-2.0, 2.0], rtol=1e-6)


# ---- in the training step


def test_mixed_loss_is_that_of_mixed_targets():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 4)).astype(np.float32)
    label, label2, share = rng.integers(0, 4, 5), rng.integers(0, 4, 5), rng.random(5)
    batch = {"label": label, "label2": label2, "share2": share.astype(np.float32)}
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = (1 - share)[:, None] * np.eye(4)[label] + share[:, None] * np.eye(4)[label2]
    for smoothing in (0.0, 0.1):
        smooth = (1 - smoothing) * target + smoothing / 4
        f = jax.jit(functools.partial(mixed, create_loss(label_smoothing=smoothing)))
        got = f(jnp.asarray(logits), batch)
        np.testing.assert_allclose(got, -(smooth * log_p).sum(1), rtol=1e-5)


def test_training_accuracy_of_mixed_images():
    out = {
        "loss": jnp.zeros(4),
        "grad_norm": jnp.zeros(()),
        "logits": jnp.asarray(np.eye(4, dtype=np.float32)),  # predictions 0, 1, 2, 3
        "labels": jnp.array([0, 0, 2, 0]),
        "labels2": jnp.array([1, 1, 2, 1]),
        "share2": jnp.array([0.25, 0.25, 0.4, 0.5]),
    }
    accuracy = jax.jit(TrainMetrics.single_from_model_output)(**out).accuracy
    np.testing.assert_allclose(accuracy.total, 0.75 + 0.25 + 1.0 + 0.0, rtol=1e-6)
    assert float(accuracy.count) == 4


def mixing_step(model, seed=2, **settings):
    tx = optax.sgd(0.1)
    return functools.partial(
        train_step,
        model=model,
        tx=tx,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        augment=augment.create_augment(**settings),
        loss=create_loss(label_smoothing=0.1),
        seed=seed,
    )


def test_training_step_sees_the_previewed_images_and_mixed_targets():
    model, batch = Network(), batch_of(noise(8, 10))
    step = mixing_step(model, auto_augment="trivialaugment", cutmix_alpha=1.0)
    state = create_train_state(
        model, step.keywords["tx"], (10, 10, 3), seed=1, mesh=create_mesh(1)
    ).replace(step=jnp.int32(7))
    new, out = jax.jit(step)(state, batch)
    seen = jax.jit(lambda b: augmented(b, step.keywords["augment"], 2, 7))(batch)
    assert 0 < float(seen["share2"][0]) < 1

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = model.apply({"params": params}, seen["image"] / 255, train=True)
        target = (1 - seen["share2"])[:, None] * jax.nn.one_hot(seen["label"], 10)
        target += seen["share2"][:, None] * jax.nn.one_hot(seen["label2"], 10)
        return optax.softmax_cross_entropy(logits, 0.9 * target + 0.01).mean()

    value, grads = loss(state.params)
    np.testing.assert_allclose(out["loss"].mean(), value, rtol=1e-5)
    for a, b, g in zip(*map(jax.tree.leaves, (new.params, state.params, grads)), strict=True):
        np.testing.assert_allclose(a, b - 0.1 * g, atol=1e-6)
    assert out["labels2"].tolist() == batch["label"][::-1].tolist()


class Fractions(nn.Module):
    """Infinite where pixels lie between two levels."""

    @nn.compact
    def __call__(self, x):
        levels = x * 255
        fraction = jnp.abs(levels - jnp.round(levels)).max((1, 2))
        return jnp.where(fraction > 1e-3, jnp.inf, x.mean((1, 2)))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(10, name="head")(Fractions(name="fractions")(x))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_explanation_of_a_bad_step_repeats_its_mixing(alpha):
    mesh = create_mesh(1)
    step = mixing_step(Network(), mixup_alpha=alpha)
    state = create_train_state(Network(), step.keywords["tx"], (32, 32, 3), seed=0, mesh=mesh)
    loader = ResidentLoader(fake(count=16)["all"], 8, seed=0, mesh=mesh)
    text = explain_non_finite(state, loader, lambda s: 0.1, step)
    assert ("the output of fractions is the first" in text) == (alpha > 0)


# ---- pictures


def test_picture_of_a_batch(tmp_path):
    images = np.zeros((40, 8, 8, 3), np.float32)
    images[..., 0] = 254.7
    path = tmp_path / "train_batch.png"
    plot_batch(images, [f"$class_{i}" for i in range(40)], path, "step 0, seed $1")
    assert [p.name for p in tmp_path.iterdir()] == ["train_batch.png"]
    with Image.open(path) as png:
        pixels = np.asarray(png.convert("RGB"))
    red = (pixels == (255, 0, 0)).all(-1)
    assert red[:, : red.shape[1] // 8].any()
    assert red.mean() > 0.4
    # A column and a row through the middle of an image cross 4 and 8 of them.
    starts = (np.diff(red.astype(int), axis=0) == 1).sum(0).max()
    assert (starts, (np.diff(red.astype(int), axis=1) == 1).sum(1).max()) == (4, 8)
    plot_batch(noise(3, 8, channels=1), ["a", "b", "c"], path, "grey")
    assert path.stat().st_size > 1000


def test_labels_of_a_batch():
    batch = {"label": np.array([1, 0]), "label2": np.array([0, 0]), "share2": np.array([0.3, 0.25])}
    assert batch_labels(batch, ("cat", "dog")) == ["0.70 dog\n0.30 cat", "0.75 cat\n0.25 cat"]
    assert batch_labels({"label": np.array([1])}, ("cat", "dog")) == ["dog"]


def test_labels_above_images_do_not_overlap(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures, plain = [], Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        plain(figure, *args, **options)

    names = [
        "a_very_long_name_of_a_class" * 3,
        "sulphur-crested cockatoo, Kakatoe galerita\x1b[31m",
    ]
    batch = {"label": np.zeros(32, int), "label2": np.ones(32, int), "share2": np.full(32, 0.3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        plot_batch(noise(32, 8), batch_labels(batch, names), tmp_path / "batch.png", "mixed")
    drawn = FigureCanvasAgg(figures[0]).get_renderer()
    boxes = [text.get_window_extent(drawn) for text in figures[0].axes[0].texts]
    assert len(boxes) == 32
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
