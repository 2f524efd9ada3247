"""Weights and images that are the same everywhere, for comparisons with other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


def normal(*shape, seed=0, dtype=np.float32):
    """Normal numbers, without a program for every shape, as jax.random would need."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def seeded_variables(model, side, channels=3):
    """Trained-like values: kernels of He's spread, BatchNorm statistics that are not 0 and 1."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, channels)))
    out = {}
    for i, (path, leaf) in enumerate(sorted(flatten_dict(dict(shapes)).items())):
        rng = np.random.Generator(np.random.Philox(key=[7, i]))
        if path[-1] == "kernel":
            spread = np.float32((2 / np.prod(leaf.shape[:-1])) ** 0.5)
            out[path] = rng.standard_normal(leaf.shape, np.float32) * spread
        elif path[-1] in ("scale", "var"):
            out[path] = rng.random(leaf.shape, np.float32) + np.float32(0.5)
        else:
            out[path] = rng.standard_normal(leaf.shape, np.float32) * np.float32(0.1)
    return unflatten_dict(out)


def seeded_images(side, count=4):
    """(count, side, side + 3, 3) float32; not square, so that swapped axes show."""
    rng = np.random.Generator(np.random.Philox(11))
    return rng.standard_normal((count, side, side + 3, 3), np.float32)


# Name in the goldens: our network, its fields, image sides.
CASES = {
    "alexnet": ("alexnet", {"dropout": 0.0}, (97, 64)),
    "vgg11": ("vgg11", {"head": "imagenet", "dropout": 0.0}, (64, 65)),
    "vgg13": ("vgg13", {"head": "imagenet", "dropout": 0.0}, (64,)),
    "vgg16": ("vgg16", {"head": "imagenet", "dropout": 0.0}, (64,)),
    "vgg19": ("vgg19", {"head": "imagenet", "dropout": 0.0}, (64,)),
    "vgg11_bn": ("vgg11_bn", {"head": "imagenet", "dropout": 0.0}, (64,)),
    "vgg13_bn": ("vgg13_bn", {"head": "imagenet", "dropout": 0.0}, (64,)),
    "vgg16_bn": ("vgg16_bn", {"head": "imagenet", "dropout": 0.0}, (64,)),
    "vgg19_bn": ("vgg19_bn", {"head": "imagenet", "dropout": 0.0}, (64, 97)),
    "googlenet": (
        "googlenet",
        {"arch": "torchvision", "stem": "imagenet", "dropout": 0.0, "aux_dropout": 0.0},
        (64, 97),
    ),
    "resnet18": ("resnet18", {"stem": "imagenet"}, (64, 97)),
    "resnet34": ("resnet34", {"stem": "imagenet"}, (64, 97)),
    "resnet50": ("resnet50", {"stem": "imagenet"}, (64, 97)),
    "resnet101": ("resnet101", {"stem": "imagenet"}, (64, 97)),
    "resnet152": ("resnet152", {"stem": "imagenet"}, (64, 97)),
}

KERAS_RESNET = {"stem": "imagenet", "bottleneck_stride": "1x1", "bn_epsilon": 1.001e-5}
KERAS_VGG = {"head": "imagenet", "dropout": 0.0}  # takes 224 px alone: it flattens

# The same for other libraries, in inference.
OTHERS = {
    "keras/vgg16": ("vgg16", KERAS_VGG, (224,)),
    "keras/vgg19": ("vgg19", KERAS_VGG, (224,)),
    "keras/resnet50": ("resnet50", KERAS_RESNET, (64, 97)),
    "keras/resnet101": ("resnet101", KERAS_RESNET, (64, 97)),
    "keras/resnet152": ("resnet152", KERAS_RESNET, (64, 97)),
    "timm/vgg16_bn": ("vgg16_bn", {"head": "imagenet", "dropout": 0.0}, (64,)),
    "timm/resnet50": ("resnet50", {"stem": "imagenet"}, (64, 97)),
    "transformers/resnet50": ("resnet50", {"stem": "imagenet"}, (64, 97)),
}


def others_images(name, side):
    """Two images; for Keras' VGG square ones."""
    images = seeded_images(side, 2)
    return images[:, :, :side] if name.startswith("keras/vgg") else images
