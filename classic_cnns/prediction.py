"""What a network says of images."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from classic_cnns.data.cache import decode_all
from classic_cnns.data.decode import read_file
from classic_cnns.data.folder import EXTENSIONS, hidden, visible
from classic_cnns.data.splits import Encoded
from classic_cnns.errors import ConfigError, DataError
from classic_cnns.loading import LoadedRun
from classic_cnns.steps import logits_of


def predict(
    run: LoadedRun,
    images: np.ndarray | Sequence[str | Path],
    *,
    batch_size: int = 64,
    flip: bool = False,
    shift: int = 0,
) -> np.ndarray:
    """Probabilities of the classes.

    Args:
        run: see `load` and `load_weights`.
        images: paths of files, which go through the preprocessing of the run, or pixels
            (N, height, width, channels) uint8 that have gone through it.
        batch_size: images at once.
        flip, shift: see `steps.logits_of`.

    Returns:
        (N, classes) float32, in the order of `run.classes`.

    Raises:
        ConfigError: pixels of another shape or type.
        DataError: names every file that cannot be read, with the reason.
    """
    if not isinstance(images, np.ndarray):
        found = list(predict_files(run, images, batch_size, flip, shift))
        bad = [f"{visible(name)}: {why}" for name, why in found if isinstance(why, str)]
        if bad:
            more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
            raise DataError(
                f"{len(bad)} of {len(found)} images cannot be decoded: {'; '.join(bad[:10])}{more}."
                " Fix: leave them out"
            )
        return np.array([p for _, p in found], np.float32).reshape(-1, len(run.classes))
    shape = tuple(run.preprocess.image_shape)
    if images.shape[1:] != shape or images.dtype != np.uint8:
        raise ConfigError(
            f"images are {images.shape} {images.dtype}. Fix: (N, {', '.join(map(str, shape))}) "
            "uint8, or paths of files, which become that"
        )
    probabilities = _create(run, min(batch_size, len(images)), flip, shift)
    parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    empty = np.zeros((0, len(run.classes)), np.float32)
    return np.concatenate([empty, *map(probabilities, parts)])


def predict_files(
    run: LoadedRun,
    files: Sequence[str | Path],
    batch_size: int = 64,
    flip: bool = False,
    shift: int = 0,
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Like `predict`, batch after batch, so that memory does not grow with the number of files.

    Yields:
        Each path with its probabilities, or with the reason why it cannot be decoded.
    """
    names = [os.fspath(path) for path in files]
    probabilities = _create(run, min(batch_size, len(names)), flip, shift)
    for start in range(0, len(names), batch_size):
        part = names[start : start + batch_size]
        pixels, bad = decode_all(Encoded(part, read_file), run.preprocess)
        found = probabilities(pixels)
        yield from ((name, bad.get(i, found[i])) for i, name in enumerate(part))


def _create(
    run: LoadedRun, size: int, flip: bool, shift: int
) -> Callable[[np.ndarray], np.ndarray]:
    """A function of at most `size` images, compiled once."""
    how: dict[str, Any] = {"mean": run.preprocess.mean, "std": run.preprocess.std}
    logits: Any = functools.partial(logits_of, model=run.model, flip=flip, shift=shift, **how)
    compiled = jax.jit(lambda variables, images: jax.nn.softmax(logits(variables, images)))
    variables = jax.device_put(run.variables)

    def probabilities(pixels: np.ndarray) -> np.ndarray:
        padded = np.zeros((size, *pixels.shape[1:]), np.uint8)
        padded[: len(pixels)] = pixels
        return np.asarray(compiled(variables, padded))[: len(pixels)]

    return probabilities


def image_files(paths: Sequence[Path]) -> list[str]:
    """Files as they are, and of folders every image in them at any depth, by name, but for folders
    that are links.

    Raises:
        DataError: a path that is not there, or a folder without images.
    """
    found: list[str] = []
    for path in paths:
        if not path.is_dir():
            found.append(str(path))
            continue
        inside = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(EXTENSIONS)
            and not any(map(hidden, Path(folder, name).relative_to(path).parts))
        ]
        if not inside:
            raise DataError(f"{path}: no images in it ({' '.join(EXTENSIONS)}). Fix: the path")
        found += sorted(inside)
    if absent := [visible(path) for path in found if not os.path.lexists(path)]:
        raise DataError(f"no such file: {', '.join(absent[:10])}. Fix: the path")
    return found
