"""The settings that compiled steps take as arguments, so that other values need no new program."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from classic_cnns.errors import ConfigError


class Numbers(NamedTuple):
    """Scalars, arrays or arguments of a compiled function."""

    learning_rate: Any  # the peak
    weight_decay: Any
    seed: Any


def numbers_from(config: Any, rate_scale: float = 1.0) -> Numbers:
    """Scalar arrays: float32, float32 and uint32; the rate is that of the config times a factor."""
    return Numbers(
        learning_rate=np.float32(peak_rate(config) * rate_scale),
        weight_decay=np.float32(config.optimizer.weight_decay),
        seed=np.uint32(config.seed % 2**32),  # as jax.random.key takes it
    )


def peak_rate(config: Any) -> float:
    """The learning rate of `config.optimizer`, for its batch size where it is given per images."""
    optimizer = config.optimizer
    if optimizer.learning_rate_per < 0:
        raise ConfigError(
            f"optimizer.learning_rate_per is {optimizer.learning_rate_per}. Fix: a number of "
            "images, or 0"
        )
    per = optimizer.learning_rate_per
    return optimizer.learning_rate * (config.batch_size / per if per else 1.0)
