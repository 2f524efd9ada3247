"""Parameter counts, shapes and behaviour of every registered network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from classic_cnns.errors import ConfigError
from classic_cnns.models import ALIASES, MODELS, create_model, lenet, list_models
from classic_cnns.models.layers import conv
from classic_cnns.models.macs import count_macs

# name: (classes, input, parameters, BatchNorm statistics, tensors). LeNet-5: the paper's section
# II.B, and 5·5·6+6 + 5·5·6·16+16 + 400·120+120 + 120·84+84 + 84·10+10. ResNet-18…152: torchvision's
# metadata. 10, 14, 16, 26: counted from the block sizes.
GOLDEN = {
    "lenet5": (10, (32, 32, 1), 61_706, 0, 10),
    "lenet5_1998": (10, (32, 32, 1), 60_000, 0, 12),
    "resnet10": (1000, (224, 224, 3), 5_418_792, 5_760, 38),
    "resnet14": (1000, (224, 224, 3), 5_788_200, 6_528, 50),
    "resnet16": (1000, (224, 224, 3), 6_968_872, 7_552, 56),
    "resnet18": (1000, (224, 224, 3), 11_689_512, 9_600, 62),
    "resnet26": (1000, (224, 224, 3), 17_960_232, 13_440, 86),
    "resnet34": (1000, (224, 224, 3), 21_797_672, 17_024, 110),
    "resnet50": (1000, (224, 224, 3), 25_557_032, 53_120, 161),
    "resnet101": (1000, (224, 224, 3), 44_549_160, 105_344, 314),
    "resnet152": (1000, (224, 224, 3), 60_192_808, 151_424, 467),
}
CIFAR = {
    "resnet18": (11_173_962, 11_220_132),
    "resnet34": (21_282_122, 21_328_292),
    "resnet50": (23_520_842, 23_705_252),
    "resnet101": (42_512_970, 42_697_380),
    "resnet152": (58_156_618, 58_341_028),
}
GMACS = {  # torchvision's metadata; bottlenecks stride on the 3×3
    "resnet18": 1.814,
    "resnet34": 3.664,
    "resnet50": 4.089,
    "resnet101": 7.801,
    "resnet152": 11.514,
}


def abstract(model, shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_every_model_has_a_golden():
    assert set(GOLDEN) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count(name):
    classes, shape, params, stats, tensors = GOLDEN[name]
    variables = abstract(create_model(name, classes), shape)
    assert size(variables["params"]) == params
    assert size(variables.get("batch_stats", {})) == stats
    assert len(jax.tree.leaves(variables["params"])) == tensors


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_parameter_count(name):
    for classes, params in zip((10, 100), CIFAR[name], strict=True):
        variables = abstract(create_model(name, classes), (32, 32, 3))
        assert size(variables["params"]) == params


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds(name):
    assert round(count_macs(create_model(name), (224, 224, 3)) / 1e9, 3) == GMACS[name]


def test_multiply_adds_of_grouped_and_plain_layers():
    # By hand: 28·28·25·6 + 10·10·150·16 + 400·120 + 120·84 + 84·10.
    assert count_macs(create_model("lenet5", 10), (32, 32, 1)) == 416_520


def outputs(model, variables, shape):
    def run(variables):
        x = jnp.zeros((1, *shape))
        _, kept = model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
        return kept["intermediates"]

    kept = jax.eval_shape(run, variables)
    return {
        name: value["__call__"][0].shape[1:] for name, value in kept.items() if "__call__" in value
    }


@pytest.mark.parametrize(
    ("name", "size", "stem", "stages"),
    [
        ("resnet34", 224, 112, [(56, 64), (28, 128), (14, 256), (7, 512)]),
        ("resnet50", 224, 112, [(56, 256), (28, 512), (14, 1024), (7, 2048)]),
        ("resnet18", 32, 32, [(32, 64), (16, 128), (8, 256), (4, 512)]),
        ("resnet50", 33, 33, [(33, 256), (17, 512), (9, 1024), (5, 2048)]),
    ],
)
def test_resnet_shapes(name, size, stem, stages):
    model = create_model(name, 10)
    shapes = outputs(model, abstract(model, (size, size, 3)), (size, size, 3))
    assert shapes["conv_init"] == (stem, stem, 64)
    for i, (side, channels) in enumerate(stages):
        last = max(int(n.split("block")[1]) for n in shapes if n.startswith(f"stage{i + 1}_block"))
        assert last == model.stage_sizes[i]
        for j in range(last):
            assert shapes[f"stage{i + 1}_block{j + 1}"] == (side, side, channels)
    assert shapes["head"] == (10,)


def test_resnet_projections_are_where_the_paper_has_them():
    def projected(name):
        params = abstract(create_model(name, 10), (64, 64, 3))["params"]
        return [block for block in params if "conv_proj" in params[block]]

    assert projected("resnet34") == ["stage2_block1", "stage3_block1", "stage4_block1"]
    assert projected("resnet50") == [f"stage{i}_block1" for i in (1, 2, 3, 4)]


def test_resnet_blocks_start_as_identity():
    model = create_model("resnet10", 10, stem="cifar")
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = model.init(jax.random.key(1), x)
    _, kept = model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
    kept = kept["intermediates"]
    np.testing.assert_allclose(
        kept["stage1_block1"]["__call__"][0], jax.nn.relu(kept["bn_init"]["__call__"][0]), atol=1e-6
    )


def test_resnet_stem_follows_size_then_weights():
    model = create_model("resnet10", 10)
    small, large = jnp.zeros((1, 48, 48, 3)), jnp.zeros((1, 64, 64, 3))
    assert model.stem_for(48) == "cifar"
    assert model.stem_for(64) == "imagenet"
    variables = jax.jit(model.init)(jax.random.key(0), small)
    assert variables["params"]["conv_init"]["kernel"].shape == (3, 3, 3, 64)
    assert outputs(model, variables, large.shape[1:])["stage1_block1"] == (64, 64, 64)


def test_bottleneck_stride_changes_the_function_not_the_parameters():
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 3))
    models = [
        create_model("resnet50", 10, bottleneck_stride=s, zero_init_last=False)
        for s in ("3x3", "1x1")
    ]
    variables = jax.jit(models[0].init)(jax.random.key(1), x)
    assert jax.tree.structure(variables) == jax.tree.structure(abstract(models[1], (16, 16, 3)))
    a, b = (jax.jit(m.apply)(variables, x) for m in models)
    assert not np.allclose(a, b, rtol=1e-2)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["lenet5", "lenet5_1998", "resnet10"])
def test_any_channels_and_classes(name, channels):
    model = create_model(name, 7)
    x = jax.random.normal(jax.random.key(0), (2, 28, 28, channels))
    logits = model.apply(model.init(jax.random.key(1), x), x)
    assert logits.shape == (2, 7)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", ["lenet5", "lenet5_1998", "resnet10", "resnet50"])
def test_every_parameter_has_a_finite_gradient(name):
    model = create_model(name, 5)
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)

    @jax.jit
    def grads(params):
        def loss(params):
            out, _ = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.square(out).mean()

        return jax.grad(loss)(params)

    for path, grad in jax.tree_util.tree_flatten_with_path(grads(variables["params"]))[0]:
        assert np.isfinite(grad).all(), path


def test_bfloat16_computes_and_float32_returns():
    model = create_model("resnet10", 10, dtype=jnp.bfloat16)
    x = jnp.ones((1, 32, 32, 3))
    variables = abstract(model, (32, 32, 3))
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(model.apply, variables, x).dtype == jnp.float32
    assert "bf16" in str(jax.make_jaxpr(model.apply)(variables, x))


def test_lenet_28_and_32_share_parameters():
    model = create_model("lenet5", 10)
    a, b = (abstract(model, (s, s, 1)) for s in (28, 32))
    assert jax.tree.map(lambda p: p.shape, a) == jax.tree.map(lambda p: p.shape, b)


def test_c3_is_the_masked_convolution_of_table_1():
    assert sum(len(inputs) for inputs in lenet.C3_TABLE) * 25 + 16 == 1_516
    layer = lenet.TableConv()
    x = jax.random.normal(jax.random.key(0), (2, 14, 14, 6))
    variables = layer.init(jax.random.key(1), x)
    weights, dense, k = variables["params"]["kernel"], np.zeros((5, 5, 6, 16), np.float32), 0
    for o, inputs in enumerate(lenet.C3_TABLE):
        for i in inputs:
            dense[:, :, i, o] = weights[:, :, k]
            k += 1
    np.testing.assert_allclose(layer.apply(variables, x), conv(x, jnp.array(dense)), atol=1e-4)


def test_published_lenet_parts():
    params = abstract(create_model("lenet5_1998", 10), (32, 32, 1))["params"]
    sizes = {"c1": 156, "s2": 12, "c3": 1_516, "s4": 32, "c5": 48_120, "f6": 10_164}
    assert {name: size(part) for name, part in params.items()} == sizes
    codes = lenet.output_codes(10)
    assert set(np.unique(codes)) == {-1.0, 1.0}
    assert len(np.unique(codes, axis=0)) == 10
    np.testing.assert_allclose(lenet.squash(jnp.array([1.0, -1.0])), [1, -1], atol=1e-4)


def test_names_aliases_and_errors():
    assert list_models("resnet1*") == [
        "resnet10",
        "resnet14",
        "resnet16",
        "resnet18",
        "resnet101",
        "resnet152",
    ]
    assert create_model("Res18", 10) == create_model("resnet18", 10)
    assert set(ALIASES.values()) <= set(MODELS)
    with pytest.raises(
        ConfigError, match=r'unknown model "resnet35". Fix: did you mean "resnet50" or "resnet34"'
    ):
        create_model("resnet35")
    with pytest.raises(ConfigError, match=r'no field "stm" \(did you mean "stem"'):
        create_model("resnet18", stm="cifar")
    with pytest.raises(ConfigError, match="num_classes is 0"):
        create_model("lenet5", 0)


def test_names_of_variables_are_stable():
    params = abstract(create_model("resnet50", 10), (32, 32, 3))["params"]
    block = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "conv_proj", "bn_proj"}
    assert set(params["stage2_block1"]) == block
    assert set(params) - {n for n in params if "_block" in n} == {"conv_init", "bn_init", "head"}
