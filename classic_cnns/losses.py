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
