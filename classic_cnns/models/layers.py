"""The layers every network here is built from.

`Conv` and `BatchNorm` compute what flax.linen's compute and name their variables alike; `conv` in
lowering.py says what differs on CPU. A max-pool is maxima of shifted slices on CPU and GPU, and
BatchNorm's derivative is the closed form. `impl="lax"` selects XLA's plain operations everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from classic_cnns.models.lowering import BLOCK_OUTPUTS, Impl, Padding, Pair, conv

Dtype = Any


def max_pool(
    x: jax.Array,
    window: int,
    stride: int,
    padding: Padding = ((0, 0), (0, 0)),
    *,
    ceil_mode: bool = False,
    impl: Impl = "auto",
) -> jax.Array:
    """Maximum over square windows of (N, H, W, C); padded cells never win.

    Rows and columns that do not fill a window are left out, as in every framework's default, or
    with `ceil_mode` get a window of their own (Caffe's and PyTorch's rule: it must start inside).
    """
    _, h, w, _ = x.shape
    if ceil_mode:
        tails = (max(0, -(-(s - window) // stride) * stride + window - s) for s in (h, w))
        # A window that would start beyond the last pixel is dropped again.
        padding = tuple((0, t if t < window else 0) for t in tails)  # type: ignore[assignment]
    backend = jax.default_backend()
    if impl == "lax" or backend not in ("cpu", "gpu"):
        return nn.max_pool(x, (window, window), (stride, stride), padding)
    quarters = window == stride == 2 and not any(map(any, padding))
    if quarters and (backend == "gpu" or x.shape[-1] <= BLOCK_OUTPUTS):
        # On CPU the four images that `lowering.conv` has interleaved; XLA cancels the two.
        n, c = x.shape[0], x.shape[-1]
        x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
        rows = lax.split(x, (1, 1), axis=2)
        parts = (part for row in rows for part in lax.split(row, (1, 1), axis=4))
        return functools.reduce(_first_max, parts).reshape(n, h // 2, w // 2, c)
    # One axis at a time, as maxima of shifted slices: elementwise code, which XLA:CPU vectorises;
    # the derivative of XLA's windows is a scatter, on a GPU one of atomic additions.
    if any(map(any, padding)):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)
    for axis in (2, 1):  # of equal values the first in reading order gets the gradient
        last = (x.shape[axis] - window) // stride * stride + 1
        slices = (lax.slice_in_dim(x, i, i + last, stride, axis=axis) for i in range(window))
        x = functools.reduce(_first_max, slices)
    return x


def _first_max(a: jax.Array, b: jax.Array) -> jax.Array:
    """Maximum whose derivative goes to `a` where both are equal, and which keeps a NaN."""
    return jnp.where((a >= b) | (a != a), a, b)


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """(N, H, W, C) to (N, size, size, C) by PyTorch's rule.

    Output i is the mean over rows floor(i·H/size) to ceil((i+1)·H/size) − 1, which may overlap, or
    repeat when H < size; the same along the width.
    """
    if x.shape[1:3] == (size, size):
        return x
    rows, cols = (_averaging(s, size).astype(x.dtype) for s in x.shape[1:3])
    return jnp.einsum("ih,jw,nhwc->nijc", rows, cols, x)


def _averaging(size: int, out: int) -> np.ndarray:
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        start, end = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def local_response_norm(
    x: jax.Array, *, size: int, alpha: float, beta: float, k: float
) -> jax.Array:
    """x / (k + α·Σ x²)^β, the sum over `size` neighbouring channels (Krizhevsky et al., 2012, 3.3).

    α multiplies the sum, as in the paper; Caffe and PyTorch divide theirs by `size`.
    """
    half = size // 2
    squares = jnp.pad(jnp.square(x.astype(jnp.float32)), ((0, 0), (0, 0), (0, 0), (half, half)))
    total = sum(squares[..., i : i + x.shape[-1]] for i in range(size))
    return (x * (k + alpha * total) ** -beta).astype(x.dtype)


def _normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array | None, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x normalised over all axes but the last, with the mean and the (biased) variance used.

    With `near`, a value for each channel, both are had from one pass over x, as moments about it;
    the variance loses digits by the square of (mean − near) over the deviation.
    """
    axes = tuple(range(x.ndim - 1))
    if near is None:
        mean = x.mean(axes)
        var = jnp.square(x - _row(mean, x)).mean(axes)
    else:
        away = x - _row(near, x)
        offset = away.mean(axes)
        mean = near + offset
        var = jnp.maximum(jnp.square(away).mean(axes) - jnp.square(offset), 0)
    factor = lax.rsqrt(var + epsilon) * scale
    return x * _row(factor, x) + _row(bias - mean * factor, x), mean, var


