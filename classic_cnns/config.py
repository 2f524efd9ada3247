"""The factories that take a ConfigDict apart."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from classic_cnns import precision
from classic_cnns.averaging import lookahead, schedule_free
from classic_cnns.data import Dataset, create_dataset
from classic_cnns.data.augment import Augment, create_augment
from classic_cnns.data.loaders import Loader, create_loader
from classic_cnns.durations import Durations, durations
from classic_cnns.errors import ConfigError, nearest
from classic_cnns.losses import Loss, class_weights, create_loss, logit_adjustment
from classic_cnns.models import create_model
from classic_cnns.numbers import Numbers, peak_rate
from classic_cnns.optimizers import create_optimizer
from classic_cnns.schedules import create_schedule, scale_by_plateau

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

BALANCES = ("none", "sampler", "class_weights", "logit_adjustment")

# Fields that may change between two starts of the same run: none of them changes what is computed.
FREE = (
    "data.dir",
    "data.cache",
    "data.workers",
    "data.max_bad_fraction",
    "log_every_steps",
    "eval_every_epochs",
    "eval_every_steps",
    "checkpoint_every_epochs",
    "checkpoint_every_steps",
    "steps_per_dispatch",
    "watch_gradient",
    "weights_txt",
    "on_divergence",
    "rollback_factor",
    "max_rollbacks",
)


def dataset_from(config: ConfigDict, **overrides: Any) -> Dataset:
    """The dataset of `config.data`, see `create_dataset` for what else it takes."""
    settings = config.data.to_dict()
    balance = settings.pop("balance")
    if balance not in BALANCES:
        raise ConfigError(f'unknown data.balance "{balance}". Fix: {nearest(balance, BALANCES)}')
    splits = {name: settings.pop(f"{name}_split", "") for name in ("train", "val", "test")}
    splits = {name: theirs for name, theirs in splits.items() if theirs}
    if "augment" in config and config.augment.random_resized_crop:
        settings["train_margin"] = 8 / 7  # more of the image than is cropped to, as for evaluation
    return create_dataset(seed=config.seed, splits=splits, **(settings | overrides))


def loader_settings(config: ConfigDict, dataset: Dataset, split: str) -> dict[str, Any]:
    """Arguments of `create_loader` for one split, beyond the split, the batch size and the mesh."""
    settings = {k: config.data[k] for k in ("workers", "on_bad_image", "max_bad_fraction")}
    balanced = split == "train" and config.data.balance == "sampler"
    return settings | {
        "total": sum(map(len, dataset.splits.values())),
        "seed": config.seed,
        "preprocess": dataset.preprocess,
        "crop_scale": config.augment.random_resized_crop if split == "train" else (),
        "balanced": balanced,
    }


def loaders_from(config: ConfigDict, dataset: Dataset, mesh: Mesh) -> dict[str, Loader]:
    """A loader for each split."""
    return {
        name: create_loader(
            split, config.batch_size, mesh=mesh, **loader_settings(config, dataset, name)
        )
        for name, split in dataset.splits.items()
    }


def augment_from(config: ConfigDict, dataset: Dataset, seed: Any = None) -> Augment:
    """The augmentation of `config.augment`, but for crops that the host makes while it decodes.

    The seed is that of the config if none is given.
    """
    fields = config.augment.to_dict()
    if dataset.train.encoded:
        create_augment(**fields)  # checks them all
        fields["random_resized_crop"] = ()
    seed = config.seed if seed is None else seed
    return create_augment(seed=seed, size=dataset.image_shape[0], **fields)


def model_from(
    config: ConfigDict, num_classes: int, image_shape: tuple[int, int, int], **decided: Any
) -> nn.Module:
    """The network of `config.model`, which must fit the images.

    `decided` are fields that its weights decide; those of the config come first.

    Raises:
        ConfigError: unknown name or option, or images below the network's minimum.
    """
    if config.model.dtype not in ("auto", *DTYPES):
        raise ConfigError(
            f'unknown model.dtype "{config.model.dtype}". Fix: '
            f"{nearest(config.model.dtype, ('auto', *DTYPES))}"
        )
    name = config.model.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    bn = config.model.get("bn", "train")  # converted weights do not say
    if bn not in ("train", "frozen"):
        raise ConfigError(f'model.bn is "{bn}". Fix: "train" or "frozen"')
    options = {**decided, **config.model.options}
    model = create_model(config.model.name, num_classes=num_classes, dtype=DTYPES[name], **options)
    if bn == "frozen":
        if not hasattr(model, "freeze_bn"):
            raise ConfigError(f"{config.model.name} has no BatchNorm. Fix: model.bn=train")
        model = model.clone(freeze_bn=True)
    smallest, side = model.min_size(), min(image_shape[:2])  # type: ignore[attr-defined]
    if side < smallest:
        small_stem = (
            ", or --config.model.options.stem=cifar"
            if getattr(model, "stem", "") == "imagenet"
            else ""
        )
        raise ConfigError(
            f"images of {side} px are too small for {config.model.name}, which takes {smallest} "
            "px or more. "
            f"Fix: --config.data.image_size={smallest}{small_stem}"
        )
    return model


def optimizer_from(
    config: ConfigDict,
    spans: Durations,
    rate_scale: float = 1.0,
    schedule: optax.Schedule | None = None,
    numbers: Numbers | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser and the schedule that it follows, which is jitted: outside a step it would be a
    program for each of its operations.

    Args:
        config, spans: of the training.
        rate_scale: factor of the learning rate.
        schedule: in place of that of the config.
        numbers: within a compiled step, its argument; they replace the config's and `rate_scale`.
    """
    settings: dict[str, Any] = config.schedule.to_dict()
    for key in ("warmup_epochs", "warmup_steps", "patience"):
        del settings[key]
    rate = numbers.learning_rate if numbers else peak_rate(config) * rate_scale
    schedule = schedule or create_schedule(
        learning_rate=rate, total_steps=spans.total, warmup_steps=spans.warmup, **settings
    )
    ahead = {k: config.optimizer[f"lookahead_{k}"] for k in ("steps", "rate", "final_rate")}
    own = ["name", "learning_rate", "learning_rate_per", "sam_rho", "schedule_free", "options"]
    own += [f"lookahead_{k}" for k in ahead]
    options = {k: v for k, v in config.optimizer.items() if k not in own}
    if numbers and config.optimizer.weight_decay:  # none at all is another program
        options["weight_decay"] = numbers.weight_decay
    name, options = config.optimizer.name, {**options, **config.optimizer.options}
    if config.optimizer.schedule_free:
        tx = schedule_free(name, schedule, config.optimizer.schedule_free, **options)
    else:
        tx = create_optimizer(name, schedule, **options)
    if config.schedule.name == "plateau":
        tx = optax.chain(tx, scale_by_plateau())
    if ahead["steps"]:  # around all that scales updates
        tx = lookahead(tx, **ahead, total_steps=spans.total)
    if config.model.dtype == "float16":
        tx = precision.dynamic_loss_scale(tx)
    return tx, jax.jit(schedule)


def loss_from(config: ConfigDict, dataset: Dataset) -> Loss:
    """The training loss, which sees to rare classes where `config.data.balance` says so."""
    counts = dataset.train.counts(dataset.num_classes)
    balance = config.data.balance
    return create_loss(
        config.loss,
        label_smoothing=config.label_smoothing,
        class_weights=class_weights(counts) if balance == "class_weights" else None,
        logit_adjustment=logit_adjustment(counts) if balance == "logit_adjustment" else None,
    )


def check(config: ConfigDict, dataset: Dataset) -> None:
    """Raises ConfigError for what the start of a training with these data would refuse."""
    spans = durations(config, len(dataset.train))
    optimizer_from(config, spans)
    augment_from(config, dataset)
    loss_from(config, dataset)
    if not config.model.pretrained:  # which may decide fields of the network
        model_from(config, dataset.num_classes, dataset.image_shape)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"optimizer.name": "sgd", …} of a nested mapping, tuples as lists as in JSON."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = _lists(value)
    return out


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
