"""Losses per example, in float32: functions of logits and targets.

Targets are labels, (N,) integers, or (N, classes) floats that add up to 1. Every loss here is
linear in the target, so that of an image mixed of two is the mix of two losses, see `mixed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classic_cnns.errors import ConfigError, nearest

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy with label smoothing (Szegedy et al., 2016, section 7).

    Args:
        logits: (N, classes).
        targets: (N,) integers or (N, classes) floats.
        label_smoothing: share of the target spread evenly over all classes.

    Returns:
        (N,) float32.
    """
    logits = logits.astype(jnp.float32)
    if not label_smoothing and targets.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return optax.softmax_cross_entropy(logits, _soft(targets, logits, label_smoothing))


def bce(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Every class apart against all others: the sum of their binary cross-entropies.

    The sum, not the mean, so that the gradient of a logit, sigmoid − target, is of the size that
    cross-entropy has. Arguments as in `cross_entropy`; smoothing is over all classes, too.

    Returns:
        (N,) float32.
    """
    logits = logits.astype(jnp.float32)
    targets = _soft(targets, logits, label_smoothing)
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)


def focal(
    logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0, gamma: float = 2.0
) -> jax.Array:
    """Cross-entropy times (1 − p)^gamma, p the probability of the class (Lin et al., 2017).

    Arguments as in `cross_entropy`; `gamma` 0 is cross-entropy.

    Returns:
        (N,) float32.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    # The clip keeps the derivative of the power finite where p rounds to 1 and gamma is below 1.
    rest = jnp.maximum(-jnp.expm1(log_p), 1e-7)
    return -(_soft(targets, logits, label_smoothing) * rest**gamma * log_p).sum(-1)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "bce": bce, "focal": focal}


def create_loss(
    name: str = "cross_entropy",
    *,
    label_smoothing: float = 0.0,
    class_weights: np.ndarray | None = None,
    logit_adjustment: np.ndarray | None = None,
) -> Loss:
    """A loss of (logits, targets) by name.

    Args:
        name: of `LOSSES`.
        label_smoothing: see `cross_entropy`.
        class_weights: (classes,) factors of the loss, see `class_weights`.
        logit_adjustment: (classes,) added to the logits, see `logit_adjustment`.

    Raises:
        ConfigError: unknown name, or a smoothing that is no share.
    """
    if name not in LOSSES:
        raise ConfigError(f'unknown loss "{name}". Fix: {nearest(name, LOSSES)}')
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing is {label_smoothing}. Fix: 0 or more, below 1")
    plain = LOSSES[name]

    def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
        if logit_adjustment is not None:
            logits = logits.astype(jnp.float32) + jnp.asarray(logit_adjustment)[None]
        values = plain(logits, targets, label_smoothing)  # type: ignore[call-arg]
        if class_weights is None:
            return values
        weights = jnp.asarray(class_weights)
        return values * (weights[targets] if targets.ndim == 1 else targets @ weights)

    return loss


def class_weights(counts: Sequence[int]) -> np.ndarray:
    """Weights by which every class counts the same: images / (classes · images of the class).

    Their mean over the images is 1. A class without images has weight 0.

    Args:
        counts: images of each class.

    Returns:
        (classes,) float32.
    """
    n = np.asarray(counts, np.float64)
    return np.where(n > 0, n.sum() / (np.count_nonzero(n) * np.maximum(n, 1)), 0).astype(np.float32)


def logit_adjustment(counts: Sequence[int], tau: float = 1.0) -> np.ndarray:
    """τ · log of each class's share, to be added to the logits of the training loss alone.

    The bare logits then aim at the mean of the classes' accuracies (Menon et al., 2021, eq. 10). A
    class without images counts as one with one.

    Args:
        counts: images of each class.
        tau: τ, 0 for none.

    Returns:
        (classes,) float32.
    """
    n = np.maximum(np.asarray(counts, np.float64), 1)
    return (tau * np.log(n / n.sum())).astype(np.float32)


def mixed(loss: Loss, logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The loss of a batch of images that may be mixed of two, see `data.mixing`.

    Args:
        loss: of (logits, labels).
        logits: (N, classes).
        batch: "label" (N,) integers, and where images are mixed "label2" (N,) integers with
            "share2" (N,), the share of the second label in the target.

    Returns:
        (N,) float32, (1 − share2) · loss of label + share2 · loss of label2.
    """
    losses = loss(logits, batch["label"])
    if "label2" not in batch:
        return losses
    share = batch["share2"]
    return (1 - share) * losses + share * loss(logits, batch["label2"])


def _soft(targets: jax.Array, logits: jax.Array, label_smoothing: float) -> jax.Array:
    if targets.ndim == 1:
        targets = jax.nn.one_hot(targets, logits.shape[-1])
    return optax.smooth_labels(targets, label_smoothing)
