"""One training step and one evaluation step, as pure functions of arrays.

step = jax.jit(functools.partial(train_step, model=model, tx=tx, mean=mean, std=std))
state, out = step(state, {"image": uint8_images, "label": int_labels})
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from classic_cnns import precision
from classic_cnns.averaging import schedule_free_average
from classic_cnns.data.augment import Augment, Batch, apart, normalize
from classic_cnns.losses import Loss, cross_entropy, mixed
from classic_cnns.metrics import EvalMetrics
from classic_cnns.models.lowering import slow_in_loops
from classic_cnns.train_state import TrainState


def step_keys(seed: int, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The keys of augmentation and dropout of a step; nothing else in it is random."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return augment_key, dropout_key


def augmented(batch: Batch, augment: Augment | None, seed: int, step: jax.Array | int) -> Batch:
    """The batch that step number `step` trains on, before normalisation."""
    return batch if augment is None else augment(step_keys(seed, step)[0], batch)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    mean: Sequence[float],
    std: Sequence[float],
    augment: Augment | None = None,
    loss: Loss = cross_entropy,
    aux_weight: float = 0.3,
    frozen: Callable[[Any], Any] | None = None,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    sam_rho: float = 0.0,
    seed: int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Augment, normalise, forward, backward, update; random by (seed, state.step) alone.

    Args:
        state: current state.
        batch: "image" (N, H, W, C) uint8 and "label" (N,) int32; "index" and "epoch" (N,) int32
            where the augmentation needs them.
        model: linen module taking (images, train=True).
        tx: optimiser.
        mean, std: per channel, for pixels on the scale 0…1.
        augment: function of (key, batch), see `data.augment.create_augment`.
        loss: of (logits, labels), one value for each image; see `losses.create_loss`.
        aux_weight: of the losses of auxiliary classifiers, which a network puts into the collection
            "aux_logits" (GoogLeNet, section 5); the loss that is returned is without them.
        frozen: of params, gives True for those without a gradient; see `rules.frozen`.
        ema_decay: share of the averages `state.ema` that is kept at a step, at first at most
            (1 + step) / (10 + step); 0 where the state has none, or where they are those of
            `averaging.schedule_free`, with the statistics of the step.
        accumulate_steps: parts that the batch is computed in, one after the other, to save memory.
            The update is that of the whole batch, but BatchNorm sees each part alone, and moves its
            statistics with each; dropout draws other masks.
        sam_rho: 0, or how far uphill the gradient is taken (sharpness-aware minimisation, Foret et
            al. 2021). That needs a second pass; loss and statistics are those of the first.
        seed: of augmentation and dropout.

    Returns:
        The next state and {"loss" (N,), "logits" (N, classes), "labels", "grad_norm", "finite"},
        with "labels2" and "share2" (N,) where images are mixed, and "skipped" where the optimiser
        has a loss scale: such a step has changed the scale and its own number alone.
    """
    batch = apart(lambda b: augmented(b, augment, seed, state.step), batch, state.step)
    images = normalize(batch["image"], mean, std)
    dropout_key = step_keys(seed, state.step)[1]

    def loss_fn(params: Any, batch_stats: Any, images: jax.Array, batch: Batch, key: Any) -> Any:
        if frozen is not None:  # so that nothing is computed for them
            still = jax.tree.map(jax.lax.stop_gradient, params)
            params = jax.tree.map(lambda f, a, b: a if f else b, frozen(params), still, params)
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats", "aux_logits"],
            rngs={"dropout": key},
        )
        losses = mixed(loss, logits, batch)
        total = losses.mean()
        for aux in jax.tree.leaves(updated.get("aux_logits", {})):
            total += aux_weight * mixed(loss, aux, batch).mean()
        return total, (losses, logits, updated.get("batch_stats", {}))

    scale = precision.loss_scale(state.opt_state)
    gradient = precision.value_and_grad(loss_fn, scale)
    if accumulate_steps > 1:
        unroll = slow_in_loops(getattr(model, "impl", "lax"))
        gradient = functools.partial(_accumulated, gradient, accumulate_steps, unroll)
    targets = {name: value for name, value in batch.items() if name != "image"}
    rest = state.batch_stats, images, targets, dropout_key
    (total, (losses, logits, batch_stats)), grads = gradient(state.params, *rest)
    if sam_rho:
        radius = sam_rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
        uphill = jax.tree.map(lambda p, g: p + radius * g, state.params, grads)
        grads = gradient(uphill, *rest)[1]
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    if ema_decay:
        keep = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda old, now: keep * old + (1 - keep) * now, state.ema, new.variables)
        new = dataclasses.replace(new, ema=ema)
    elif state.ema and (average := schedule_free_average(opt_state, new.params)):
        new = dataclasses.replace(new, ema={"params": average, "batch_stats": batch_stats})
    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
    out = {"loss": losses, "logits": logits, "labels": batch["label"], "grad_norm": grad_norm}
    if scale is not None:  # at scale 1 there is nothing left to try
        out["skipped"] = skipped = ~finite & (scale > 1)
        old = dataclasses.replace(state, step=new.step, opt_state=new.opt_state)
        new = jax.tree.map(lambda a, b: jnp.where(skipped, a, b), old, new)
        finite |= skipped
    if "label2" in batch:
        out |= {"labels2": batch["label2"], "share2": batch["share2"]}
    return new, {**out, "finite": finite}


