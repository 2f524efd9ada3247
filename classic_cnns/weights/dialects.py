"""What others call our layers: one table of `regex → their name` a dialect and family.

A table is read in one direction only, ours to theirs; reading a file asks for the name of each of
our layers, writing one does the same, so that both ways agree by construction.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from classic_cnns.errors import ConfigError, nearest
from classic_cnns.models.alexnet import AlexNet
from classic_cnns.models.googlenet import GoogLeNet
from classic_cnns.models.lenet import LeNet5
from classic_cnns.models.resnet import CifarResNet, ResNet
from classic_cnns.models.vgg import TABLE as VGG_TABLE
from classic_cnns.models.vgg import VGG

Rule = tuple[str, Callable[[re.Match[str]], str]]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """One way to name the layers of one family.

    Attributes:
        name: for people.
        rules: the first pattern that matches a whole layer path ("stage1_block1/conv1") gives its
            name.
        flatten: dense layers that follow a flattened map → the map's (channels, height, width).
        fields: of our module, which the weights need, for example the place of the stride.
        dense_as_conv: dense layers stored as convolutions → shape (height, width) of their kernel.
    """

    name: str
    rules: tuple[Rule, ...]
    flatten: dict[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    dense_as_conv: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def as_ours(self) -> bool:
        """Whether its arrays have our layouts, not PyTorch's."""
        return self.name in ("ours", "keras")

    def layer(self, ours: str) -> str | None:
        """Their name of one of our layers, or None."""
        for pattern, make in self.rules:
            match = re.fullmatch(pattern, ours)
            if match:
                return make(match)
        return None


def dialects(model: nn.Module) -> list[Dialect]:
    """All dialects of a network's family, with our own names as the last."""
    return [*_others(model), Dialect("ours", ((".+", lambda m: m[0]),))]


def _others(model: nn.Module) -> list[Dialect]:
    if isinstance(model, ResNet):
        return _resnet(model)
    if isinstance(model, CifarResNet):
        return [_akamaster()]
    if isinstance(model, VGG):
        return _vgg(model)
    if isinstance(model, AlexNet):
        return [_alexnet()]
    if isinstance(model, GoogLeNet):
        return [_googlenet()]
    if isinstance(model, LeNet5):
        return [_lenet()]
    return []


def dialect(model: nn.Module, name: str) -> Dialect:
    """One dialect by name.

    Raises:
        ConfigError: unknown for this family, with the nearest.
    """
    known = {d.name: d for d in dialects(model)}
    if isinstance(model, ResNet):
        known["timm"] = known["torchvision"]  # the same names
    if name not in known:
        raise ConfigError(
            f'{type(model).__name__} has no dialect "{name}". Fix: {nearest(name, known)}'
        )
    return known[name]


def _fixed(name: str) -> Callable[[re.Match[str]], str]:
    return lambda _: name


def _resnet(model: ResNet) -> list[Dialect]:
    block = r"stage(\d)_block(\d+)/"

    def at(m: re.Match[str], rest: str) -> str:
        return f"layer{m[1]}.{int(m[2]) - 1}.{rest}"

    def named(shortcut: str, head: str) -> tuple[Rule, ...]:
        return (
            ("conv_init", _fixed("conv1")),
            ("bn_init", _fixed("bn1")),
            (block + r"(conv|bn)(\d)", lambda m: at(m, m[3] + m[4])),
            (block + "conv_proj", lambda m: at(m, f"{shortcut}.0")),
            (block + "bn_proj", lambda m: at(m, f"{shortcut}.1")),
            ("head", _fixed(head)),
        )

    def residual(m: re.Match[str]) -> str:
        index = 3 * (int(m[4]) - 1) + (m[3] == "bn")
        return f"conv{int(m[1]) + 1}_x.{int(m[2]) - 1}.residual_function.{index}"

    def side(m: re.Match[str]) -> str:
        return f"conv{int(m[1]) + 1}_x.{int(m[2]) - 1}.shortcut.{int(m[3] == 'bn')}"

    kinds = {"conv": "convolution", "bn": "normalization"}

    def hf(m: re.Match[str], rest: str, kind: str) -> str:
        place = f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{int(m[2]) - 1}"
        return f"{place}.{rest}.{kinds[kind]}"

    def keras(m: re.Match[str], index: str, kind: str) -> str:
        return f"conv{int(m[1]) + 1}_block{m[2]}_{index}_{kind}"

    paper = {"bottleneck_stride": "1x1", "bn_epsilon": 1.001e-5}
    return [
        Dialect("torchvision", named("downsample", "fc")),
        Dialect("kuangliu", named("shortcut", "linear"), fields={"stem": "cifar"}),
        Dialect(
            "weiaicunzai",
            (
                ("conv_init", _fixed("conv1.0")),
                ("bn_init", _fixed("conv1.1")),
                (block + r"(conv|bn)(\d)", residual),
                (block + "(conv|bn)_proj", side),
                ("head", _fixed("fc")),
            ),
            fields={"stem": "cifar"},
        ),
        Dialect(
            "transformers",
            (
                ("conv_init", _fixed("resnet.embedder.embedder.convolution")),
                ("bn_init", _fixed("resnet.embedder.embedder.normalization")),
                (block + r"(conv|bn)(\d)", lambda m: hf(m, f"layer.{int(m[4]) - 1}", m[3])),
                (block + "(conv|bn)_proj", lambda m: hf(m, "shortcut", m[3])),
                ("head", _fixed("classifier.1")),
            ),
        ),
        Dialect(
            "keras",
            (
                ("conv_init", _fixed("conv1_conv")),
                ("bn_init", _fixed("conv1_bn")),
                (block + r"(conv|bn)(\d)", lambda m: keras(m, m[4], m[3])),
                (block + "(conv|bn)_proj", lambda m: keras(m, "0", m[3])),
                ("head", _fixed("predictions")),
            ),
            fields=paper,
        ),
    ]


