"""Input pipelines of other libraries and ours, each in a process of its own, for input_pipeline.py.

    python -m benchmarks.input_peers NAME DIR SIZE

Prints "ready", then for every line on its standard input goes three times over DIR (a folder with a
sub-folder a class) and prints seconds and images. Each time starts afresh, so that nothing has been
read ahead while the others ran. All give random-resized crops, flipped, as uint8
batches of 64, with two workers; ours from the cache whole images, flipped, with one.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BATCH, WORKERS, EPOCHS = 64, 2, 3


def ours(directory: str, size: int, cache: bool = False) -> Callable[[], int]:
    """Our streaming loader, flips on the device; with `cache` from decoded images and by gather."""
    import jax
    import numpy as np

    from classic_cnns.data import cache as cache_lib
    from classic_cnns.data import folder
    from classic_cnns.data.augment import random_flip
    from classic_cnns.data.loaders import StreamLoader
    from classic_cnns.data.preprocess import Preprocess
    from classic_cnns.data.splits import Split
    from classic_cnns.sharding import create_mesh

    split = folder.photos(Path(directory))[0]["all"]
    preprocess = Preprocess((size, size, 3))
    crop: tuple[float, ...] = (0.08, 1.0)
    if cache:
        target = tempfile.mkdtemp()
        pixels, _, _ = cache_lib.open_cache(split.images, preprocess, Path(target))
        atexit.register(shutil.rmtree, target)
        split, crop = Split(pixels, split.labels), ()
    loader = StreamLoader(
        split, BATCH, seed=0, mesh=create_mesh(), preprocess=preprocess, crop_scale=crop,
        workers=0 if cache else WORKERS,
    )  # fmt: skip
    flip = jax.jit(random_flip)
    steps = EPOCHS * len(split) // BATCH

    def once() -> int:
        for step in range(steps):  # from step 0 again, which starts a new stream
            out = flip(jax.random.key(step), loader.train(step)["image"])
        np.asarray(out)
        return steps * BATCH

    return once


def torchvision(directory: str, size: int) -> Callable[[], int]:
    """ImageFolder and DataLoader with persistent workers."""
    import torch
    from torchvision import datasets, transforms

    torch.set_num_threads(1)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    data = datasets.ImageFolder(directory, transform)
    loader = torch.utils.data.DataLoader(
        data, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )
    return lambda: sum(len(images) for _ in range(EPOCHS) for images, _ in loader)


def tf_data(directory: str, size: int, whole: bool = False) -> Callable[[], int]:
    """tf.data with decode_and_crop_jpeg, as in TensorFlow's ResNet example; or with images that are
    decoded as a whole, as all other peers do.
    """
    import tensorflow as tf

    files = sorted(str(p) for p in Path(directory).glob("*/*"))
    tf.config.threading.set_inter_op_parallelism_threads(WORKERS)

    def load(name):  # type: ignore[no-untyped-def]
        data = tf.io.read_file(name)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data), tf.zeros([1, 0, 4]), min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0), max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        window = tf.concat([begin[:2], extent[:2]], 0)
        if whole:
            image = tf.slice(tf.io.decode_jpeg(data, 3), begin, extent)
        else:
            image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.random_flip_left_right(tf.image.resize(image, (size, size)))
        return tf.cast(image, tf.uint8)

    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat(EPOCHS)
    data = data.map(load, num_parallel_calls=WORKERS).batch(BATCH).prefetch(2)
    return lambda: sum(len(images) for images in data)


PEERS = {
    "ours": ours,
    "ours_cached": lambda directory, size: ours(directory, size, cache=True),
    "torchvision": torchvision,
    "tf.data": tf_data,
    "tf.data, whole": lambda directory, size: tf_data(directory, size, whole=True),
}


def main() -> None:
    """One pipeline, on demand."""
    once = PEERS[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
    once()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        count = once()
        print(time.perf_counter() - start, count, flush=True)


if __name__ == "__main__":
    main()