def _accumulated(gradient: Any, parts: int, unroll: bool, params: Any, *rest: Any) -> Any:
    """What `gradient` gives for a whole batch, in a loop over parts, which reuses its memory."""
    batch_stats, images, targets, key = rest

    def one(carry: Any, part: Any) -> Any:
        (total, grads, batch_stats), (i, *part) = carry, part
        key_i = jax.random.fold_in(key, i)
        (value, (losses, logits, batch_stats)), more = gradient(params, batch_stats, *part, key_i)
        return (total + value, jax.tree.map(jnp.add, grads, more), batch_stats), (losses, logits)

    # Rows i, i + parts, …: as many from each device.
    rows = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]), (images, targets))
    each = jnp.arange(parts), *jax.tree.map(lambda a: a.swapaxes(0, 1), rows)
    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), batch_stats
    (total, grads, batch_stats), outputs = jax.lax.scan(one, start, each, unroll=unroll)
    losses, logits = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), outputs)
    return (total / parts, (losses, logits, batch_stats)), jax.tree.map(lambda g: g / parts, grads)


def logits_of(
    variables: Any,
    images: jax.Array,
    *,
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    flip: bool = False,
    shift: int = 0,
) -> jax.Array:
    """Logits (N, classes) of images (N, H, W, C) uint8, dropout and BatchNorm as in evaluation.

    With `flip`, they are the mean of those of each image and of its mirror image. With `shift`,
    half of that, and a quarter each of the image shifted by so many pixels to the upper left and
    to the lower right, with its reflection at the edges (Jordan 2024, arXiv:2404.00498).
    """
    images = normalize(images, mean, std)
    views, weights = [images], [1.0]
    if shift:
        edges = ((0, 0), (shift, shift), (shift, shift), (0, 0))
        padded = jnp.pad(images, edges, mode="reflect")
        views += [padded[:, 2 * shift :, 2 * shift :], padded[:, : -2 * shift, : -2 * shift]]
        weights = [0.5, 0.25, 0.25]
    if flip:
        views += [view[:, :, ::-1] for view in views]
        weights = [weight / 2 for weight in weights * 2]
    # All views of an image, then those of the next, as one batch: the network is compiled once, and
    # each device keeps its images.
    stacked = jnp.stack(views, 1).reshape(-1, *images.shape[1:])
    logits = model.apply(variables, stacked, train=False)
    assert isinstance(logits, jax.Array)
    share = jnp.array(weights, logits.dtype).reshape(1, -1, 1)
    return (logits.reshape(-1, len(views), logits.shape[-1]) * share).sum(1)


def eval_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    flip: bool = False,
    shift: int = 0,
) -> EvalMetrics:
    """Sums over one batch; "mask" (N,) is 0 for padding and 1 otherwise. For `flip` and `shift` see
    `logits_of`.
    """
    how: Any = {"model": model, "mean": mean, "std": std, "flip": flip, "shift": shift}
    logits = logits_of(state.variables, batch["image"], **how)
    return EvalMetrics.single_from_model_output(
        loss=cross_entropy(logits, batch["label"]),
        logits=logits,
        labels=batch["label"],
        mask=batch["mask"],
    )
