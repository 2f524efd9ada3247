"""What a person is told: what is trained, on what, where and for how long; what is amiss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from classic_cnns import rules
from classic_cnns.config import peak_rate
from classic_cnns.data import Dataset
from classic_cnns.durations import Durations
from classic_cnns.models.macs import count_macs
from classic_cnns.optimizers import decay_mask
from classic_cnns.train_state import TrainState


def describe(
    config: ConfigDict,
    dataset: Dataset,
    model: nn.Module,
    state: TrainState,
    mesh: Mesh,
    spans: Durations,
    workdir: Path,
    step: int,
) -> list[str]:
    """Lines of text for people."""
    height, width, channels = dataset.image_shape
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    macs = count_macs(model, dataset.image_shape)
    stem = f", {model.stem_for(min(height, width))} stem" if hasattr(model, "stem_for") else ""
    device = mesh.devices.flat[0]
    optimizer = config.optimizer
    per = optimizer.learning_rate_per
    lines = [
        f"model      {config.model.name}{stem}: {parameters:,} parameters, {macs / 1e9:.4g} GMACs, "
        f"{np.dtype(model.dtype).name}",  # type: ignore[attr-defined]
        f"data       {dataset.source}: {height}×{width}×{channels}, {dataset.num_classes} "
        f"classes; {dataset.note}",
    ]
    for name, split in dataset.splits.items():
        counts = _per_class(dataset, split.counts(dataset.num_classes))
        lines.append(f"  {name:<8} {len(split):,} images: {counts}")
    decay = ""
    if optimizer.weight_decay:
        mask = jax.tree.leaves(decay_mask(state.params))
        decay = (
            f", weight decay {optimizer.weight_decay:g} on {sum(mask)} of {len(mask)} tensors "
            "(no bias, no norm)"
        )
    lines += [
        f"optimiser  {optimizer.name}, {config.schedule.name} schedule with peak rate "
        f"{peak_rate(config):g}"
        f"{f' ({optimizer.learning_rate:g} per {per} images)' if per else ''}"
        f" after {spans.warmup:,} warm-up steps{decay}",
        *rules.describe(optimizer.rules, state.params),
        f"training   {spans.total:,} steps of {config.batch_size} images "
        f"({spans.total * config.batch_size / len(dataset.train):.4g} epochs) on {mesh.size} × "
        f"{device.device_kind}",
        f"directory  {workdir}" + (f", continuing at step {step:,}" if step else ""),
    ]
    if spans.warmup > spans.total / 2:
        lines.append(
            f"WARNING the learning rate rises for {spans.warmup:,} of {spans.total:,} steps, which "
            "leaves little time to fall. Fix: a shorter schedule.warmup_epochs"
        )
    return lines


def _per_class(dataset: Dataset, counts: list[int]) -> str:
    if dataset.num_classes > 20:
        return f"{min(counts):,} to {max(counts):,} a class"
    if min(counts) == max(counts):
        return f"{counts[0]:,} of each class"
    return ", ".join(
        f"{name} {count:,}" for name, count in zip(dataset.classes, counts, strict=True)
    )


def advice(record: dict[str, Any], loaders: dict[str, Any]) -> list[str]:
    """What a person should know after an epoch: slow input, images that were skipped."""
    lines = []
    wait = record.get("input_wait", 0.0)
    if wait > 0.05 and not loaders["train"].data:
        lines.append(
            f"WARNING {wait:.0%} of the time went to waiting for images. Fix: in a new --workdir, "
            "--config.data.cache=default decodes each once, data.loader=resident keeps them all"
        )
    for name, loader in loaders.items():
        if loader.bad:
            some = "; ".join(f"{n!r}: {r}" for n, r in sorted(loader.bad.items())[:5])
            lines.append(f"WARNING {len(loader.bad)} images of {name} are skipped: {some}")
    return lines
