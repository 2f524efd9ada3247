"""Every lowering computes what XLA's plain operation computes, to any order of derivative."""

import functools
import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeded import normal

from classic_cnns import create_model
from classic_cnns.models import layers, lowering
from classic_cnns.models.resnet import ResNet, residual_relu

SHAPES = [  # kernel, stride, padding, channels in, channels out, height, width
    (1, 1, 0, 6, 4, 5, 7),
    (1, 2, 0, 6, 4, 5, 8),
    (3, 1, 1, 3, 4, 8, 8),
    (3, 2, 1, 5, 4, 9, 8),
    (5, 1, 0, 3, 6, 12, 11),
    (5, 1, 2, 1, 6, 11, 9),
    (7, 2, 3, 3, 4, 15, 14),
    (3, 1, 0, 4, 2, 3, 5),
    (3, 1, 1, 70, 64, 2, 2),
    (3, 2, 1, 70, 64, 2, 1),
    (5, 1, 2, 60, 50, 3, 2),
    (3, 1, 1, 60, 50, 3, 2),
    (5, 1, 2, 60, 50, 4, 4),
    (3, 3, 4, 60, 50, 1, 2),  # some outputs see padding alone
]
HLO = pytest.mark.usefixtures("quick_compile")  # tests of XLA's program, before LLVM's
LOWERINGS = {
    "auto": lambda x, k, s, p: lowering.conv(x, k, strides=s, padding=p),
    "blocked": lambda x, k, s, p: lowering._blocked_conv(x, k, None, p)[:, :: s[0], :: s[1]],
    "patches": lowering._patches_conv,
    "sliced": lambda x, k, s, p: lowering._sliced_conv(x, k, s, p, 2),  # two images, of five
}


def close(a, b, name=""):
    check = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10, err_msg=name)
    jax.tree.map(check, a, b)


def derivatives(f, *args):
    """Value and forward derivative, gradient and Hessian-vector product of sum(f²)."""

    def scalar(*a):
        return jnp.square(f(*a)).sum()

    tangents = [jnp.asarray(np.cos(np.arange(a.size)).reshape(a.shape), a.dtype) for a in args]
    grad = jax.grad(scalar, argnums=tuple(range(len(args))))

    @jax.jit
    def together(args, tangents):
        return *jax.jvp(f, args, tangents), *jax.jvp(grad, args, tangents)

    return together(args, tuple(tangents))


@pytest.mark.usefixtures("quick_compile")  # of float64: what the operations add up to
@pytest.mark.parametrize("shape", SHAPES)
def test_conv_equals_lax(shape, monkeypatch):
    k, s, p, c, o, h, w = shape
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(lowering, "_SLICE_BYTES", 3 * h * w * c * 8)  # three images a slice
    monkeypatch.setattr(lowering, "_PRODUCT_BYTES", 13 * (c + o) * 8)  # of 175 or 60 pixels
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = (
            jnp.array(rng.normal(size=(5, h, w, c))),
            jnp.array(rng.normal(size=(k, k, c, o))),
        )
        args = (s, s), ((p, p), (p, p))
        expected = derivatives(lambda x, k: lowering._lax_conv(x, k, *args), x, kernel)
        for name, conv in LOWERINGS.items():
            ours = derivatives(lambda x, k, conv=conv: conv(x, k, *args), x, kernel)
            close(ours, expected, name)
            assert ours[0].dtype == jnp.float64, name


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    ("images", "height", "width", "padding"),
    [
        (5, 7, 4, ((1, 1), (1, 1))),  # in three slices of two images
        (4, 5, 6, ((0, 0), (0, 0))),
        (2, 1, 5, ((2, 1), (0, 2))),
    ],
)
def test_winograd_equals_lax(images, height, width, padding):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.array(rng.normal(size=(images, height, width, 4)))
        kernel = jnp.array(rng.normal(size=(3, 3, 4, 6)))
        ours = derivatives(lambda x, k: lowering._winograd_conv(x, k, padding, 2), x, kernel)
        close(ours, derivatives(lambda x, k: lowering._lax_conv(x, k, (1, 1), padding), x, kernel))


def added_up(x, kernel):
    """The 3×3 convolution of padded x, one product after another in the arrays' precision."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((*x.shape[:3], kernel.shape[3]), x.dtype)
    for i, j, c in np.ndindex(kernel.shape[:3]):
        out += padded[:, i : i + x.shape[1], j : j + x.shape[2], c, None] * kernel[i, j, c]
    return out


def added_up_for_kernel(x, cotangent):
    """Its gradient of the kernel, the same way."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    grad = np.zeros((3, 3, x.shape[3], cotangent.shape[3]), x.dtype)
    for n, i, j in np.ndindex(x.shape[:3]):
        grad += padded[n, i : i + 3, j : j + 3, :, None] * cotangent[n, i, j]
    return grad


