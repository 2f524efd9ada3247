"""Losses per example, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy with label smoothing (Szegedy et al., 2016, section 7).

    Args:
        logits: (N, classes).
        labels: (N,) integers.
        label_smoothing: share of the target spread evenly over all classes.

    Returns:
        (N,) float32.
    """
    logits = logits.astype(jnp.float32)
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def mixed_cross_entropy(
    logits: jax.Array, batch: dict[str, jax.Array], label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy of a batch of images that may be mixed of two, see `data.mixing`.

    Args:
        logits: (N, classes).
        batch: "label" (N,) integers, and where images are mixed "label2" (N,) integers with
            "share2" (N,), the share of the second label in the target.
        label_smoothing: see `cross_entropy`.

    Returns:
        (N,) float32, (1 − share2) · loss of label + share2 · loss of label2.
    """
    losses = cross_entropy(logits, batch["label"], label_smoothing)
    if "label2" not in batch:
        return losses
    share = batch["share2"]
    return (1 - share) * losses + share * cross_entropy(logits, batch["label2"], label_smoothing)
