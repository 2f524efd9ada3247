"""Parameter counts, shapes and behaviour of every registered network."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from seeded import normal, seeded_variables

from classic_cnns.errors import ConfigError
from classic_cnns.models import ALIASES, MODELS, create_model, layers, lenet, list_models
from classic_cnns.models.features import list_layers
from classic_cnns.models.lowering import conv
from classic_cnns.models.macs import count_macs
from classic_cnns.models.resnet import ResNet
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import train_step
from classic_cnns.train_state import create_train_state

pytestmark = pytest.mark.usefixtures("quick_compile")

# name: (classes, input, parameters, BatchNorm statistics, tensors). LeNet-5: the paper's section
# II.B, and 5·5·6+6 + 5·5·6·16+16 + 400·120+120 + 120·84+84 + 84·10+10. ResNet-18…152: torchvision's
# metadata. 10, 14, 16, 26: counted from the block sizes.
GOLDEN = {
    "lenet5": (10, (32, 32, 1), 61_706, 0, 10),
    "lenet5_1998": (10, (32, 32, 1), 60_000, 0, 12),
    "alexnet": (1000, (224, 224, 3), 61_100_840, 0, 16),
    "alexnet2012": (1000, (224, 224, 3), 60_965_224, 0, 16),
    "vgg11": (1000, (224, 224, 3), 132_863_336, 0, 22),
    "vgg13": (1000, (224, 224, 3), 133_047_848, 0, 26),
    "vgg16": (1000, (224, 224, 3), 138_357_544, 0, 32),
    "vgg19": (1000, (224, 224, 3), 143_667_240, 0, 38),
    "vgg11_bn": (1000, (224, 224, 3), 132_868_840, 5_504, 38),
    "vgg13_bn": (1000, (224, 224, 3), 133_053_736, 5_888, 46),
    "vgg16_bn": (1000, (224, 224, 3), 138_365_992, 8_448, 58),
    "vgg19_bn": (1000, (224, 224, 3), 143_678_248, 11_008, 70),
    "googlenet": (1000, (224, 224, 3), 13_385_816, 15_072, 187),
    "googlenet2014": (1000, (224, 224, 3), 13_378_280, 0, 128),
    "resnet20_cifar": (10, (32, 32, 3), 269_722, 1_376, 59),
    "resnet32_cifar": (10, (32, 32, 3), 464_154, 2_272, 95),
    "resnet44_cifar": (10, (32, 32, 3), 658_586, 3_168, 131),
    "resnet56_cifar": (10, (32, 32, 3), 853_018, 4_064, 167),
    "resnet110_cifar": (10, (32, 32, 3), 1_727_962, 8_096, 329),
    "airbench94": (10, (32, 32, 3), 1_972_792, 2_304, 21),
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
VARIANTS = [  # name, fields, side, classes, parameters, BatchNorm statistics
    ("googlenet", {"aux": False}, 224, 1000, 7_005_832, 14_560),
    ("googlenet", {"arch": "torchvision", "aux": False}, 224, 1000, 6_624_904, 14_560),
    ("googlenet", {"arch": "torchvision"}, 224, 1000, 13_004_888, 15_072),
    ("googlenet2014", {"aux": False}, 224, 1000, 6_998_552, 0),
    ("alexnet", {}, 32, 10, 2_472_266, 0),
    ("vgg16_bn", {}, 32, 10, 14_728_266, 8_448),
    ("vgg19_bn", {}, 32, 10, 20_040_522, 11_008),
    ("vgg16_bn", {"head": "mlp"}, 32, 10, 33_646_666, 8_448),
    ("vgg16_bn", {"head": "mlp"}, 32, 100, 34_015_396, 8_448),
    ("resnet20_cifar", {"shortcut": "B"}, 32, 10, 272_474, 1_568),
    ("resnet110_cifar", {"shortcut": "B"}, 32, 10, 1_730_714, 8_288),
]
GMACS = {  # torchvision's metadata; bottlenecks stride on the 3×3
    "alexnet": 0.714,
    "vgg11": 7.609,
    "vgg13_bn": 11.308,
    "vgg16": 15.470,
    "vgg19": 19.632,
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


@pytest.mark.parametrize(("name", "fields", "side", "classes", "params", "stats"), VARIANTS)
def test_parameter_count_of_variants(name, fields, side, classes, params, stats):
    variables = abstract(create_model(name, classes, **fields), (side, side, 3))
    assert size(variables["params"]) == params
    assert size(variables.get("batch_stats", {})) == stats
    assert set(variables) <= {"params", "batch_stats"}


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
    model = ResNet("basic", (1,), 10)
    x = normal(2, 8, 8, 3)
    variables = jax.jit(model.init)(jax.random.key(1), x)
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, kept = jax.jit(functools.partial(model.apply, **capture))(variables, x)
    kept = kept["intermediates"]
    np.testing.assert_allclose(
        kept["stage1_block1"]["__call__"][0], jax.nn.relu(kept["bn_init"]["__call__"][0]), atol=1e-6
    )


def test_resnet_stem_follows_size_then_weights():
    model = create_model("resnet10", 10)
    assert model.stem_for(48) == "cifar"
    assert model.stem_for(64) == "imagenet"
    variables = abstract(model, (48, 48, 3))
    assert variables["params"]["conv_init"]["kernel"].shape == (3, 3, 3, 64)
    assert outputs(model, variables, (64, 64, 3))["stage1_block1"] == (64, 64, 64)


def test_bottleneck_stride_changes_the_function_not_the_parameters():
    x = normal(1, 16, 16, 3)
    models = [
        ResNet("bottleneck", (1, 1), 10, bottleneck_stride=s, zero_init_last=False)
        for s in ("3x3", "1x1")
    ]
    variables = seeded_variables(models[0], 16)
    assert jax.tree.structure(variables) == jax.tree.structure(abstract(models[1], (16, 16, 3)))
    a, b = (jax.jit(m.apply)(variables, x) for m in models)
    assert not np.allclose(a, b, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "fields", "channels"),
    [
        ("lenet5", {}, 1),
        ("lenet5", {}, 4),
        ("lenet5_1998", {}, 4),
        ("resnet10", {"stage_sizes": (1,)}, 1),
    ],
)
def test_any_channels_and_classes(name, fields, channels):
    model = create_model(name, 7, **fields)
    x = normal(2, 28, 28, channels)
    logits = jax.jit(model.apply)(seeded_variables(model, 28, channels), x)
    assert logits.shape == (2, 7)
    assert np.isfinite(logits).all()


SMALL = [
    *("lenet5", "lenet5_1998", "alexnet", "vgg11", "resnet10"),
    functools.partial(ResNet, "bottleneck", (1, 1, 1, 1)),
    pytest.param("googlenet", marks=pytest.mark.slow),
    pytest.param("resnet50", marks=pytest.mark.slow),
    pytest.param("vgg19_bn", marks=pytest.mark.slow),
    pytest.param("googlenet2014", marks=pytest.mark.slow),
    pytest.param("resnet152", marks=pytest.mark.slow),
    pytest.param("resnet110_cifar", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", SMALL, ids=lambda name: getattr(name, "args", [name])[0])
def test_every_parameter_has_a_finite_gradient(name):
    """Through the training step's loss, auxiliary classifiers included."""
    model = create_model(name, 5) if isinstance(name, str) else name(num_classes=5)
    tx = optax.sgd(1.0)
    given = flatten_dict(seeded_variables(model, 32))  # sooner there than fresh ones
    state = create_train_state(model, tx, (32, 32, 3), seed=0, mesh=create_mesh(1), given=given)
    before = jax.device_get(state.params)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    batch = {"image": jnp.asarray(images), "label": jnp.arange(4)}
    step = functools.partial(train_step, model=model, tx=tx, mean=(0.5,) * 3, std=(0.25,) * 3)
    state, out = jax.jit(step)(state, batch)
    assert bool(out["finite"])
    for path, after in jax.tree_util.tree_flatten_with_path(state.params)[0]:
        assert np.isfinite(after).all(), path
    heads = [name for name in before if name.startswith("aux")]
    assert heads == (["aux1", "aux2"] if "googlenet" in str(name) else [])
    for head in heads:  # they learn
        assert not np.array_equal(before[head]["fc2"]["bias"], state.params[head]["fc2"]["bias"])


