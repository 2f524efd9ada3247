"""How long a training is and when something is due in it: epochs to steps, all numbers checked."""

from __future__ import annotations

import dataclasses
import math

from ml_collections import ConfigDict

from classic_cnns.errors import ConfigError, nearest

# What early stopping may watch; "ema_" with averages only.
WATCHED = (
    "eval_accuracy", "eval_accuracy_top5", "eval_balanced_accuracy", "eval_loss",
    "ema_eval_accuracy", "ema_eval_loss", "train_accuracy", "train_loss",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Durations:
    """All durations in steps; an epoch and those between events need not be whole."""

    epoch: float
    total: int
    warmup: int
    eval_every: float
    checkpoint_every: float


def next_event(step: int, every: float) -> int:
    """The first step after `step` that completes a whole number of periods of `every` steps."""
    n = max(1, int(step / every))
    while (event := int(n * every + 1e-6)) <= step:
        n += 1
    return event


def durations(config: ConfigDict, train_size: int) -> Durations:
    """Converts epochs to steps; an epoch is `train_size / batch_size` steps, not rounded.

    Each duration has a field in epochs and one in steps; steps count where they are not 0.

    Raises:
        ConfigError: a negative duration, or a training without a single step.
    """
    problems: list[str] = []

    def steps(section: ConfigDict, prefix: str, name: str) -> float:
        for unit in ("epochs", "steps"):
            value = section[f"{name}_{unit}"]
            if not 0 <= value < 1e12:  # a NaN neither
                what = "negative" if value < 0 else value
                problems.append(f"{prefix}{name}_{unit} is {what}. Fix: 0 or more")
        count = (
            section[f"{name}_steps"] or section[f"{name}_epochs"] * train_size / config.batch_size
        )
        return count if math.isfinite(count) else 0.0

    total = int(steps(config, "", "num") + 1e-6)
    result = Durations(
        epoch=train_size / config.batch_size,
        total=total,
        warmup=int(steps(config.schedule, "schedule.", "warmup") + 1e-6),
        eval_every=max(1.0, steps(config, "", "eval_every") or total),
        checkpoint_every=max(1.0, steps(config, "", "checkpoint_every") or total),
    )
    if result.total < 1:
        images = f"{train_size:,} images in batches of {config.batch_size:,}"
        problems.append(f"the training has no step: {images}. Fix: more epochs, a smaller batch")
    if config.log_every_steps < 1:
        problems.append("log_every_steps is below 1. Fix: 1 or more")
    if config.schedule.patience < 1:
        problems.append(f"schedule.patience is {config.schedule.patience}. Fix: 1 or more")
    if not 0 <= config.optimizer.sam_rho < math.inf:
        problems.append(f"optimizer.sam_rho is {config.optimizer.sam_rho}. Fix: 0 or more")
    if not 0 <= config.ema_decay < 1:
        problems.append(f"ema_decay is {config.ema_decay}. Fix: 0 or more, below 1")
    if config.test_time_shift < 0:
        problems.append(f"test_time_shift is {config.test_time_shift}. Fix: 0 or more")
    early = config.early_stopping
    if config.optimizer.schedule_free and (config.ema_decay or config.optimizer.lookahead_steps):
        problems.append("optimizer.schedule_free averages. Fix: no ema_decay, no lookahead_steps")
    watched = [m for m in WATCHED if keeps_averages(config) or not m.startswith("ema_")]
    if early.patience and early.metric not in watched:
        problems.append(f'early_stopping.metric "{early.metric}": {nearest(early.metric, watched)}')
    if early.mode not in ("auto", "max", "min"):
        problems.append(f'early_stopping.mode is "{early.mode}". Fix: "auto", "max" or "min"')
    if config.optimizer.schedule_free and config.schedule.name == "plateau":
        problems.append("schedule.name=plateau falls, schedule_free must not. Fix: constant")
    for field in ("patience", "min_delta"):
        if not 0 <= early[field] < math.inf:
            problems.append(f"early_stopping.{field} is {early[field]}. Fix: 0 or more")
    if config.steps_per_dispatch < 0:
        problems.append(f"steps_per_dispatch is {config.steps_per_dispatch}. Fix: 0 or more")
    if config.on_divergence not in ("stop", "rollback"):
        problems.append(f'on_divergence is "{config.on_divergence}". Fix: "stop" or "rollback"')
    if not 0 < config.rollback_factor <= 1:
        problems.append(f"rollback_factor is {config.rollback_factor}. Fix: a share up to 1")
    if config.max_rollbacks < 0:
        problems.append(f"max_rollbacks is {config.max_rollbacks}. Fix: 0 or more")
    if problems:
        raise ConfigError(f"training: {'; '.join(problems)}")
    return result


def keeps_averages(config: ConfigDict) -> bool:
    """Whether the state has `ema`: moving averages of the weights, or those of schedule_free."""
    return config.ema_decay > 0 or config.optimizer.schedule_free > 0
