"""A look into a step: what went wrong where it is not finite, what the first one sees."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classic_cnns.data.augment import Augment, Batch, normalize
from classic_cnns.data.loaders import Loader
from classic_cnns.dispatch import fetch
from classic_cnns.durations import Durations
from classic_cnns.losses import mixed
from classic_cnns.plots import batch_labels, plot_batch, plot_schedule
from classic_cnns.schedules import plateau_scale
from classic_cnns.steps import augmented, step_keys
from classic_cnns.train_state import TrainState


def explain_non_finite(
    state: TrainState,
    loader: Loader,
    schedule: optax.Schedule,
    one_step: functools.partial[Any],
) -> str:
    """Runs the step that `state` stands before once more and looks at every layer.

    Args:
        state: frozen before the bad step.
        loader: of the training split.
        schedule: learning rate by step.
        one_step: `train_step` with its settings bound.

    Returns:
        A clause with the step, the learning rate, and the first layer in the order of the forward
        pass whose output is not finite, or else whose gradient is not.
    """
    settings = one_step.keywords
    step = int(state.step)
    batch = fetch(loader.data, loader.train(step))
    batch = augmented(batch, settings["augment"], settings["seed"], step)
    images = normalize(batch["image"], settings["mean"], settings["std"])
    dropout_key = step_keys(settings["seed"], step)[1]

    def apply(params: Any, mutable: list[str]) -> tuple[jax.Array, Any]:
        return settings["model"].apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=mutable,
            capture_intermediates="intermediates" in mutable,
            rngs={"dropout": dropout_key},
        )

    def loss_fn(params: Any) -> jax.Array:
        logits, _ = apply(params, ["batch_stats"])
        return mixed(settings["loss"], logits, batch).mean()

    layers: list[str] = []

    def outputs_finite(params: Any) -> list[jax.Array]:
        outputs = _in_order(apply(params, ["batch_stats", "intermediates"])[1]["intermediates"])
        layers[:] = outputs  # a compiled function gives dictionaries back sorted by name
        return [jnp.isfinite(output).all() for output in outputs.values()]

    def grads_finite(params: Any) -> Any:
        return jax.tree.map(lambda grad: jnp.isfinite(grad).all(), jax.grad(loss_fn)(params))

    finite = jax.jit(outputs_finite)(state.params)
    rate = float(schedule(step)) * plateau_scale(state.opt_state)
    where = _first_bad(dict(zip(layers, finite, strict=True)))
    found = f"the output of {where}" if where else None
    if not found:
        grads = jax.jit(grads_finite)(state.params)
        forward = dict.fromkeys(name.split("/")[0] for name in layers)
        in_order = {name: grads[name] for name in [*forward, *grads] if name in grads}
        where = _first_bad(_in_order(in_order))
        other = "the gradient uphill (optimizer.sam_rho)" if settings.get("sam_rho") else "the loss"
        found = f"the gradient of {where}" if where else other
    return f"step {step}, learning rate {rate:g}: {found} is the first that is not finite"


def draw_first_batch(
    batch: Batch, augment: Augment | None, seed: int, classes: Sequence[str], workdir: Path
) -> None:
    """Draws what the first step sees, augmented and with labels, as train_batch.png."""
    draw = jax.jit(functools.partial(augmented, augment=augment, seed=seed, step=0))
    seen: dict[str, Any] = jax.device_get(draw(batch))
    labels = batch_labels(seen, classes)
    path = workdir / "train_batch.png"
    plot_batch(seen["image"], labels, path, "what the first step sees")


def draw_schedule(schedule: optax.Schedule, spans: Durations, path: Path, title: str) -> None:
    """Draws the learning rate over the training, as a PNG."""
    steps = np.linspace(0, spans.total - 1, min(spans.total, 1000)).astype(np.int32)
    rates = np.asarray(jax.jit(jax.vmap(schedule))(steps))
    plot_schedule(rates, steps / spans.epoch, path, title)


def _in_order(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves by path in insertion order, parts of a layer before it."""
    if isinstance(tree, (tuple, list)):  # of each call of a layer
        tree = dict(enumerate(tree))
    if not hasattr(tree, "items"):
        return {path or "the network": tree}
    leaves: dict[str, Any] = {}
    for key, value in sorted(tree.items(), key=lambda item: item[0] == "__call__"):
        inner = path if key in ("__call__", 0) else f"{path}/{key}" if path else str(key)
        leaves |= _in_order(value, inner)
    return leaves


def _first_bad(finite: dict[str, Any]) -> str | None:
    """The first of the names whose value is false."""
    return next((name for name, good in finite.items() if not good), None)
