"""The layers every network here is built from: one `Conv`, one `BatchNorm`, one `max_pool`.

They compute what `flax.linen.Conv`, `flax.linen.BatchNorm` and `flax.linen.max_pool` compute and
name their variables alike. What differs is how, and only on CPU, where XLA's own choices are slow
for some shapes (docs/performance.md has the figures):

* a 1×1 convolution is a matrix product;
* a convolution of few channels is one matrix product per band of rows, with the kernel laid out as
  a banded (Toeplitz) matrix along the width;
* a convolution onto a map of a few pixels is one product with its patches, since XLA falls back to
  a naive loop where the map is smaller than the kernel;
* the weight gradient of any other convolution is summed over slices of the batch that fit the
  cache, because XLA transposes the whole activation for it;
* a max-pool with windows that do not overlap is a reshape and a maximum;
* BatchNorm's derivative is the closed form.

Everything is written with `jax.custom_jvp`, so forward mode, reverse mode and any mixture of the
two (Hessian-vector products) work. `impl="lax"` selects XLA's plain operations everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Impl = Literal["auto", "lax"]
Pair = tuple[int, int]
Padding = tuple[Pair, Pair]
Dtype = Any

_BAND_LIMIT = 2_000  # width × channels in × channels out, up to which the banded product wins
_SMALL_MAP = 4  # rows of output up to which patches win; XLA is 30 times slower on 2×2 maps
_SLICE_BYTES = 1 << 19  # part of a batch whose weight gradient is taken at once


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    groups: int = 1,
    impl: Impl = "auto",
) -> jax.Array:
    """Two-dimensional cross-correlation without bias.

    Args:
        x: images, (N, H, W, C).
        kernel: weights, (kh, kw, C // groups, O), same dtype as `x`.
        strides: step along height and width, in pixels.
        padding: zeros (before, after) along height and width, in pixels.
        groups: number of groups that channels are split into.
        impl: "auto" picks the fastest form for the platform and shape, "lax" is XLA's own.

    Returns:
        (N, H', W', O) with H' = (H + padding − kh) // stride + 1.
    """
    if impl not in ("auto", "lax"):
        raise ValueError(f'impl={impl!r} is unknown. Fix: use "auto" or "lax".')
    if impl == "lax" or jax.default_backend() != "cpu" or groups > 1:
        return _lax_conv(x, kernel, strides, padding, groups)
    kh, kw, c, o = kernel.shape
    if (kh, kw) == (1, 1) and padding == ((0, 0), (0, 0)):
        return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]
    if x.shape[2] * c * o <= _BAND_LIMIT:
        return _banded_conv(x, kernel, strides, padding)
    if _out_size(x.shape[1], kh, strides[0], padding[0]) <= _SMALL_MAP:
        return _patches_conv(x, kernel, strides, padding)
    if jax.device_count() > 1:  # slices of a batch that is spread over devices would move it
        return _lax_conv(x, kernel, strides, padding)
    return _sliced_conv(x, kernel, strides, padding)


def _lax_conv(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, groups: int = 1
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _banded_conv(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """Output row r is [rows r·s … r·s+kh−1, flattened] @ band, one product for all rows."""
    n, _, w, c = x.shape
    kh, kw, _, o = kernel.shape
    sh, sw = strides
    w_out = _out_size(w, kw, sw, padding[1])
    # place[j, u, v] = 1 where output column v reads input column u through kernel column j.
    place = np.zeros((kw, w, w_out), np.float32)
    for v in range(w_out):
        for j in range(kw):
            u = v * sw + j - padding[1][0]
            if 0 <= u < w:
                place[j, u, v] = 1
    band = jnp.einsum("ijco,juv->iucvo", kernel, place.astype(kernel.dtype))
    x = jnp.pad(x.reshape(n, -1, w * c), ((0, 0), padding[0], (0, 0)))
    h_out = _out_size(x.shape[1], kh, sh, (0, 0))
    rows = [x[:, i : i + (h_out - 1) * sh + 1 : sh] for i in range(kh)]
    out = jnp.concatenate(rows, axis=-1) @ band.reshape(kh * w * c, w_out * o)
    return out.reshape(n, h_out, w_out, o)


def _out_size(size: int, kernel: int, stride: int, padding: Pair) -> int:
    return (size + sum(padding) - kernel) // stride + 1


def _patches_conv(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """Every output pixel is its flattened patch of the input @ the kernel, one product for all."""
    kh, kw, c, o = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h_out = _out_size(x.shape[1], kh, strides[0], (0, 0))
    w_out = _out_size(x.shape[2], kw, strides[1], (0, 0))
    shifted = [
        x[:, i : i + (h_out - 1) * strides[0] + 1 : strides[0]][
            :, :, j : j + (w_out - 1) * strides[1] + 1 : strides[1]
        ]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(kh * kw * c, o)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _sliced_conv(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """XLA's convolution, whose derivative by the kernel is a sum over slices of the batch."""
    return _lax_conv(x, kernel, strides, padding)


@_sliced_conv.defjvp
def _sliced_conv_jvp(strides: Pair, padding: Padding, primals: Any, tangents: Any) -> Any:
    (x, kernel), (dx, dkernel) = primals, tangents
    out = _lax_conv(x, kernel, strides, padding)
    size = max(1, _SLICE_BYTES // (x[0].size * x.dtype.itemsize))
    slices = [
        _lax_conv(x[i : i + size], dkernel, strides, padding) for i in range(0, x.shape[0], size)
    ]
    return out, _lax_conv(dx, kernel, strides, padding) + jnp.concatenate(slices)


def max_pool(
    x: jax.Array,
    window: int,
    stride: int,
    padding: Padding = ((0, 0), (0, 0)),
    *,
    impl: Impl = "auto",
) -> jax.Array:
    """Maximum over square windows of (N, H, W, C); padded cells never win.

    Rows and columns that do not fill a window are left out, as in every framework's default.
    """
    n, h, w, c = x.shape
    plain = impl == "lax" or jax.default_backend() != "cpu"
    if plain or window != stride or padding != ((0, 0), (0, 0)):
        return nn.max_pool(x, (window, window), (stride, stride), padding)
    h, w = h // window, w // window
    x = x[:, : h * window, : w * window].reshape(n, h, window, w * window, c)
    # Pairwise maxima along one axis at a time: elementwise code, which XLA:CPU vectorises.
    x = functools.reduce(jnp.maximum, [x[:, :, i] for i in range(window)])
    x = x.reshape(n, h, w, window, c)
    return functools.reduce(jnp.maximum, [x[:, :, :, i] for i in range(window)])


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x normalised over all axes but the last, with the mean and the (biased) variance used."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    var = jnp.square(x - _row(mean, x)).mean(axes)
    factor = lax.rsqrt(var + epsilon) * scale
    return x * _row(factor, x) + _row(bias - mean * factor, x), mean, var


@_normalize.defjvp
def _normalize_jvp(epsilon: float, primals: Any, tangents: Any) -> Any:
    # With u = dx·γ/σ the tangent is u − mean(u) − x̂·mean(x̂·u), and that projection is its own
    # transpose: reverse mode gets the closed form. Written as additions of per-channel vectors, so
    # that its two reductions are the ones that dscale and dbias need anyway.
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    axes = tuple(range(x.ndim - 1))
    out, mean, var = _normalize(x, scale, bias, epsilon)
    inv = lax.rsqrt(var + epsilon)
    x_hat = (x - _row(mean, x)) * _row(inv, x)
    u = dx * _row(inv * scale, x)
    dout = u + x_hat * _row(dscale - (x_hat * u).mean(axes), x) + _row(dbias - u.mean(axes), x)
    return (out, mean, var), (dout, dx.mean(axes), 2 * (x_hat * dx).mean(axes) / inv)


def _row(v: jax.Array, like: jax.Array) -> jax.Array:
    return v.reshape((1,) * (like.ndim - 1) + (-1,))


class Conv(nn.Module):
    """Convolution of (N, H, W, C) images; variables as in `flax.linen.Conv`.

    Attributes:
        features: output channels.
        kernel_size: height and width in pixels.
        strides, padding, groups: see `conv`. Padding is explicit, never "SAME": see the style
            notes in CONTRIBUTING.md.
        use_bias: add a bias per channel.
        dtype: of the computation; parameters are float32.
        impl: see `conv`.
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
        kernel = self.param("kernel", self.kernel_init, shape)
        x = conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            strides=self.strides,
            padding=self.padding,
            groups=self.groups,
            impl=self.impl,
        )
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            x = x + _row(bias.astype(self.dtype), x)
        return x


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
        impl: see `conv`.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    scale_init: Callable[..., jax.Array] = nn.initializers.ones
    impl: Impl = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Same shape out as in."""
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        ra_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        ra_var = self.variable("batch_stats", "var", jnp.ones, shape)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.use_running_average:
            factor = lax.rsqrt(ra_var.value + self.epsilon) * scale
            x = x * _row(factor, x) + _row(bias - ra_mean.value * factor, x)
        else:
            closed = self.impl == "auto" and jax.default_backend() == "cpu"
            normalize = _normalize if closed else _normalize.fun  # type: ignore[attr-defined]
            x, mean, var = normalize(x, scale, bias, self.epsilon)
            if not self.is_initializing():
                keep = self.momentum
                ra_mean.value = keep * ra_mean.value + (1 - keep) * lax.stop_gradient(mean)
                ra_var.value = keep * ra_var.value + (1 - keep) * lax.stop_gradient(var)
        return x.astype(self.dtype)
