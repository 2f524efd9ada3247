"""What a config trains, ready to be stepped, for the commands around training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from classic_cnns import config as config_lib
from classic_cnns import rules
from classic_cnns.data import Dataset
from classic_cnns.data.augment import Augment
from classic_cnns.durations import Durations, durations, keeps_averages
from classic_cnns.errors import DataError
from classic_cnns.losses import Loss
from classic_cnns.sharding import check_batch_size, create_mesh
from classic_cnns.steps import train_step
from classic_cnns.train_state import TrainState, abstract_train_state, create_train_state
from classic_cnns.weights.finetune import adopt, find_start


def bind_step(
    config: ConfigDict,
    dataset: Dataset,
    model: nn.Module,
    tx: optax.GradientTransformation,
    augment: Augment,
    loss: Loss,
    ema_decay: float = 0.0,
    seed: Any = None,
) -> functools.partial[Any]:
    """`train_step` with everything bound but the state and the batch."""
    return functools.partial(
        train_step,
        model=model,
        tx=tx,
        mean=dataset.preprocess.mean,
        std=dataset.preprocess.std,
        augment=augment,
        loss=loss,
        frozen=rules.frozen(config.optimizer.rules),
        ema_decay=ema_decay,
        accumulate_steps=config.accumulate_steps,
        sam_rho=config.optimizer.sam_rho,
        seed=config.seed if seed is None else seed,
    )


def from_images(model: nn.Module, dataset: Dataset) -> dict[Any, np.ndarray]:
    """Variables by path that follow from the training images, of the networks that have such.

    About five million pixels are looked at. Files that cannot be decoded are passed over: the
    loaders say what is to become of them.
    """
    if not hasattr(model, "from_images"):
        return {}
    images, preprocess = dataset.train.images, dataset.preprocess
    height, width, _ = dataset.image_shape
    most = max(16, 5000 * 32**2 // (height * width))
    chosen = np.arange(len(dataset.train))[:: max(1, len(dataset.train) // most)]
    if dataset.train.encoded:
        decoded = []
        for name in images[chosen].names:
            with contextlib.suppress(ValueError, OSError):
                decoded.append(preprocess(images.read(name)))
        if not decoded:
            raise DataError(
                f"none of {len(chosen)} images can be decoded. Fix: classic-cnns check-data"
            )
        images = np.stack(decoded)
    else:
        images = images[chosen]
    mean, std = (np.asarray(v, np.float32) for v in (preprocess.mean, preprocess.std))
    return model.from_images((images.astype(np.float32) / 255 - mean) / std)


@dataclasses.dataclass(frozen=True)
class Task:
    """Data, network, augmentation and loss of a config; nothing is written anywhere."""

    config: ConfigDict
    dataset: Dataset
    model: nn.Module
    augment: Augment
    loss: Loss
    spans: Durations
    mesh: Mesh
    start: Any

    @property
    def ema(self) -> bool:
        """Whether the state has averages."""
        return keeps_averages(self.config)

    def step(self, tx: optax.GradientTransformation) -> Callable[..., Any]:
        """`train_step` with everything bound but the state and the batch."""
        decay = self.config.ema_decay
        return bind_step(self.config, self.dataset, self.model, tx, self.augment, self.loss, decay)

    def state(self, tx: optax.GradientTransformation, seed: int | None = None) -> TrainState:
        """The state that a training starts from; with the config's seed by default."""
        shape = self.dataset.image_shape
        given, _ = adopt(self.start, abstract_train_state(self.model, tx, shape))
        given = given or from_images(self.model, self.dataset)
        seed = self.config.seed if seed is None else seed
        return create_train_state(
            self.model, tx, shape, seed=seed, mesh=self.mesh, given=given, ema=self.ema
        )


def task_from(config: ConfigDict) -> Task:
    """Reads the data and builds the network of a config.

    Raises:
        ConfigError, DataError: as at the start of a training.
    """
    dataset = config_lib.dataset_from(config)
    start = find_start(config.model.pretrained, config.model.name, dict(config.model.options))
    dataset = start.normalize_as_before(dataset)
    mesh = create_mesh()
    check_batch_size(config.batch_size, mesh, config.accumulate_steps)
    shape = dataset.image_shape
    return Task(
        config=config,
        dataset=dataset,
        model=config_lib.model_from(config, dataset.num_classes, shape, **start.fields),
        augment=config_lib.augment_from(config, dataset),
        loss=config_lib.loss_from(config, dataset),
        spans=durations(config, len(dataset.train)),
        mesh=mesh,
        start=start,
    )