def test_auxiliary_classifiers_run_in_training_alone():
    model = create_model("googlenet", 5)
    x = jnp.zeros((1, 32, 32, 3))
    variables = abstract(model, (32, 32, 3))

    def collections(train):
        def run(variables):
            rngs = {"dropout": jax.random.key(0)}
            return model.apply(
                variables, x, train=train, mutable=["aux_logits", "batch_stats"], rngs=rngs
            )[1]

        return jax.eval_shape(run, variables).get("aux_logits", {})

    assert {k: v[0].shape for k, v in collections(True).items()} == {
        "aux1_logits": (1, 5),
        "aux2_logits": (1, 5),
    }
    assert collections(False) == {}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vgg11_bn", {}),
        ("resnet10", {"stage_sizes": (1, 1)}),
        *(
            pytest.param(n, {}, marks=pytest.mark.slow)
            for n in ("resnet20_cifar", "googlenet", "resnet50")
        ),
    ],
)
def test_remat_changes_no_value(name, fields):
    x = normal(2, 32, 32, 3)
    plain, remat = (create_model(name, 5, remat=r, **fields) for r in ("none", "block"))
    variables = seeded_variables(plain, 32)
    assert jax.tree.structure(variables) == jax.tree.structure(abstract(remat, (32, 32, 3)))

    def loss(model, params):
        rngs = {"dropout": jax.random.key(2)}
        variables_ = {**variables, "params": params}
        return model.apply(variables_, x, train=True, mutable=["batch_stats"], rngs=rngs)[0].sum()

    values = [jax.jit(functools.partial(loss, m))(variables["params"]) for m in (plain, remat)]
    np.testing.assert_allclose(*values, rtol=1e-4)
    text = str(jax.make_jaxpr(jax.grad(functools.partial(loss, remat)))(variables["params"]))
    assert "checkpoint" in text or "remat" in text


