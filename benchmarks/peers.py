"""Our networks with flax.linen's own layers in place of ours, for comparison."""

import contextlib
import inspect
from unittest import mock

import flax.linen as nn

import classic_cnns.models


def conv(features, kernel_size, strides=(1, 1), padding=((0, 0), (0, 0)), groups=1, **settings):
    settings.pop("impl", None)
    return nn.Conv(features, kernel_size, strides, padding, feature_group_count=groups, **settings)


def batch_norm(use_running_average, momentum=0.9, epsilon=1e-5, **settings):
    settings.pop("impl", None)
    return nn.BatchNorm(use_running_average, momentum=momentum, epsilon=epsilon, **settings)


def max_pool(x, window, stride, padding=((0, 0), (0, 0)), *, ceil_mode=False, impl=None):
    if ceil_mode:
        tails = (-(-(s - window) // stride) * stride + window - s for s in x.shape[1:3])
        padding = tuple((0, t if 0 < t < window else 0) for t in tails)
    return nn.max_pool(x, (window, window), (stride, stride), padding)


@contextlib.contextmanager
def plain_linen():
    """Within it, networks are traced with nn.Conv, nn.BatchNorm, nn.max_pool and nn.relu."""
    theirs = {"Conv": conv, "BatchNorm": batch_norm, "max_pool": max_pool, "residual_relu": nn.relu}
    with contextlib.ExitStack() as stack:
        for module in filter(inspect.ismodule, vars(classic_cnns.models).values()):
            name = module.__name__.removeprefix("classic_cnns.models.")
            if name not in (module.__name__, "layers", "lowering"):
                for layer in theirs.keys() & vars(module).keys():
                    stack.enter_context(mock.patch.object(module, layer, theirs[layer]))
        yield