def _akamaster() -> Dialect:
    block = r"stage(\d)_block(\d+)/"

    def at(m: re.Match[str]) -> str:
        if m[4]:
            return f"layer{m[1]}.{int(m[2]) - 1}.{m[3]}{m[4]}"
        return f"layer{m[1]}.{int(m[2]) - 1}.shortcut.{int(m[3] == 'bn')}"

    rules: tuple[Rule, ...] = (
        ("conv_init", _fixed("conv1")),
        ("bn_init", _fixed("bn1")),
        (block + r"(conv|bn)(\d)", at),
        (block + r"(conv|bn)_proj()", at),
        ("head", _fixed("linear")),
    )
    return Dialect("akamaster", rules)


def _vgg(model: VGG) -> list[Dialect]:
    index, position = {}, 0
    for stage, count in enumerate(VGG_TABLE[model.depth], 1):
        for j in range(1, count + 1):
            index[f"conv{stage}_{j}"] = position
            index[f"bn{stage}_{j}"] = position + 1
            position += 3 if model.batch_norm else 2
        position += 1  # the pool
    features: Rule = (r"(?:conv|bn)\d_\d", lambda m: f"features.{index[m[0]]}")
    seven = {"fc1": (512, 7, 7)}
    head = (("fc1", 0), ("fc2", 3), ("head", 6))
    numbered = tuple((name, _fixed(f"classifier.{i}")) for name, i in head)
    return [
        Dialect("torchvision", (features, *numbered), flatten=seven, fields={"head": "imagenet"}),
        Dialect("weiaicunzai", (features, *numbered), fields={"head": "mlp"}),
        Dialect("kuangliu", (features, ("head", _fixed("classifier"))), fields={"head": "cifar"}),
        Dialect(
            "timm",
            (
                features,
                (r"fc(\d)", lambda m: f"pre_logits.fc{m[1]}"),
                ("head", _fixed("head.fc")),
            ),
            flatten=seven,
            fields={"head": "imagenet"},
            dense_as_conv={"fc1": (7, 7), "fc2": (1, 1)},
        ),
        Dialect(
            "keras",
            (
                (r"conv(\d)_(\d)", lambda m: f"block{m[1]}_conv{m[2]}"),
                (r"fc\d", lambda m: m[0]),
                ("head", _fixed("predictions")),
            ),
            fields={"head": "imagenet"},
        ),
    ]


def _alexnet() -> Dialect:
    features, classifier = (0, 3, 6, 8, 10), {"fc1": 1, "fc2": 4, "head": 6}
    return Dialect(
        "torchvision",
        (
            (r"conv(\d)", lambda m: f"features.{features[int(m[1]) - 1]}"),
            (r"fc\d|head", lambda m: f"classifier.{classifier[m[0]]}"),
        ),
        flatten={"fc1": (256, 6, 6)},
    )


def _googlenet() -> Dialect:
    branches = {
        "b1": "1",
        "b2_reduce": "2.0",
        "b2": "2.1",
        "b3_reduce": "3.0",
        "b3": "3.1",
        "b4": "4.1",
    }
    return Dialect(
        "torchvision",
        (
            (r"conv(\d)/(conv|bn)", lambda m: f"conv{m[1]}.{m[2]}"),
            (
                r"inception(\w\w)/(b\w+)/(conv|bn)",
                lambda m: f"inception{m[1]}.branch{branches[m[2]]}.{m[3]}",
            ),
            (r"aux(\d)/conv/(conv|bn)", lambda m: f"aux{m[1]}.conv.{m[2]}"),
            (r"aux(\d)/fc(\d)", lambda m: f"aux{m[1]}.fc{m[2]}"),
            ("head", _fixed("fc")),
        ),
        flatten={"aux1/fc1": (128, 4, 4), "aux2/fc1": (128, 4, 4)},
        fields={"arch": "torchvision", "stem": "imagenet"},
    )


def _lenet() -> Dialect:
    return Dialect(
        "torch",
        ((r"conv\d|fc\d", lambda m: m[0]), ("head", _fixed("fc3"))),
        flatten={"fc1": (16, 5, 5)},
    )