_closed_form = jax.custom_jvp(_normalize, nondiff_argnums=(4,))
_closed_form_jit = jax.jit(_closed_form, static_argnums=4)  # traced once for layers of a shape


@_closed_form.defjvp
def _closed_form_jvp(epsilon: float, primals: Any, tangents: Any) -> Any:
    # With u = dx·γ/σ the tangent is u − mean(u) − x̂·mean(x̂·u), and that projection is its own
    # transpose: reverse mode gets the closed form. Written as additions of per-channel vectors, so
    # that its two reductions are the ones that dscale and dbias need anyway, and with x in place of
    # x̂ in them, which XLA:CPU would write to memory first.
    (x, scale, bias, near), (dx, dscale, dbias, _) = primals, tangents  # `near` changes nothing
    axes = tuple(range(x.ndim - 1))
    out, mean, var = _closed_form(x, scale, bias, near, epsilon)
    inv = lax.rsqrt(var + epsilon)
    u = dx * _row(inv * scale, x)
    du = u.mean(axes)
    slope = inv * (dscale - inv * ((x * u).mean(axes) - mean * du))
    dout = u + x * _row(slope, x) + _row(dbias - du - mean * slope, x)
    dmean = dx.mean(axes)
    return (out, mean, var), (dout, dmean, 2 * ((x * dx).mean(axes) - mean * dmean))


def _row(v: jax.Array, like: jax.Array) -> jax.Array:
    return v.reshape((1,) * (like.ndim - 1) + (-1,))


class Conv(nn.Module):
    """Convolution of (N, H, W, C) images; variables as in `flax.linen.Conv`.

    Attributes:
        features: output channels.
        kernel_size: height and width in pixels.
        strides, padding, groups: see `lowering.conv`. Padding is explicit, never "SAME": see
            CONTRIBUTING.md.
        use_bias: add a bias per channel.
        dtype: of the computation; parameters are float32.
        impl: see `lowering.conv`.
    """

    features: int
    kernel_size: Pair
    strides: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    groups: int = 1
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    impl: Impl = "auto"
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H', W', features)."""
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        # Of a kernel that is there linen traces the initialiser, to check the shape: any will do,
        # and a random one takes as long as the convolution.
        there = self.has_variable("params", "kernel")
        init = nn.initializers.zeros if there else self.kernel_init
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
            bias = bias.astype(self.dtype)
        return conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            bias,
            strides=self.strides,
            padding=self.padding,
            groups=self.groups,
            impl=self.impl,
        )


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe & Szegedy, 2015).

    Variables as in `flax.linen.BatchNorm`: params `scale` and `bias`, batch_stats `mean` and `var`
    (biased variance). Statistics are computed in float32 whatever `dtype` is.

    Attributes:
        use_running_average: normalise by batch_stats and leave them alone.
        momentum: share of the old statistics kept at each step (1 − PyTorch's momentum).
        epsilon: added to the variance.
        dtype: of the output.
        scale_init: zeros for the last BatchNorm of a residual branch.
        impl: see `lowering.conv`.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    scale_init: Callable[..., jax.Array] = nn.initializers.ones
    impl: Impl = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Same shape."""
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        ra_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        ra_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.use_running_average:
            factor = lax.rsqrt(ra_var.value + self.epsilon) * scale
            x = x * _row(factor, x) + _row(bias - ra_mean.value * factor, x)
        else:
            auto = self.impl == "auto"
            normalize = _closed_form_jit if auto else _normalize
            # A pass over x costs more than arithmetic, but not on CPU.
            near = ra_mean.value if auto and jax.default_backend() != "cpu" else None
            x, mean, var = normalize(x, scale, bias, near, self.epsilon)
            if not self.is_initializing():
                keep = self.momentum
                ra_mean.value = keep * ra_mean.value + (1 - keep) * lax.stop_gradient(mean)
                ra_var.value = keep * ra_var.value + (1 - keep) * lax.stop_gradient(var)
        return x.astype(self.dtype)
