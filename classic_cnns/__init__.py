"""Classic convolutional networks in JAX: models, training, evaluation.

Importing this package loads nothing heavy; each name below is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers
    from classic_cnns.data import create_dataset as create_dataset
    from classic_cnns.data.augment import create_augment as create_augment
    from classic_cnns.evaluate import evaluate_run as evaluate_run
    from classic_cnns.loading import load as load
    from classic_cnns.losses import create_loss as create_loss
    from classic_cnns.models import create_model as create_model
    from classic_cnns.models import list_models as list_models
    from classic_cnns.models.features import features as features
    from classic_cnns.models.features import list_layers as list_layers
    from classic_cnns.optimizers import create_optimizer as create_optimizer
    from classic_cnns.prediction import predict as predict
    from classic_cnns.schedules import create_schedule as create_schedule
    from classic_cnns.steps import eval_step as eval_step
    from classic_cnns.steps import train_step as train_step
    from classic_cnns.train import train_and_evaluate as train_and_evaluate
    from classic_cnns.train_state import create_train_state as create_train_state
    from classic_cnns.weights import load_weights as load_weights

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
