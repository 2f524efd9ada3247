"""Where images come from: one function a source, each returning whole splits as uint8 arrays."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from classic_cnns.data import archives, folder
from classic_cnns.data.decode import resize_images
from classic_cnns.errors import DataError

Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, C) uint8, labels (N,) int32
Splits = dict[str, Arrays]  # "train", "val", "test", or "all" when nothing is split yet

CLASSES = {
    "digits": tuple("0123456789"),
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        "t-shirt/top", "trouser", "pullover", "dress", "coat",
        "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
    "cifar10": (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
    "cifar100": (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle",
        "bicycle", "bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can",
        "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud",
        "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant",
        "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard",
        "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree",
        "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
        "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate",
        "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
        "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake",
        "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
        "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle",
        "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    ),
}  # fmt: skip

# Mean and standard deviation per channel of the training images on the scale 0…1.
STATISTICS = {
    "digits": ((0.305,), (0.323,)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "fake": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


def digits(size: int = 32) -> Splits:
    """1,797 handwritten digits of 43 people, 8×8 with 17 grey levels (UCI; shipped by scikit-
    learn).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]
    return {"all": (resize_images(images, size), data.target.astype(np.int32))}


def official(name: str, directory: Path) -> Splits:
    """CIFAR-10, CIFAR-100, MNIST or Fashion-MNIST, see `archives`."""
    files = archives.read_members(name, archives.ARCHIVES[name], directory)
    if name.startswith("cifar"):
        width = 1 if name == "cifar10" else 2
        train = archives.parse_cifar(
            [d for n, d in files.items() if not n.startswith("test")], width
        )
        test = archives.parse_cifar([d for n, d in files.items() if n.startswith("test")], width)
    else:
        train = archives.parse_idx(
            files["train-images-idx3-ubyte"], files["train-labels-idx1-ubyte"]
        )
        test = archives.parse_idx(files["t10k-images-idx3-ubyte"], files["t10k-labels-idx1-ubyte"])
    return {"train": train, "test": test}


def photos(directory: Path, size: int, channels: int = 3) -> tuple[Splits, tuple[str, ...]]:
    """A folder with a sub-folder a class, see `folder`, squashed to size×size, in memory."""
    listings = folder.scan(directory)
    count = sum(len(files) for listing in listings.values() for files in listing.values())
    needed, free = count * size * size * channels, _free_memory()
    if needed > free / 2:
        raise DataError(
            f"{directory}: {count:,} images of {size}×{size} need {needed / 2**30:.1f} GiB of "
            "memory, "
            f"{free / 2**30:.1f} are free. Fix: a smaller data.image_size"
        )
    classes = tuple(listings.get("train", listings.get("all", {})))
    return {s: folder.load(listing, size, channels) for s, listing in listings.items()}, classes


def fake(size: int = 32, num_classes: int = 10, count: int = 1000, channels: int = 3) -> Splits:
    """Noise with a brightness wave whose direction is the class: learnable, made in no time."""
    rng = np.random.Generator(np.random.Philox(0))
    labels = np.arange(count) % num_classes
    angle = np.pi * labels / num_classes
    y, x = np.mgrid[:size, :size] * (6 * np.pi / size)
    wave = np.sin(np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y)
    noise = rng.normal(0, 25, (count, size, size, channels))
    images = np.clip(127 + 50 * wave[..., None] + noise, 0, 255).astype(np.uint8)
    return {"all": (images, labels.astype(np.int32))}


def default_dir(name: str) -> Path:
    """Where downloads of a source are kept when data.dir is empty."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "classic_cnns", name)


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not Linux
        return 1 << 62