@pytest.mark.parametrize(
    ("name", "layer", "fan_in", "fan_out", "paper"),
    [
        ("alexnet", "conv2", 64 * 25, 192 * 25, 0.01),
        ("vgg11", "conv2_1", 64 * 9, 128 * 9, 0.01),
        ("resnet18", "stage2_block1/conv1", 64 * 9, 128 * 9, (2 / (64 * 9)) ** 0.5),
        ("resnet20_cifar", "stage2_block1/conv1", 16 * 9, 32 * 9, (2 / (16 * 9)) ** 0.5),
        ("googlenet", "inception3a/b2/conv", 96 * 9, 128 * 9, (2 / (224 * 9)) ** 0.5),
    ],
)
def test_init_schemes_have_the_spread_they_name(name, layer, fan_in, fan_out, paper):
    torchvision = {"alexnet": (1 / 3 / fan_in) ** 0.5, "googlenet": 0.01}
    spread = {
        "paper": paper,
        "torchvision": torchvision.get(name, (2 / fan_out) ** 0.5),
        "keras": (2 / (fan_in + fan_out)) ** 0.5,
    }
    for init, expected in spread.items():
        model = create_model(name, 10, init=init)

        @jax.jit
        def kernel(key, model=model):  # the rest of the network is not computed
            tree = model.init(key, jnp.zeros((1, 32, 32, 3)))["params"]
            for part in layer.split("/"):
                tree = tree[part]
            return tree["kernel"]

        assert abs(float(kernel(jax.random.key(0)).std()) / expected - 1) < 0.03, init


def test_max_pool_ceil_mode_is_pytorchs():
    # By hand: 3×3 windows of stride 2 over 5 → 2, 6 → 3, 7 → 3; 2×2 over 5 → 3, over 1 → 1.
    for size, window, out in ((5, 3, 2), (6, 3, 3), (7, 3, 3), (5, 2, 3), (1, 2, 1), (4, 2, 2)):
        x = jnp.arange(size, dtype=jnp.float32).reshape(1, size, 1, 1) * jnp.ones((1, 1, size, 1))
        pool = functools.partial(layers.max_pool, window=window, stride=2, ceil_mode=True)
        y = jax.jit(pool)(x)
        assert y.shape == (1, out, out, 1)
        assert float(y[0, -1, -1, 0]) == size - 1


