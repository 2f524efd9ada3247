"""All networks by name. A model is only a linen module: no loss, data or normalisation inside."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import flax.linen as nn

from classic_cnns.errors import ConfigError, nearest
from classic_cnns.models import airbench, alexnet, googlenet, lenet, resnet, vgg

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": lenet.lenet5,
    "lenet5_1998": lenet.lenet5_1998,
    "alexnet": alexnet.alexnet,
    "alexnet2012": alexnet.alexnet2012,
    "vgg11": vgg.vgg11,
    "vgg13": vgg.vgg13,
    "vgg16": vgg.vgg16,
    "vgg19": vgg.vgg19,
    "vgg11_bn": vgg.vgg11_bn,
    "vgg13_bn": vgg.vgg13_bn,
    "vgg16_bn": vgg.vgg16_bn,
    "vgg19_bn": vgg.vgg19_bn,
    "googlenet": googlenet.googlenet,
    "googlenet2014": googlenet.googlenet2014,
    "resnet10": resnet.resnet10,
    "resnet14": resnet.resnet14,
    "resnet16": resnet.resnet16,
    "resnet18": resnet.resnet18,
    "resnet26": resnet.resnet26,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
    "resnet20_cifar": resnet.resnet20_cifar,
    "resnet32_cifar": resnet.resnet32_cifar,
    "resnet44_cifar": resnet.resnet44_cifar,
    "resnet56_cifar": resnet.resnet56_cifar,
    "resnet110_cifar": resnet.resnet110_cifar,
    "airbench94": airbench.airbench94,
}

# The names of the script this library grew out of.
ALIASES = {
    "Lenet5": "lenet5",
    "Alexnet8": "alexnet",
    "GoogLeNet": "googlenet",
    "VGG16": "vgg16",
    "VGG19": "vgg19",
    "Res10": "resnet10",
    "Res14": "resnet14",
    "Res16": "resnet16",
    "Res18": "resnet18",
    "Res26": "resnet26",
    "Res34": "resnet34",
    "Res50": "resnet50",
    "Res101": "resnet101",
    "Res152": "resnet152",
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern, sorted as in the registry."""
    return [name for name in MODELS if fnmatch.fnmatch(name, pattern)]


def resolve_name(name: str) -> str:
    """The registered name for a name or an old alias.

    Raises:
        ConfigError: unknown, with the nearest names.
    """
    name = ALIASES.get(name, name)
    if name not in MODELS:
        raise ConfigError(f'unknown model "{name}". Fix: {nearest(name, [*MODELS, *ALIASES])}')
    return name


def create_model(name: str, num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """Builds a network.

    Args:
        name: see `list_models`, or an old name such as "Res18".
        num_classes: outputs.
        **kwargs: fields of the network's module, for example `stem="cifar"`, `dtype=jnp.bfloat16`
            or `init="paper"`.

    Returns:
        A linen module; `module.apply(variables, images, train=False)` takes (N, H, W, C) float
        images and returns (N, num_classes) float32 logits.

    Raises:
        ConfigError: unknown name, field or choice, with the nearest valid ones.
    """
    name = resolve_name(name)
    make = MODELS[name]
    if "init" in kwargs:  # the name is taken in linen modules
        kwargs["weight_init"] = kwargs.pop("init")
    # JSON has no tuples, and a module of lists has no hash.
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    if num_classes < 1:
        raise ConfigError(f"num_classes is {num_classes}. Fix: use 1 or more")
    try:
        model = make(num_classes=num_classes, **kwargs)
    except TypeError as error:
        fields = [f for f in make().__dataclass_fields__ if f not in ("parent", "name")]
        wrong = [f'"{k}" ({nearest(k, fields)})' for k in kwargs if k not in fields]
        if not wrong:
            raise
        raise ConfigError(f"{name} has no field {', '.join(wrong)}") from error
    hints = get_type_hints(type(model))
    choices = {k: get_args(hints[k]) for k in kwargs if get_origin(hints[k]) is Literal}
    wrong = [
        f'{k}="{kwargs[k]}" ({nearest(str(kwargs[k]), valid)})'
        for k, valid in choices.items()
        if kwargs[k] not in valid
    ]
    if wrong:
        raise ConfigError(f"{name} has no {', '.join(wrong)}")
    return model
