"""Classic convolutional networks in JAX: models, training, evaluation.

Importing this package loads nothing heavy; each name below is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "create_augment": "classic_cnns.data.augment",
    "create_dataset": "classic_cnns.data",
    "create_loss": "classic_cnns.losses",
    "create_model": "classic_cnns.models",
    "create_optimizer": "classic_cnns.optimizers",
    "create_schedule": "classic_cnns.schedules",
    "create_train_state": "classic_cnns.train_state",
    "evaluate_run": "classic_cnns.evaluate",
    "eval_step": "classic_cnns.steps",
    "features": "classic_cnns.models.features",
    "list_layers": "classic_cnns.models.features",
    "list_models": "classic_cnns.models",
    "load": "classic_cnns.loading",
    "load_weights": "classic_cnns.weights",
    "predict": "classic_cnns.prediction",
    "train_and_evaluate": "classic_cnns.train",
    "train_step": "classic_cnns.steps",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