def test_winograd_in_float32_is_more_exact_than_the_plain_sum():
    """Root mean square errors of the outputs and both gradients, against float64."""
    rng = np.random.default_rng(0)
    shapes = [(4, 16, 16, 64), (3, 3, 64, 64), (4, 16, 16, 64)]
    x, kernel, cotangent = (rng.normal(size=shape) for shape in shapes)

    def summed(dtype):
        a, b, c = (v.astype(dtype) for v in (x, kernel, cotangent))
        turned = b[::-1, ::-1].swapaxes(2, 3)
        return added_up(a, b), added_up(c, turned), added_up_for_kernel(a, c)

    @jax.jit
    def winograd(x, kernel, cotangent):
        out, pullback = jax.vjp(
            functools.partial(lowering.conv, padding=((1, 1), (1, 1))), x, kernel
        )
        return out, *pullback(cotangent)

    ours = winograd(*(jnp.asarray(v, jnp.float32) for v in (x, kernel, cotangent)))
    for true, values, plain in zip(summed("float64"), ours, summed("float32"), strict=True):
        error, allowed = (
            np.square(np.asarray(v, np.float64) - true).mean() ** 0.5 for v in (values, plain)
        )
        assert 0 < error < allowed < 1e-3


def test_auto_chooses_by_shape(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def text(c, o, size, k, dtype="float32", **kwargs):
        x, kernel = jnp.zeros((64, size, size, c), dtype), jnp.zeros((k, k, c, o), dtype)
        return str(jax.make_jaxpr(lambda k: lowering.conv(x, k, **kwargs))(kernel))

    assert "conv_general_dilated" not in text(64, 256, 8, 1)
    assert "conv_general_dilated" not in text(3, 6, 32, 5)
    assert "conv_general_dilated" in text(3, 16, 32, 3)  # wide for its kernel
    assert "pad" not in text(64, 192, 4, 5, padding=((2, 2), (2, 2)))  # pixels
    same = {"padding": ((1, 1), (1, 1))}
    assert "pad" in text(64, 16, 4, 3, **same)  # patches
    assert "custom_jvp" in text(16, 64, 32, 3, **same)
    assert "custom_jvp" not in text(16, 64, 32, 3, impl="lax")
    assert "conv_general_dilated" not in text(64, 64, 32, 3, **same)  # Winograd's
    assert "custom_jvp" in text(64, 64, 32, 3, strides=(2, 2), **same)
    assert "custom_jvp" in text(64, 64, 32, 3, dtype="bfloat16", **same)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("impl", ["auto", "lax"])
@pytest.mark.parametrize("channels", [3, 64])  # in blocks, and not
def test_bias(channels, impl):
    with jax.enable_x64(True):
        x, kernel, bias = (
            normal(*shape, seed=i, dtype=np.float64)
            for i, shape in enumerate([(2, 14, 14, channels), (5, 5, channels, 16), (16,)])
        )

        def plain(x, kernel, bias):
            out = lowering._lax_conv(x, kernel, (1, 1), ((0, 0), (0, 0)))
            return out + bias[None, None, None]

        def ours(x, kernel, bias):
            return lowering.conv(x, kernel, bias, impl=impl)

        close(derivatives(ours, x, kernel, bias), derivatives(plain, x, kernel, bias))


@HLO
def test_a_pooled_convolution_is_never_laid_out_as_an_image():
    x, kernel, bias = jnp.ones((8, 32, 32, 3)), jnp.ones((5, 5, 3, 6)), jnp.ones(6)

    def program(window):
        def loss(kernel, bias):
            out = lowering.conv(x, kernel, bias)
            return jnp.square(layers.max_pool(out, window, window)).sum()

        return jax.jit(jax.grad(loss, (0, 1))).lower(kernel, bias).compile().as_text()

    image = re.compile(r"f32\[8,(28,28|14,2,14,2|14,2,14,1|14,1,14,2),6\]")
    assert not image.search(program(2))
    assert image.search(program(4))


@HLO
def test_the_gradient_of_a_1x1_kernel_lays_out_no_transposed_activation(monkeypatch):
    x, kernel = jnp.ones((64, 32, 32, 16)), jnp.ones((1, 1, 16, 64))
    transposed = re.compile(r"f32\[(16|64),65536\]")

    def program(devices):
        monkeypatch.setattr(jax, "device_count", lambda: devices)

        def loss(kernel):  # the cotangent is elementwise code, which XLA fuses into a transposition
            return jnp.tanh(lowering.conv(x, kernel)).sum()

        return jax.jit(jax.grad(loss)).lower(kernel).compile().as_text()

    assert not transposed.search(program(1))
    assert transposed.search(program(8))


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("groups", [2, 3, 12])  # one by one, and as XLA has them
def test_groups(groups):
    with jax.enable_x64(True):
        x = normal(2, 6, 7, 12, dtype=np.float64)
        kernel = normal(3, 3, 12 // groups, 24, seed=1, dtype=np.float64)
        bias = normal(24, seed=2, dtype=np.float64)
        how = {"strides": (2, 1), "padding": ((1, 0), (1, 1)), "groups": groups}
        values = [
            derivatives(functools.partial(lowering.conv, **how, impl=impl), x, kernel, bias)
            for impl in ("auto", "lax")
        ]
        close(*values)


@HLO
@pytest.mark.parametrize("channels", [16, 32])  # XLA's, and Winograd's
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_convolutions_in_a_loop_are_of_the_kind_that_is_fast_there(channels, stride, groups):
    x, kernel = jnp.ones((8, 16, 16, channels)), jnp.ones((3, 3, channels // groups, channels))
    how = {"strides": (stride, stride), "padding": ((1, 1), (1, 1)), "groups": groups}

    def program(impl):
        def loss(x, kernel):
            return jnp.square(lowering.conv(x, kernel, **how, impl=impl)).sum()

        def descend(i, carry):
            return jax.tree.map(lambda a, b: a - b, carry, jax.grad(loss, (0, 1))(*carry))

        loop = jax.jit(lambda count: jax.lax.fori_loop(0, count, descend, (x, kernel)))
        return set(re.findall(r"dim_labels=([^, ]+)", loop.lower(3).compile().as_text()))

    assert program("auto") <= {"b01f_01io->b01f"}
    assert len(program("lax")) > 1, "what this is about"


def test_unknown_impl():
    with pytest.raises(ValueError, match='Fix: use "auto" or "lax"'):
        lowering.conv(jnp.zeros((1, 4, 4, 1)), jnp.zeros((1, 1, 1, 1)), impl="fast")


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("one_pass", [False, True])
def test_normalize_equals_autodiff(one_pass):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.array(rng.normal(3, 2, size=(4, 3, 3, 5)))
        scale, bias = jnp.array(rng.normal(size=5)), jnp.array(rng.normal(size=5))
        near = jnp.array(rng.normal(2, 2, size=5)) if one_pass else None
        for pick in range(3):  # output, mean, variance

            def ours(x, s, b, pick=pick):
                return layers._closed_form_jit(x, s, b, near, 1e-5)[pick]

            def plain(x, s, b, pick=pick):
                return layers._normalize(x, s, b, None, 1e-5)[pick]

            close(derivatives(ours, x, scale, bias), derivatives(plain, x, scale, bias))


@pytest.fixture(params=["cpu", "gpu"])
def form(request, monkeypatch):
    """The form that a platform gets, here computed on CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)


@pytest.mark.parametrize("impl", ["auto", "lax"])
def test_batch_norm_equals_flax(impl, form):
    x = 5 + 2 * normal(8, 4, 4, 6)
    ours = layers.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-3, impl=impl)
    flax = nn.BatchNorm(
        use_running_average=False, momentum=0.9, epsilon=1e-3, use_fast_variance=False
    )
    variables = flax.init(jax.random.key(0), x)
    assert jax.tree.structure(variables) == jax.tree.structure(ours.init(jax.random.key(0), x))
    a, stats_a = ours.apply(variables, x, mutable=["batch_stats"])
    b, stats_b = flax.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-5), stats_a, stats_b)
    ours, flax = ours.clone(use_running_average=True), flax.clone(use_running_average=True)
    variables = {**variables, **stats_a}
    np.testing.assert_allclose(ours.apply(variables, x), flax.apply(variables, x), atol=1e-5)


def test_batch_norm_of_large_mean_is_accurate(form):
    x = 1000 + normal(64, 8, 8, 2)
    norm = layers.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)
    if jax.default_backend() == "gpu":  # about the average of earlier batches
        variables["batch_stats"]["mean"] = jnp.full(2, 999.0)
    y, stats = norm.apply(variables, x, mutable=["batch_stats"])
    assert abs(float(y.std()) - 1) < 1e-3
    expected = 0.9 + 0.1 * np.asarray(x, np.float64).var((0, 1, 2))
    np.testing.assert_allclose(stats["batch_stats"]["var"], expected, rtol=1e-5)


def test_batch_norm_in_bfloat16_keeps_float32_statistics(form):
    x = normal(256, 16, 16, 2, dtype=jnp.bfloat16)
    norm = layers.BatchNorm(use_running_average=False, momentum=0.0, dtype=jnp.bfloat16)
    y, stats = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64).var((0, 1, 2))
    np.testing.assert_allclose(stats["batch_stats"]["var"], expected, rtol=1e-5)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize(("window", "stride", "pad"), [(2, 2, 0), (3, 3, 0), (3, 2, 1), (3, 2, 0)])
def test_max_pool_equals_flax(size, window, stride, pad, form):
    x = np.asarray(normal(2, size, size, 3)) - 10
    padding = ((pad, pad), (pad, pad))

    def plain(x):
        return nn.max_pool(x, (window, window), (stride, stride), padding)

    def ours(x):
        return layers.max_pool(x, window, stride, padding)

    @jax.jit
    def both(x):
        def weighted(x, f):
            return (f(x) * weights(f(x))).sum()

        return [(f(x), jax.grad(weighted)(x, f)) for f in (ours, plain)]

    for values in (x, np.round(x), np.maximum(x + 10, 0)):  # many equal values in a window
        (y, grad), (expected, expected_grad) = both(values)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_allclose(grad, expected_grad, atol=1e-6)


def weights(x):
    """Different for every output, so that a gradient sent elsewhere shows."""
    return np.random.default_rng(9).normal(size=x.shape).astype(np.float32)


def test_max_pool_keeps_nan(form):
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2, 0].set(jnp.nan)
    y = layers.max_pool(x, 2, 2)[0, :, :, 0]
    assert np.isnan(y).tolist() == [[False, True], [False, False]]


def test_conv_module_has_the_variables_of_flax():
    x = normal(2, 8, 8, 3)
    ours = layers.Conv(4, (3, 3), (2, 2), ((1, 1), (1, 1)))
    flax = nn.Conv(4, (3, 3), (2, 2), ((1, 1), (1, 1)))
    variables = ours.init(jax.random.key(1), x)
    variables["params"]["bias"] = jnp.arange(4.0)
    np.testing.assert_allclose(
        ours.apply(variables, x), flax.apply(variables, x), rtol=1e-5, atol=1e-5
    )


def test_a_kernel_that_is_there_is_only_checked():
    x, conv = jnp.ones((1, 4, 4, 3)), layers.Conv(4, (3, 3))
    variables = conv.init(jax.random.key(1), x)
    _, made = conv.apply({}, x, mutable=True, rngs={"params": jax.random.key(1)})
    assert (made["params"]["kernel"] == variables["params"]["kernel"]).all()
    assert made["params"]["kernel"].std() > 0.1
    untraced = layers.Conv(4, (3, 3), kernel_init=lambda *_: pytest.fail("initialiser traced"))
    assert (untraced.apply(variables, x) == conv.apply(variables, x)).all()
    with pytest.raises(flax.errors.ScopeParamShapeError, match="kernel"):
        layers.Conv(5, (3, 3)).apply(variables, x)


def test_layers_of_a_shape_are_closed_form_jit():
    model = create_model("resnet18", 10)
    x = jnp.zeros((4, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(variables):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

    text = jax.jit(jax.grad(loss)).lower(variables).as_text()
    assert len(re.findall(r"call @_normalize", text)) == 2 * 20  # of 20 layers, with derivatives
    assert len(re.findall(r"func private @_normalize", text)) <= 2 * 4  # of four shapes


def test_residual_relu_is_relu():
    x = jnp.array([-1.0, -0.0, 0.0, 2.0, jnp.inf, -jnp.inf, jnp.nan])
    got, back = jax.vjp(residual_relu, x)
    want, want_back = jax.vjp(nn.relu, x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(back(jnp.ones(7))[0], want_back(jnp.ones(7))[0])


@HLO
def test_a_residual_block_computes_none_before_it_again():
    def lines(blocks):
        model = ResNet("basic", (blocks, 1), num_classes=10)
        images = jnp.zeros((2, 8, 8, 3))
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
        return jax.jit(model.apply).lower(variables, images).compile().as_text().count("\n")

    two, three, four = map(lines, (2, 3, 4))
    assert four - three == three - two
