"""Shapes along the trunk of every registered network, against the papers' tables."""

import itertools
import re

import pytest

from classic_cnns.models import MODELS, create_model
from classic_cnns.models.features import list_layers

# The trunk of every network as (layers, side, channels) one after another, at
# 224 px, LeNet-5 and the CIFAR ResNets at 32. LeCun et al. 1998, figure 2; Krizhevsky 2014 (as
# torchvision) and Krizhevsky et al. 2012, figure 2;
# Simonyan & Zisserman 2015, table 1; Szegedy et al. 2015, table 1; He et al. 2016, table 1 and
# section 4.2.
VGG_SIDES = ((224, 64), (112, 128), (56, 256), (28, 512), (14, 512))
VGG_LAYERS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
RESNET_BLOCKS = {
    10: (1, 1, 1, 1), 14: (2, 2, 1, 1), 16: (2, 2, 2, 1), 18: (2, 2, 2, 2), 26: (3, 3, 3, 3),
    34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3),
}  # fmt: skip
INCEPTION = (
    (1, 112, 64), (1, 56, 64), (1, 56, 192), (1, 28, 256), (1, 28, 480), (3, 14, 512),
    (1, 14, 528), (1, 14, 832), (1, 7, 832), (1, 7, 1024),
)  # fmt: skip
TRUNKS = {
    "lenet5": ((1, 28, 6), (1, 10, 16)),
    "lenet5_1998": ((1, 28, 6), (1, 14, 6), (1, 10, 16), (1, 5, 16)),
    "alexnet": ((1, 55, 64), (1, 27, 192), (1, 13, 384), (2, 13, 256)),
    "alexnet2012": ((1, 55, 96), (1, 27, 256), (2, 13, 384), (1, 13, 256)),
    "airbench94": ((1, 31, 64), (1, 15, 64), (1, 15, 256), (2, 7, 256), (1, 3, 256)),
    "googlenet": INCEPTION,
    "googlenet2014": INCEPTION,
}
for depth, counts in VGG_LAYERS.items():
    TRUNKS[f"vgg{depth}"] = TRUNKS[f"vgg{depth}_bn"] = tuple(
        (count, *shape) for count, shape in zip(counts, VGG_SIDES, strict=True)
    )
for depth, counts in RESNET_BLOCKS.items():
    width = 256 if depth >= 50 else 64
    TRUNKS[f"resnet{depth}"] = (
        (1, 112, 64),
        *((count, 56 >> i, width << i) for i, count in enumerate(counts)),
    )
for depth in (20, 32, 44, 56, 110):
    n = (depth - 2) // 6
    TRUNKS[f"resnet{depth}_cifar"] = ((1 + n, 32, 16), (n, 16, 32), (n, 8, 64))


def test_every_model_has_a_golden():
    assert set(TRUNKS) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_along_the_trunk(name):
    small = name.startswith(("lenet", "airbench")) or name.endswith("_cifar")
    shape = (32, 32, 1 if name.startswith("lenet") else 3) if small else (224, 224, 3)
    maps = [
        layer.output
        for layer in list_layers(create_model(name, 10), shape)
        if len(layer.output) == 3 and re.fullmatch(r"(conv|c|s|stage|inception)[^/]*", layer.name)
    ]
    assert all(height == width for height, width, _ in maps)
    runs = [(len(list(group)), *at[1:]) for at, group in itertools.groupby(maps)]
    assert runs == list(TRUNKS[name])
