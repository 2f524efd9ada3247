"""Whether a training can work at all, judged by its first batch: what is wrong, and the field to
change.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from classic_cnns.data.augment import Batch, normalize
from classic_cnns.losses import cross_entropy
from classic_cnns.train_state import TrainState

# Learning rates of the first step from which a deep network without BatchNorm rarely recovers;
# AlexNet and VGG were trained with 0.01.
HIGHEST = {"sgd": 0.02} | dict.fromkeys(
    ("adabelief", "adam", "adamax", "adamaxw", "adamw", "amsgrad", "lion", "nadam", "nadamw",
     "radam", "rmsprop", "yogi"),
    2e-3,
)  # fmt: skip
PLAIN_DEPTH = 8  # kernels; LeNet-5, which has 5, stands more


def first_batch(
    state: TrainState,
    batch: Batch,
    one_step: functools.partial[Any],
    optimizer: str,
    rate: float,
    gradient: bool = False,
    images: int = 16,
) -> list[str]:
    """Lines about what will keep the network from learning; none where all is well.

    Args:
        state: at the start.
        batch: the first, see `dispatch.fetch`; not augmented.
        one_step: `train_step` with its settings bound.
        optimizer: its name.
        rate: of the first step.
        gradient: look at loss and gradients, too; compiles the network once more.
        images: of the batch that are looked at.
    """
    settings = one_step.keywords
    pixels, labels = jax.device_get((batch["image"][:images], batch["label"][:images]))
    x = np.asarray(normalize(pixels, settings["mean"], settings["std"]))
    found = [*_inputs(x), *_stem(settings["model"], x.shape), *_rate(state, optimizer, rate)]
    found += _gradient(state, x, labels, settings) if gradient else []
    return [f"WARNING {text}" for text in found]


def _inputs(x: np.ndarray) -> list[str]:
    mean, std = float(x.mean()), float(x.std())
    if abs(mean) < 1.5 and 0.3 < std < 3:
        return []
    return [
        f"normalised images have mean {mean:.3g} and deviation {std:.3g}, not about 0 and 1. Fix: "
        "the mean and std of the data (create_dataset, or the run of model.pretrained)"
    ]


def _stem(model: Any, shape: tuple[int, ...]) -> list[str]:
    side = min(shape[1:3])
    if getattr(model, "stem", None) != "imagenet" or side >= 64:
        return []
    return [
        f"the imagenet stem leaves {math.ceil(side / 32)} px of images of {side} px. Fix: "
        "model.options.stem=cifar, or data.image_size=64 or more"
    ]


def _rate(state: TrainState, optimizer: str, rate: float) -> list[str]:
    kernels = sum(jnp.ndim(p) > 1 for p in jax.tree.leaves(state.params))
    highest = HIGHEST.get(optimizer, math.inf)
    if state.batch_stats or kernels < PLAIN_DEPTH or rate <= highest:
        return []
    return [
        f"{kernels} layers without BatchNorm start with {optimizer} at rate {rate:g}, more than "
        f"{highest:g}. Fix: schedule.warmup_epochs=5, a lower optimizer.learning_rate, or the _bn "
        "variant as model.name"
    ]


def _gradient(
    state: TrainState, x: np.ndarray, labels: np.ndarray, settings: dict[str, Any]
) -> list[str]:
    model, frozen = settings["model"], settings.get("frozen")

    def loss(params: Any) -> jax.Array:
        logits, _ = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            mutable=["batch_stats", "aux_logits"],
            rngs={"dropout": jax.random.key(0)},
        )
        return cross_entropy(logits, jnp.asarray(labels)).mean()

    # Run once: quick to compile is better than quick.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quick if jax.default_backend() == "cpu" else None
    compiled = jax.jit(jax.value_and_grad(loss), compiler_options=options)
    value, grads = jax.device_get(compiled(state.params))
    if frozen is not None:
        still = frozen(state.params)
        grads = jax.tree.map(lambda g, f: np.zeros(0) if f else g, grads, still)
    found, classes = [], model.num_classes
    chance = math.log(classes)
    if not value < 3 * chance + 1:
        found.append(
            f"the first loss is {value:.3g}; guessing {classes} classes gives {chance:.3g}. Fix: "
            "the default model.options.weight_init, or normalised images"
        )
    norms = {
        name: math.sqrt(sum(float(np.vdot(g, g)) for g in jax.tree.leaves(part)))
        for name, part in grads.items()
        if sum(g.size for g in jax.tree.leaves(part))
    }
    lines = ", ".join(f"{name} {norm:.2g}" for name, norm in norms.items())
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if bad:
        found.append(f"the gradient of {bad[0]} is not finite. Fix: model.dtype=float32")
        return found
    largest = max(norms.values(), default=1.0)
    weak = [name for name, norm in norms.items() if norm <= 1e-6 * largest]
    if weak:
        found.append(
            f"hardly any gradient reaches {', '.join(weak[:4])} ({lines}). Fix: the default "
            "model.options.weight_init, or the _bn variant as model.name"
        )
    dead = {name: _dead_share(part) for name, part in grads.items() if name not in weak}
    if worst := [f"{name} {share:.0%}" for name, share in dead.items() if share > 0.9]:
        found.append(
            f"units that no image activates (dead ReLUs): {', '.join(worst[:4])}. Fix: the default "
            "model.options.weight_init, or another model.pretrained"
        )
    return found


def _dead_share(part: Any) -> float:
    """Largest share of units without any gradient, over kernels that have one at all: those before
    a scale that starts at 0 have none.
    """
    shares = [0.0]
    for g in jax.tree.leaves(part):
        if g.ndim > 1 and g.any():
            shares.append(float(1 - g.reshape(-1, g.shape[-1]).any(0).mean()))
    return max(shares)
