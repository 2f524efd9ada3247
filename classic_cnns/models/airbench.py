"""The network of K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024
(arXiv:2404.00498), section 3: a fixed convolution that whitens patches, and three blocks of two 3×3
convolutions that start as the identity.

The filters of the first layer follow from the training images: see `Airbench.from_images`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from classic_cnns.models.layers import BatchNorm, Conv, max_pool
from classic_cnns.models.lowering import Impl

SAME = ((1, 1), (1, 1))
LOGIT_SCALE = 1 / 9


def dirac(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Kernels (H, W, in, out) of which the first `in` outputs pass their input on; the others are
    U(±1/√fan_in).
    """
    height, width, inputs, outputs = shape
    bound = (height * width * inputs) ** -0.5
    kernel = jax.random.uniform(key, shape, dtype, -bound, bound)
    same = min(inputs, outputs)
    identity = jnp.zeros((height, width, inputs, same), dtype)
    identity = identity.at[height // 2, width // 2].set(jnp.eye(inputs, same, dtype=dtype))
    return kernel.at[..., :same].set(identity)


def whitening(images: np.ndarray, epsilon: float = 5e-4) -> np.ndarray:
    """Filters whose outputs over 2×2 patches have variance 1 and no correlation, and their
    negatives.

    Args:
        images: (N, H, W, C) floats, as the network sees them.
        epsilon: added to the variances, so that directions without any are not blown up.

    Returns:
        (2, 2, C, 8·C) float32.
    """
    patches = np.lib.stride_tricks.sliding_window_view(images, (2, 2), axis=(1, 2))
    channels = images.shape[-1]
    patches = patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 4 * channels)
    variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
    filters = directions / np.sqrt(variances + epsilon)
    filters = np.concatenate([filters, -filters], axis=1).astype(np.float32)
    return filters.reshape(2, 2, channels, 8 * channels)


class Airbench(nn.Module):
    """Whitening 2×2, then conv, max-pool, norm, GELU, conv, norm, GELU three times.

    The scales of the norms are not trained in the paper: freeze "/scale$" and "^whiten/kernel", as
    configs/cifar10_fast.py does.

    Attributes:
        num_classes: outputs.
        widths: channels of the blocks.
        dtype: of the computation.
        impl: see `lowering.conv`.
        freeze_bn: BatchNorm uses its stored statistics while training, too.
    """

    num_classes: int = 10
    widths: tuple[int, int, int] = (64, 256, 256)
    dtype: Any = jnp.float32
    impl: Impl = "auto"
    freeze_bn: bool = False

    def min_size(self) -> int:
        """Smallest image side in pixels."""
        return 9

    def from_images(self, images: np.ndarray) -> dict[tuple[str, ...], np.ndarray]:
        """Variables by path that follow from training images (N, H, W, C), normalised floats."""
        return {("params", "whiten", "kernel"): whitening(images)}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits (N, num_classes), float32."""
        layer = {"dtype": self.dtype, "impl": self.impl}

        def norm(x: jax.Array, name: str) -> jax.Array:
            running = not train or self.freeze_bn
            x = BatchNorm(running, momentum=0.6, epsilon=1e-12, name=name, **layer)(x)
            return nn.gelu(x, approximate=False)

        x = Conv(8 * x.shape[-1], (2, 2), name="whiten", **layer)(x)
        x = nn.gelu(x, approximate=False)
        for block, width in enumerate(self.widths, start=1):
            for number in (1, 2):
                name = f"{block}_{number}"
                x = Conv(
                    *(width, (3, 3)),
                    padding=SAME,
                    use_bias=False,
                    kernel_init=dirac,
                    name=f"conv{name}",
                    **layer,
                )(x)
                x = max_pool(x, 2, 2, impl=self.impl) if number == 1 else x
                x = norm(x, f"bn{name}")
        x = x.max((1, 2))
        start = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1/√fan_in)
        settings = {"dtype": self.dtype, "kernel_init": start, "name": "head"}
        x = nn.Dense(self.num_classes, use_bias=False, **settings)(x)
        return x.astype(jnp.float32) * LOGIT_SCALE


def airbench94(num_classes: int = 10, **kwargs: Any) -> Airbench:
    """The paper's network for 94 %: 1,972,792 parameters for 10 classes of 3 channels."""
    return Airbench(num_classes=num_classes, **kwargs)
