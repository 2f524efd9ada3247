"""Where images come from: one function a source, each returning splits and class names."""

from __future__ import annotations

import csv
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from classic_cnns.data import archives
from classic_cnns.data.decode import read_file, resize_images
from classic_cnns.data.folder import SPLIT_NAMES
from classic_cnns.data.splits import Encoded, Split
from classic_cnns.errors import DataError

Splits = dict[str, Split]  # "train", "val", "test", or "all" when nothing is split yet
SPLIT_KEYS = {name: split for split, names in SPLIT_NAMES.items() for name in names}

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
    return {"all": Split(resize_images(images, size), data.target.astype(np.int32))}


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
    return {"train": Split(*train), "test": Split(*test)}


def table(path: Path) -> tuple[Splits, tuple[str, ...]]:
    """A CSV file with the columns path and label, and perhaps split (train, val or test).

    Paths are relative to the file's folder; labels are names, and classes are in alphabetical
    order.

    Raises:
        DataError: missing columns, empty fields, unknown splits or absent files, all at once.
    """
    if not path.is_file():
        raise DataError(f"data.dir: {path} is not a file. Fix: --config.data.dir=FILE.csv")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: {error}. Fix: a CSV file in UTF-8") from error
    if not {"path", "label"} <= set(columns):
        raise DataError(f"{path} has the columns {columns}. Fix: path,label or path,label,split")
    problems, members = [], []
    seen: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        name, label, part = row["path"], row["label"], row.get("split") or "all"
        part = SPLIT_KEYS.get(part, part)
        if not name or not label:
            problems.append(f"line {number}: an empty field")
        elif part not in ("all", *SPLIT_KEYS):
            problems.append(f"line {number}: unknown split {part!r}")
        elif not os.path.isfile(path.parent / name):
            problems.append(f"line {number}: no file {name!r}")
        elif (part == "all" and name in seen) or seen.get(name, part) != part:
            problems.append(f"line {number}: {name!r} once more, perhaps in another split")
        seen[name] = part
        members.append((part, str(path.parent / (name or "")), label))
    classes = tuple(sorted({label for *_, label in members if label}))
    if len(classes) < 2:
        problems.append("fewer than two classes")
    if len({part == "all" for part, *_ in members}) > 1:
        problems.append("some rows name a split and some do not")
    trained = {label for part, _, label in members if part in ("all", "train")}
    problems += [f"no row of {label!r} is in train" for label in classes if label not in trained]
    if problems:
        shown = "; ".join(problems[:20])
        raise DataError(f"{path}: {len(problems)} problems: {shown}. Fix: the file")
    number_of = {name: i for i, name in enumerate(classes)}
    splits = {}
    for part in dict.fromkeys(part for part, *_ in members):
        names = [name for p, name, _ in members if p == part]
        labels = np.array([number_of[label] for p, _, label in members if p == part], np.int32)
        splits[part] = Split(Encoded(names, read_file), labels)
    return splits, classes


def arrays(path: Path) -> tuple[Splits, tuple[str, ...]]:
    """An .npz file with images and labels, or with x_train and y_train and perhaps x_val, y_val,
    x_test and y_test (Keras' names); classes are numbers, or the array "classes".

    Raises:
        DataError: missing or contradictory arrays.
    """
    try:
        with path.open("rb") as data, np.load(data, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: {error}. Fix: an .npz file without objects") from error
    pairs = {"all": ("images", "labels")}
    pairs |= {part: (f"x_{part}", f"y_{part}") for part in ("train", "val", "test")}
    splits, problems = {}, []
    for part, (x, y) in pairs.items():
        if x not in found or y not in found:
            continue
        images, labels = found[x], found[y].reshape(-1)
        if not len(labels) or (labels.dtype.kind in "iu" and not -1 < labels.max() < 2**31):
            problems.append(f"{y} is empty, or has numbers that are none of classes")
            continue
        images = images[..., None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            problems.append(
                f"{x} is {images.dtype}{images.shape}, not uint8 (N, H, W) or (N, H, W, 1 or 3)"
            )
        if not np.issubdtype(labels.dtype, np.integer) or len(labels) != len(images):
            problems.append(f"{y} is {labels.dtype}{labels.shape}, not {len(images)} integers")
        splits[part] = Split(images, labels.astype(np.int32))
    if not splits or ("all" not in splits and "train" not in splits):
        problems.append(f"it has {', '.join(found)}, not images and labels, or x_train and y_train")
    if problems:
        raise DataError(f"{path}: {'; '.join(problems)}. Fix: the file")
    count = 1 + max(int(split.labels.max()) for split in splits.values())
    names = found.get("classes", np.arange(count))
    if names.dtype.kind == "S":
        names = np.char.decode(names, "utf-8", "replace")
    if names.ndim != 1 or len(names) < 2:
        raise DataError(f"{path}: fewer than two classes. Fix: the file")
    return splits, tuple(map(str, names.tolist()))


def fake(size: int = 32, num_classes: int = 10, count: int = 1000, channels: int = 3) -> Splits:
    """Noise with a brightness wave whose direction is the class: learnable, made in no time."""
    rng = np.random.Generator(np.random.Philox(0))
    labels = np.arange(count) % num_classes
    angle = np.pi * np.arange(num_classes)[:, None, None] / num_classes
    y, x = np.mgrid[:size, :size] * (6 * np.pi / size)
    waves = 127 + 50 * np.sin(np.cos(angle) * x + np.sin(angle) * y)
    pixels = rng.normal(0, 25, (count, size, size, channels))
    pixels += waves[labels, ..., None]
    images = pixels.clip(0, 255, out=pixels).astype(np.uint8)
    return {"all": Split(images, labels.astype(np.int32))}


def default_dir(name: str) -> Path:
    """Where downloads of a source are kept when data.dir is empty."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "classic_cnns", name)


def root_of(dir: str) -> Path:
    """The folder that names of files are relative to: `dir`, or the one it is in."""
    path = Path(dir).expanduser()
    return path if path.is_dir() else path.parent