@pytest.mark.parametrize("size", [1, 3, 5, 7, 14])
def test_adaptive_pooling_by_the_rule(size):
    x = np.asarray(normal(2, size, size + 1, 3))
    y = jax.jit(functools.partial(layers.adaptive_avg_pool, size=4))(x)
    for i in range(4):
        for j in range(4):
            rows = slice(i * size // 4, -(-(i + 1) * size // 4))
            cols = slice(j * (size + 1) // 4, -(-(j + 1) * (size + 1) // 4))
            np.testing.assert_allclose(y[:, i, j], x[:, rows, cols].mean((1, 2)), atol=1e-5)


def test_local_response_norm_by_hand():
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    y = layers.local_response_norm(x, size=3, alpha=0.1, beta=0.75, k=2.0)
    sums = np.array([1 + 4, 1 + 4 + 9, 4 + 9 + 16, 9 + 16])
    np.testing.assert_allclose(y.ravel(), np.arange(1, 5) / (2 + 0.1 * sums) ** 0.75, rtol=1e-6)


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
    x = normal(2, 14, 14, 6)
    variables = seeded_variables(layer, 14, 6)
    weights, dense, k = variables["params"]["kernel"], np.zeros((5, 5, 6, 16), np.float32), 0
    for o, inputs in enumerate(lenet.C3_TABLE):
        for i in inputs:
            dense[:, :, i, o] = weights[:, :, k]
            k += 1
    expected = jax.jit(conv)(x, dense, variables["params"]["bias"])
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, atol=1e-4)


def test_published_lenet_parts():
    params = abstract(create_model("lenet5_1998", 10), (32, 32, 1))["params"]
    sizes = {"c1": 156, "s2": 12, "c3": 1_516, "s4": 32, "c5": 48_120, "f6": 10_164}
    assert {name: size(part) for name, part in params.items()} == sizes
    codes = lenet.output_codes(10)
    assert set(np.unique(codes)) == {-1.0, 1.0}
    assert len(np.unique(codes, axis=0)) == 10
    np.testing.assert_allclose(lenet.squash(jnp.array([1.0, -1.0])), [1, -1], atol=1e-4)


def test_names_aliases_and_errors():
    assert [n for n in list_models("resnet1*") if "cifar" not in n] == [
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
    for sizes in (3, "abc", (), (1, -1), (0,), (1, 1.5)):
        with pytest.raises(ConfigError, match=r"stage_sizes is .* Fix: the blocks of each stage"):
            create_model("resnet18", stage_sizes=sizes)
    with pytest.raises(ConfigError, match="num_classes is 0"):
        create_model("lenet5", 0)
    for name, field, wrong, near in (
        ("resnet10", "stem", "imagenett", "imagenet"),
        ("resnet50", "bottleneck_stride", "1X1", "1x1"),
        ("vgg11", "head", "imagnet", "imagenet"),
        ("googlenet", "arch", "torchvison", "torchvision"),
        ("resnet18", "weight_init", "papr", "paper"),
    ):
        with pytest.raises(ConfigError, match=f'{field}="{wrong}".*did you mean "{near}"'):
            create_model(name, **{field: wrong})


@pytest.mark.parametrize("name", MODELS)
def test_the_smallest_image_is_not_too_small(name):
    """For the stem of photos, too, whose last pooling needs more than one row."""
    for stem in ("imagenet", "cifar"):
        fields = {"stem": stem} if hasattr(create_model(name), "stem") else {}
        model = create_model(name, 3, impl="lax", **fields)
        side = model.min_size()
        x = jnp.ones((1, side, side, 3))
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        sizes = [layer.output for layer in list_layers(model, (side, side, 3))]
        assert all(all(size) for size in sizes), (stem, sizes)
        assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))


def test_parameters_are_float32_though_the_rest_is_double():
    with jax.enable_x64(True):
        for name in ("resnet10", "lenet5_1998", "vgg11_bn"):
            x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
            variables = jax.eval_shape(create_model(name, 10).init, jax.random.key(0), x)
            assert {p.dtype for p in jax.tree.leaves(variables)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", MODELS)
def test_every_field_can_be_given(name):
    model = create_model(name)
    fields = model.__dataclass_fields__.keys() - {"parent", "name"}
    given = json.loads(json.dumps({f: getattr(model, f) for f in fields - {"dtype"}}))
    again = create_model(name, **given)
    assert again == model
    assert hash(again) == hash(model)


def test_names_of_variables_are_stable():
    params = abstract(create_model("resnet50", 10), (32, 32, 3))["params"]
    block = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "conv_proj", "bn_proj"}
    assert set(params["stage2_block1"]) == block
    assert set(params) - {n for n in params if "_block" in n} == {"conv_init", "bn_init", "head"}
