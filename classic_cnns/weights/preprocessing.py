"""What images went through for the published weights of other libraries."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from classic_cnns.data.preprocess import Preprocess
from classic_cnns.models.googlenet import GoogLeNet
from classic_cnns.weights.convert import Flat, key_of
from classic_cnns.weights.dialects import Dialect
from classic_cnns.weights.pretrained import V2

_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_LARGE = {"image_shape": (224, 224, 3), "mode": "crop", "resize": 256}
_SMALL = {"image_shape": (32, 32, 3)}

# What the pixels of each dialect's published weights went through, see `Preprocess`. Those of Keras
# take BGR; loading turns their first kernel round, so that ours take RGB, and exporting back.
PREPROCESSING: dict[str, dict[str, Any]] = {
    "torchvision": _LARGE | _IMAGENET,
    "timm": _LARGE | _IMAGENET,
    "transformers": _LARGE | _IMAGENET,
    "keras": _LARGE
    | {"resize": 224, "mean": [123.68 / 255, 116.779 / 255, 103.939 / 255], "std": [1 / 255] * 3},
    "akamaster": _SMALL | _IMAGENET,
    "kuangliu": _SMALL | {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]},
    "weiaicunzai": _SMALL | {"mean": [0.5071, 0.4865, 0.4409], "std": [0.2673, 0.2564, 0.2762]},
    "torch": _SMALL | {"mean": [0.5] * 3, "std": [0.5] * 3},
}


# Of every network, the layer that sees the image is the first of these that it has.
FIRST_LAYERS = ("conv_init", "conv1_1", "conv1")


def preprocess_of(network: nn.Module, dialect: Dialect, theirs: Flat, tag: str) -> Preprocess:
    """What images go through for another library's weights."""
    found = dict(PREPROCESSING[dialect.name])
    if isinstance(network, GoogLeNet):
        found |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    if tag == V2:
        found["resize"] = 232
    keys = [key_of(dialect, layer, "kernel") for layer in FIRST_LAYERS]
    first = next((theirs[key] for key in keys if key in theirs), None)
    if first is not None and first.ndim == 4:
        channels = first.shape[2] if dialect.name == "keras" else first.shape[1]
        found["image_shape"] = (*found["image_shape"][:2], channels)
        if channels != 3:
            found |= {k: [sum(found[k]) / 3] * channels for k in ("mean", "std")}
    return Preprocess.from_dict(found)
