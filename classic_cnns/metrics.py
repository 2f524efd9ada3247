"""Metrics as sums and counts on the device, so that any batching gives the same averages."""

# No `from __future__ import annotations` here: clu reads the annotations of a Collection as
# objects.
import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics


@flax.struct.dataclass
class Accuracy(metrics.Average):
    """Share of examples whose label is the largest logit; masked examples do not count.

    Of an image mixed of two, each label counts as much as its share in the target.
    """

    @classmethod
    def from_model_output(  # type: ignore
        cls, *, logits, labels, labels2=None, share2=None, mask=None, **_
    ) -> "Accuracy":
        """From (N, classes) logits and (N,) labels, if mixed with labels2 and share2."""
        best = logits.argmax(-1)
        hit = (best == labels).astype(jnp.float32)
        if labels2 is not None:
            hit = (1 - share2) * hit + share2 * (best == labels2)
        return super().from_model_output(values=hit, mask=mask)


@flax.struct.dataclass
class AccuracyTop5(metrics.Average):
    """Share of examples whose label is among the five largest logits (or all, if fewer)."""

    @classmethod
    def from_model_output(cls, *, logits, labels, mask=None, **_) -> "AccuracyTop5":  # type: ignore
        """From (N, classes) logits and (N,) labels."""
        top = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
        hit = (top == labels[:, None]).any(-1).astype(jnp.float32)
        return super().from_model_output(values=hit, mask=mask)


@flax.struct.dataclass
class Recall(metrics.Metric):
    """Hits and examples of each class."""

    hits: jax.Array
    examples: jax.Array

    @classmethod
    def empty(cls) -> "Recall":
        """Nothing counted; takes the number of classes from what is merged into it."""
        return cls(hits=jnp.zeros(()), examples=jnp.zeros(()))

    @classmethod
    def from_model_output(cls, *, logits, labels, mask=None, **_) -> "Recall":  # type: ignore
        """From (N, classes) logits and (N,) labels."""
        weight = jnp.ones(labels.shape) if mask is None else mask
        hit = (logits.argmax(-1) == labels) * weight
        zeros = jnp.zeros(logits.shape[-1])
        return cls(hits=zeros.at[labels].add(hit), examples=zeros.at[labels].add(weight))

    def merge(self, other: "Recall") -> "Recall":
        """Of both."""
        return Recall(hits=self.hits + other.hits, examples=self.examples + other.examples)

    def compute(self) -> jax.Array:
        """Share of the examples of each class that were hit; NaN for a class without any."""
        return jnp.where(self.examples > 0, self.hits / jnp.maximum(self.examples, 1), jnp.nan)


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """Sums over training steps; `grad_norm` is averaged over steps, the others over examples."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: Accuracy
    grad_norm: metrics.Average.from_output("grad_norm")  # type: ignore[valid-type]

    def summary(self) -> dict[str, float]:
        """The averages; NaN of nothing, where all steps were skipped (float16)."""
        with np.errstate(invalid="ignore"):
            return {name: float(value) for name, value in self.compute().items()}


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
    """Sums over a whole split."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: Accuracy
    accuracy_top5: AccuracyTop5
    recall: Recall

    def summary(self) -> dict[str, float | list[float | None]]:
        """Numbers for JSON: the averages, "recall" of each class (None for one without examples)
        and "balanced_accuracy", the mean of those.
        """
        values = {k: np.asarray(v) for k, v in self.compute().items()}
        recall = values.pop("recall")
        return {
            **{name: float(value) for name, value in values.items()},
            "balanced_accuracy": float(np.nanmean(recall)),
            "recall": [None if np.isnan(r) else float(r) for r in recall],
        }


@dataclasses.dataclass(frozen=True)
class EpochSums:
    """Sums over the training steps of an epoch, on the host and exact to save as JSON."""

    loss: float = 0.0
    correct: float = 0.0
    examples: float = 0.0

    def add(self, metrics: TrainMetrics) -> "EpochSums":
        """With the sums of more steps."""
        return EpochSums(
            self.loss + float(metrics.loss.total),  # type: ignore[attr-defined]
            self.correct + float(metrics.accuracy.total),
            self.examples + float(metrics.accuracy.count),
        )

    def means(self) -> dict[str, float]:
        """Averages over the examples; NaN of none."""
        examples = self.examples or float("nan")
        return {"train_loss": self.loss / examples, "train_accuracy": self.correct / examples}
