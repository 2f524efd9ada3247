"""What the numbers of a folder of images suggest for training on it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from classic_cnns.data.folder import images
from classic_cnns.data.layout import Finding

# Width / height: upper end of each range, the lower end being the one before.
ASPECTS = {
    "below 1:3": 1 / 3,
    "1:3 to 1:2": 1 / 2,
    "1:2 to 3:4": 3 / 4,
    "3:4 to 4:3": 4 / 3,
    "4:3 to 2:1": 2.0,
    "2:1 to 3:1": 3.0,
    "above 3:1": float("inf"),
}
EXTREME = ("below 1:3", "1:3 to 1:2", "2:1 to 3:1", "above 3:1")
IMBALANCE = 5  # the largest class over the smallest
FEW = 10  # images of a class
MEGAPIXELS = 1.5  # median from which decoding takes most of the time


def aspects(ratios: np.ndarray) -> dict[str, int]:
    """Images in each range of `ASPECTS`.

    Args:
        ratios: (N,) width / height.
    """
    which = np.searchsorted(np.array(list(ASPECTS.values())), ratios)
    return dict(zip(ASPECTS, np.bincount(which, minlength=len(ASPECTS)).tolist(), strict=True))


def about_counts(counts: dict[str, dict[str, int]]) -> Iterator[Finding]:
    """Classes that cannot be split, are small, or are much smaller than others.

    Args:
        counts: images by split and class.
    """
    base = counts.get("train", counts.get("all", {}))
    present = {name: count for name, count in base.items() if count}
    # Each split that must still be drawn takes at least one image of each class.
    needed = 3 if "all" in counts else 1 + ("val" not in counts)
    few = [(name, images(count)) for name, count in present.items() if count < needed]
    if few:
        drawn = "test and val are" if "all" in counts else "val is"
        text = f"{drawn} drawn from each class, which takes {needed} images. Fix: add images."
        yield Finding("error", "classes too small to split", text, tuple(few))
    small = [(n, images(count)) for n, count in present.items() if needed <= count < FEW]
    if small:
        text = f"A network learns little from fewer than {FEW} images. Fix: add images."
        yield Finding("advice", "small classes", text, tuple(small))
    if not present:
        return
    largest, smallest = (f(present, key=present.__getitem__) for f in (max, min))
    if present[largest] >= IMBALANCE * present[smallest]:
        times = present[largest] / present[smallest]
        text = (
            f"The largest class has {times:.0f} times the images of the smallest, so rare classes "
            "may be neglected; look at the recall of each. Fix: --config.data.balance=sampler "
            "trains on all classes equally often; class_weights and logit_adjustment change the "
            "loss."
        )
        files = tuple((n, images(present[n])) for n in (largest, smallest))
        yield Finding("advice", "imbalance", text, files)


def about_shapes(histogram: dict[str, int], sizes: np.ndarray) -> Iterator[Finding]:
    """Images that are far from square, or so large that decoding them is what takes the time.

    Args:
        histogram: see `aspects`.
        sizes: (N, 2) heights and widths.
    """
    extreme, total = sum(histogram[name] for name in EXTREME), sum(histogram.values())
    if extreme > 0.05 * total:
        text = (
            f"{extreme} of {total} images are more than twice as long one way as the other; "
            "squashed to a square they look alien. Fix: --config.data.resize=letterbox keeps "
            "their shape, crop the middle of it."
        )
        yield Finding("advice", "extreme shapes", text)
    if total and np.median(sizes.astype(np.int64).prod(1)) > MEGAPIXELS * 1e6:
        text = (
            "Decoding them takes longer than training on them may. Fix: "
            "--config.data.cache=default decodes each file once and for all."
        )
        yield Finding("advice", "large images", text)
