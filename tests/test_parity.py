"""Logits against those that other libraries gave for the same weights: benchmarks/parity.py."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from seeded import CASES, OTHERS, others_images, seeded_images, seeded_variables

from classic_cnns.models import create_model

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "logits.json").read_text())["logits"]
SLOW = pytest.mark.slow
QUICK = [(n, "eval") for n in ("alexnet", "googlenet", "resnet18", "resnet50")]
QUICK += [(n, "train") for n in ("alexnet", "vgg11_bn", "resnet18")]
# Batch statistics of few images amplify rounding with depth. In float64: 6e-8.
TRAIN_TOLERANCE = {"resnet101": 5e-4, "resnet152": 2e-3}


def test_every_golden_has_its_case():
    keys = (f"{n}/{s}/{m}" for n in CASES for s in CASES[n][2] for m in ("eval", "train"))
    others = (f"{n}/{s}" for n in OTHERS for s in OTHERS[n][2])
    assert set(GOLDENS) == {*keys, *others}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        case if case in QUICK else pytest.param(*case, marks=SLOW)
        for case in ((n, mode) for n in CASES for mode in ("eval", "train"))
    ],
)
def test_logits_are_torchvisions(name, mode, request):
    if (name, mode) == ("googlenet", "eval"):  # 57 convolutions; in training mode as for users
        request.getfixturevalue("quick_compile")
    network, fields, sides = CASES[name]
    model = create_model(network, 10, **fields)
    variables = seeded_variables(model, 224)
    train = mode == "train"

    @jax.jit
    def run(variables, images):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, images, train=train, mutable=["batch_stats"], rngs=rngs)[0]

    for side in sides[-1:] if (name, mode) in QUICK else sides:
        expected = np.array(GOLDENS[f"{name}/{side}/{mode}"], np.float32)
        error = np.abs(run(variables, seeded_images(side)) - expected).max()
        tolerance = TRAIN_TOLERANCE.get(name, 1e-4) if train else 1e-5
        assert error < tolerance * np.abs(expected).max(), side


@pytest.mark.parametrize(
    "name", [n if n == "keras/resnet50" else pytest.param(n, marks=SLOW) for n in OTHERS]
)
def test_logits_are_those_of_other_libraries(name):
    network, fields, sides = OTHERS[name]
    model = create_model(network, 10, **fields)
    variables = seeded_variables(model, 224)
    for side in sides[-1:] if name == "keras/resnet50" else sides:
        logits = jax.jit(model.apply)(variables, others_images(name, side))
        expected = np.array(GOLDENS[f"{name}/{side}"], np.float32)
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max(), side
