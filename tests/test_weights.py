"""Weight files: what they hold comes in and goes out to the bit.

Files of the formats are made here by hand, byte by byte, so that no other library is needed.
"""

import dataclasses
import functools
import json
import os
from collections import OrderedDict
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from seeded import normal, seeded_variables
from torch_files import Tensor, write_legacy, write_zip

import classic_cnns
from classic_cnns import cli
from classic_cnns.data.preprocess import Preprocess
from classic_cnns.errors import ConfigError, DataError, WorkdirError
from classic_cnns.loading import LoadedRun
from classic_cnns.models import create_model, lowering
from classic_cnns.models.resnet import ResNet
from classic_cnns.weights import export_weights, load_weights, save_bundle
from classic_cnns.weights.convert import detect, from_theirs, to_theirs, unwrap
from classic_cnns.weights.dialects import dialect, dialects
from classic_cnns.weights.files import read_about, read_weights
from classic_cnns.weights.preprocessing import PREPROCESSING
from classic_cnns.weights.torch_file import read_torch

pytestmark = pytest.mark.usefixtures("quick_compile")

REAL = Path(__file__).parents[2] / "shared" / "data" / "weights"


NUMBERS = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_tensors_views_and_shared_storages(write, tmp_path):
    value = OrderedDict(
        whole=Tensor("0", 24, (2, 3, 4)),
        part=Tensor("0", 24, (3, 4), offset=12),
        turned=Tensor("0", 24, (4, 3, 2), (1, 4, 12)),
        scalar=Tensor("0", 24, (), offset=5),
        empty=Tensor("0", 24, (0, 3)),
        plain=[1, 2.5, "text", None, True, (1, 2)],
    )
    out = read_torch(write(tmp_path / "x.pt", value, {"0": NUMBERS.tobytes()}))
    whole = NUMBERS.reshape(2, 3, 4)
    np.testing.assert_array_equal(out["whole"], whole)
    np.testing.assert_array_equal(out["part"], whole[1])
    np.testing.assert_array_equal(out["turned"], whole.transpose(2, 1, 0))
    assert out["scalar"] == 5.0
    assert out["empty"].shape == (0, 3)
    assert out["plain"] == [1, 2.5, "text", None, True, (1, 2)]


def test_other_types(tmp_path):
    half = NUMBERS.astype(np.float16)
    bfloat = (NUMBERS.view(np.uint32) >> 16).astype(np.uint16)
    value = {
        "h": Tensor("0", 24, (24,), kind="Half"),
        "b": Tensor("1", 24, (24,), kind="BFloat16"),
        "i": Tensor("2", 2, (2,), kind="Long"),
    }
    storages = {"0": half.tobytes(), "1": bfloat.tobytes(), "2": np.int64([7, -1]).tobytes()}
    out = read_torch(write_zip(tmp_path / "x.pt", value, storages))
    np.testing.assert_array_equal(out["h"], half)
    np.testing.assert_array_equal(out["b"].astype(np.float32), NUMBERS)
    assert out["i"].tolist() == [7, -1]


# ---- names


MODELS = [
    ("resnet18", {"stem": "imagenet"}),
    ("resnet50", {"stem": "imagenet"}),
    ("resnet20_cifar", {}),
    pytest.param("vgg16", {"head": "imagenet"}, marks=pytest.mark.slow),  # half a gigabyte
    ("vgg11_bn", {"head": "cifar"}),
    ("alexnet", {}),
    ("googlenet", {"arch": "torchvision", "stem": "imagenet"}),
    ("lenet5", {}),
]


def random_variables(model, side=224, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, channels)))
    return jax.tree.map(lambda a: rng.random(a.shape, np.float32) + 0.5, dict(shapes))


@pytest.mark.parametrize(("name", "fields"), MODELS, ids=lambda v: v if isinstance(v, str) else "")
def test_round_trips_are_equal_to_the_bit(name, fields):
    model = create_model(name, 7, **fields)
    variables = random_variables(
        model, 32 if "lenet" in name or "cifar" in str(fields) + name else 224
    )
    for d in dialects(model):
        if any(k in fields and fields[k] != v for k, v in d.fields.items()):
            continue
        theirs = to_theirs(variables, d)
        assert len(theirs) == len(jax.tree.leaves(variables))
        blank = jax.tree.map(np.zeros_like, variables)
        back, report = from_theirs(model, blank, theirs, d)
        jax.tree.map(np.testing.assert_array_equal, back, variables)
        assert (report.kept, report.dropped) == ((), ())


def test_dialects_are_told_apart():
    model = create_model("resnet18", 10)
    variables = random_variables(model, 32)
    for d in dialects(model):
        assert detect(model, to_theirs(variables, d)).name == d.name
    vgg = create_model("vgg11", 10, head="mlp")
    shapes = jax.eval_shape(vgg.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    blank = jax.tree.map(lambda p: np.broadcast_to(np.float32(0), p.shape), dict(shapes))
    assert detect(vgg, to_theirs(blank, dialect(vgg, "weiaicunzai"))).name == "weiaicunzai"
    with pytest.raises(DataError, match="names are of another network"):
        detect(model, {"encoder.0.weight": NUMBERS})
    with pytest.raises(ConfigError, match='did you mean "torchvision"'):
        dialect(model, "torchvison")


def test_published_keys():
    """Keys of the official files, by hand."""

    def keys(name, dialect_name, **fields):
        model = create_model(name, 1000, **fields)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        return set(
            to_theirs(
                jax.tree.map(lambda a: np.zeros((1,) * a.ndim), dict(shapes)),
                dialect(model, dialect_name),
            )
        )

    resnet = keys("resnet50", "torchvision")
    assert {
        "conv1.weight",
        "layer3.5.bn3.running_var",
        "layer2.0.downsample.1.bias",
        "fc.bias",
    } <= resnet
    assert len(resnet) == 161 + 2 * 53
    assert "layer1.0.downsample.0.weight" not in keys("resnet18", "torchvision")
    vgg = keys("vgg19_bn", "weiaicunzai", head="mlp")
    assert {"features.49.weight", "features.50.running_mean", "classifier.6.weight"} <= vgg
    keras = keys("resnet50", "keras")
    assert {"conv1_conv/kernel", "conv3_block1_0_bn/moving_variance", "predictions/kernel"} <= keras
    hf = keys("resnet50", "transformers")
    assert "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight" in hf


def test_flattening_order():
    model = create_model("lenet5", 10)
    variables = random_variables(model, 32, 1)
    theirs = to_theirs(variables, dialect(model, "torch"))
    x = np.random.default_rng(1).random((2, 5, 5, 16), np.float32)
    ours = x.reshape(2, -1) @ variables["params"]["fc1"]["kernel"]
    pytorch = x.transpose(0, 3, 1, 2).reshape(2, -1) @ theirs["fc1.weight"].T
    np.testing.assert_allclose(ours, pytorch, rtol=1e-5)


def test_keras_bias_is_folded_into_the_mean():
    model = create_model("resnet18", 10, stem="cifar")
    variables = random_variables(model, 32)
    d = dialect(model, "keras")
    theirs = to_theirs(variables, d)
    theirs["conv1_conv/bias"] = np.full(64, 0.25, np.float32)
    back, report = from_theirs(model, variables, theirs, d)
    mean = variables["batch_stats"]["bn_init"]["mean"]
    np.testing.assert_array_equal(back["batch_stats"]["bn_init"]["mean"], mean - np.float32(0.25))
    assert report.dropped == ()
    back, _ = from_theirs(model, variables, theirs, d, exclude="^bn_init")
    np.testing.assert_array_equal(back["batch_stats"]["bn_init"]["mean"], mean)
    theirs["conv1_conv/bias"] = np.float32([0.25])
    with pytest.raises(DataError, match=r"conv1_conv/bias has shape \(1,\), not \(64,\)"):
        from_theirs(model, variables, theirs, d)


def test_containers_and_prefixes():
    weights = {"module._orig_mod.a.weight": NUMBERS, "a.num_batches_tracked": NUMBERS}
    for value in ({"state_dict": weights, "epoch": 3}, {"model": {"net": weights}}, weights):
        assert list(unwrap(value)) == ["a.weight"]
    with pytest.raises(DataError, match="no weights found"):
        unwrap({"epoch": 3})
    with pytest.raises(DataError, match=r"the key 'a\.weight' is there twice"):
        unwrap({"a.weight": NUMBERS, "module.a.weight": NUMBERS})


def test_all_problems_are_in_one_report():
    model = create_model("resnet18", 10, stem="cifar")
    variables = random_variables(model, 32)
    d = dialect(model, "torchvision")
    theirs = to_theirs(variables, d)
    theirs["fc.weight"] = theirs["fc.weight"][:5]
    del theirs["bn1.bias"]
    theirs["layer1.0.conv1.weight"] = theirs["layer1.0.conv1.weight"] * np.nan
    theirs["extra.weight"] = NUMBERS
    with pytest.raises(DataError) as error:
        from_theirs(model, variables, theirs, d)
    for text in (
        "4 arrays do not fit",
        "head/kernel: fc.weight has shape (512, 5) in our layout, (512, 10) expected",
        "bn_init/bias: bn1.bias is missing",
        "stage1_block1/conv1/kernel: layer1.0.conv1.weight is not finite",
        "extra.weight: has no place",
    ):
        assert text in str(error.value)


def test_partial_loading_is_reported_in_three_lists():
    model = create_model("resnet18", 10, stem="cifar")
    variables = random_variables(model, 32)
    d = dialect(model, "torchvision")
    theirs = to_theirs(random_variables(create_model("resnet18", 5, stem="cifar"), 32, seed=1), d)
    theirs["extra.weight"] = NUMBERS
    out, report = from_theirs(model, variables, theirs, d, exclude="^head/", partial=True)
    assert report.kept == ("head/bias", "head/kernel") or set(report.kept) == {
        "head/bias",
        "head/kernel",
    }
    assert report.dropped == ("extra.weight",)
    assert len(report.loaded) == len(flatten_dict(variables)) - 2
    np.testing.assert_array_equal(
        out["params"]["head"]["kernel"], variables["params"]["head"]["kernel"]
    )
    assert "kept at init: head/" in str(report)


@pytest.mark.skipif(not REAL.exists(), reason="the real weight files are not here")
def test_real_files():
    for depth in (20, 32, 44, 56):
        theirs = unwrap(read_torch(next(REAL.glob(f"resnet{depth}-*.th"))))
        model = create_model(f"resnet{depth}_cifar", 10)
        d = detect(model, theirs)
        out, _ = from_theirs(model, random_variables(model, 32), theirs, d)
        back = to_theirs(out, d)
        assert back.keys() == theirs.keys()
        assert all(np.array_equal(back[k], theirs[k]) for k in back)


# ---- files, bundles, commands


def bundle(tmp_path, name="resnet20_cifar"):
    model = create_model(name, 10)
    variables = random_variables(model, 32)
    d = dialects(model)[0]
    path = tmp_path / "weights.npz"
    np.savez(path, **to_theirs(variables, d))
    return path, variables


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize("to", ["akamaster", "ours"])
def test_export_and_import(to, ending, tmp_path):
    path, variables = bundle(tmp_path)
    run, report = load_weights(path, "resnet20_cifar")
    assert (report.dialect, report.kept, report.dropped) == ("akamaster", (), ())
    directory = save_bundle(run, tmp_path / "run")
    back = classic_cnns.load(directory)
    assert back.model == run.model
    assert back.preprocess.mean == (0.485, 0.456, 0.406)
    jax.tree.map(np.testing.assert_array_equal, dict(back.variables), variables)
    out = export_weights(back, to, tmp_path / f"out.{ending}")
    if (to, ending) == ("ours", "npz"):
        with pytest.raises(DataError, match="does not say what its images went through"):
            load_weights(out, "resnet20_cifar")
        return
    again, report = load_weights(out, "resnet20_cifar")
    assert (report.dialect, report.kept, report.dropped) == (to, (), ())
    jax.tree.map(np.testing.assert_array_equal, dict(again.variables), variables)


@pytest.mark.parametrize(
    ("name", "fields", "to"),
    [
        ("resnet14", {"stem": "cifar", "bn_epsilon": 1e-2}, "ours"),
        ("lenet5", {}, "ours"),
        ("resnet10", {}, "ours"),  # whose stem follows from the size of the image
        ("lenet5_1998", {}, "ours"),  # its classifier is no dense layer
        ("airbench94", {}, "ours"),
        ("vgg11", {"head": "mlp"}, "ours"),
        ("resnet50", {"stem": "cifar", "bottleneck_stride": "1x1", "bn_epsilon": 1e-5}, "keras"),
    ],
)
def test_a_file_of_ours_says_all_of_its_network(name, fields, to, tmp_path, capsys):
    """Fields, classes and preprocessing, also where another library has other customs."""
    model = create_model(name, 3, **fields)
    side = 64 if name == "resnet10" else 32
    numbers = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    preprocess = Preprocess((side, side, 3), mode="crop", **numbers)
    variables = {"batch_stats": {}, **seeded_variables(model, side)}
    run = LoadedRun(model, variables, ("cat", "dög", "\udcff"), preprocess, 0, name)
    path = export_weights(run, to, tmp_path / "x.safetensors")
    assert cli.main(["convert", str(path), "--out", str(tmp_path / "run")]) == 0
    assert f"{to} names" in capsys.readouterr().out
    back = classic_cnns.load(tmp_path / "run")
    assert (back.model, back.preprocess, back.classes) == (model, preprocess, run.classes)
    assert jax.tree.structure(dict(back.variables)) == jax.tree.structure(dict(variables))
    jax.tree.map(np.testing.assert_array_equal, dict(back.variables), dict(variables))
    assert load_weights(path, name, num_classes=2, exclude="^head/")[0].classes == ("0", "1")
    with pytest.raises(ConfigError, match=f"is of {name}, not of vgg13. Fix: {name} as the model"):
        load_weights(path, "vgg13")


@pytest.mark.parametrize(
    "change",
    [
        {"model": 5},
        {"model": "resnet"},
        {"options": [1]},
        {"options": {"num_classes": 4}},
        {"options": {"stem": "x"}},
        {"options": {"stage_sizes": [10**9] * 4}},
        {"options": {"stages": [1]}},
        {"classes": 5},
        {"preprocess": {}},
        {"preprocess": {"image_shape": [10**9, 32, 3]}},
        {"preprocess": {"image_shape": [32, 32]}},
        {"preprocess": {"image_shape": [32, 32, 3], "mean": [0.5]}},
        {"preprocess": {"image_shape": [32, 32, 3], "std": ["a", "b", "c"]}},
        {"preprocess": {"image_shape": [32, 32, 3], "std": [0.0, 1.0, 1.0]}},
        {"preprocess": {"image_shape": [32, 32, 3], "mode": "x"}},
    ],
)
def test_what_a_file_says_of_its_network_is_not_believed(change, tmp_path):
    from safetensors.numpy import save_file

    model = create_model("resnet14", 3, stem="cifar")
    variables = seeded_variables(model, 32)
    run = LoadedRun(model, variables, ("a", "b", "c"), Preprocess((32, 32, 3)), 0, "resnet14")
    path = export_weights(run, "ours", tmp_path / "x.safetensors")
    about = json.loads(json.dumps(dataclasses.asdict(read_about(path)))) | change
    save_file(read_weights(path), path, {"classic_cnns": json.dumps(about)})
    with pytest.raises((ConfigError, DataError)) as raised:
        load_weights(path)
    assert len(str(raised.value).splitlines()) == 1


def test_bundle_keeps_fields_and_refuses_a_full_directory(tmp_path):
    model = create_model("resnet50", 10, stem="cifar", bottleneck_stride="1x1")
    variables = random_variables(model, 32)
    np.savez(tmp_path / "w.npz", **to_theirs(variables, dialect(model, "torchvision")))
    run, _ = load_weights(tmp_path / "w.npz", "resnet50", bottleneck_stride="1x1")
    assert (run.model.stem, run.model.bottleneck_stride) == ("cifar", "1x1")
    save_bundle(run, tmp_path / "run")
    assert classic_cnns.load(tmp_path / "run").model == run.model
    with pytest.raises(WorkdirError, match="is not empty"):
        save_bundle(run, tmp_path / "run")


def test_another_head_starts_fresh(tmp_path):
    path, variables = bundle(tmp_path)
    run, report = load_weights(
        path, "resnet20_cifar", num_classes=3, exclude="^head/", classes=("a", "b", "c")
    )
    assert set(report.kept) == {"head/bias", "head/kernel"}
    assert run.classes == ("a", "b", "c")
    assert run.variables["params"]["head"]["kernel"].shape == (64, 3)
    np.testing.assert_array_equal(
        run.variables["params"]["conv_init"]["kernel"], variables["params"]["conv_init"]["kernel"]
    )


@pytest.mark.parametrize("ending", ["weights.h5", "h5"])
def test_files_for_keras(ending, tmp_path):
    """The order and the names are those of files that Keras 3.15.1 saved."""
    fields = {"stem": "imagenet", "bottleneck_stride": "1x1", "bn_epsilon": 1.001e-5}
    model = create_model("resnet50", 7, **fields)
    variables = random_variables(model, 32)
    preprocess = Preprocess.from_dict(PREPROCESSING["keras"])
    run = LoadedRun(model, variables, tuple("abcdefg"), preprocess, 0, "resnet50")
    path = export_weights(run, "keras", tmp_path / f"x.{ending}")
    back, report = load_weights(path, "resnet50")
    jax.tree.map(np.testing.assert_array_equal, back.variables, variables)
    assert (back.model, report.dropped, os.listdir(tmp_path)) == (model, (), [path.name])
    names = ["conv1_conv", "conv1_bn", "conv2_block1_1_conv", "conv2_block1_1_bn"]
    names += [f"conv2_block1_{end}" for end in ("2_conv", "2_bn", "0_conv", "3_conv", "0_bn")]
    with h5py.File(path) as file:
        if ending == "h5":
            assert list(file.attrs["layer_names"][:9]) == names
            assert len(file.attrs["layer_names"]) == 107
            weights = ["predictions/kernel", "predictions/bias"]
            assert list(file["predictions"].attrs["weight_names"]) == weights
            return
        layers = file["layers"]
        assert layers["conv2d_3/vars"].attrs["name"] == "conv2_block1_0_conv"
        assert layers["batch_normalization_52/vars"].attrs["name"] == "conv5_block3_3_bn"
        assert not layers["conv2d_52/vars/1"][:].any()  # the bias that ours has not
        turned = variables["params"]["conv_init"]["kernel"][:, :, ::-1]
        np.testing.assert_array_equal(layers["conv2d/vars/0"], turned)


def test_what_would_load_elsewhere_and_be_wrong_is_refused(tmp_path):
    model = create_model("resnet50", 7, stem="cifar")
    preprocess = Preprocess.from_dict(PREPROCESSING["keras"])
    run = LoadedRun(model, {}, tuple("abcdefg"), preprocess, 0, "resnet50")
    for dialect_name, name, text in (
        ("keras", "x.h5", "stride of a bottleneck at its 1x1 convolution, this network at its 3x3"),
        ("timm", "x.h5", "only Keras has .h5 files"),
        ("timm", "x.bin", "unknown ending"),
    ):
        with pytest.raises(ConfigError, match=text):
            export_weights(run, dialect_name, tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_commands(tmp_path, capsys):
    path, _ = bundle(tmp_path)
    run = str(tmp_path / "run")
    assert cli.main(["convert", str(path), "--model", "resnet20_cifar", "--out", run]) == 0
    assert "97 arrays loaded" in capsys.readouterr().out
    assert cli.main(["evaluate", run, "--data", "fake"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert (result["images"], result["split"]) == (100, "test")
    out = str(tmp_path / "out.safetensors")
    assert cli.main(["convert", run, "--to", "akamaster", "--out", out]) == 0
    numbers = "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
    images = f"images     32×32×3, squash, pixels / 255 normalised with {numbers}"
    assert capsys.readouterr().out == f"{images}\n{out}\n"
    assert cli.main(["models", "lenet*"]) == 0
    assert "lenet5                    61,706   0.0004    32   16" in capsys.readouterr().out
    assert cli.main(["summary", "resnet18", "--image-size", "32"]) == 0
    assert "11,681,832     555,929,600" in capsys.readouterr().out
    for args, code, text in (
        (["convert", str(path), "--model", "resnet32_cifar", "--out", run + "2"], 3, "do not fit"),
        (["convert", str(path), "--out", run + "2"], 2, "not say which network"),
        (["convert", str(path), "--model", "resnet20", "--out", run + "2"], 2, "did you mean"),
        (["convert", str(tmp_path / "no"), "--model", "vgg16", "--out", run], 3, "no such file"),
        (["evaluate", run], 2, "come without data"),
        (["evaluate", run, "--data", "fake", "--ema"], 4, "no averaged weights"),
        (["evaluate", str(tmp_path)], 4, "run.json is missing"),
        (["evaluate", run, "--data", "cifar100", "--data-dir", "/no"], 3, "cifar100"),
        (["models", "x*"], 2, "no network matches"),
        (["summary", "vgg16", "--image-size", "16"], 2, "32 px or more"),
    ):
        assert cli.main(args) == code
        error = capsys.readouterr().err
        assert error.startswith("ERROR "), error
        assert text in error
    assert not (tmp_path / "run2").exists()


def test_features_are_the_layers_outputs():
    model = ResNet("basic", (1, 1), 10)
    x, variables = normal(2, 16, 16, 3), seeded_variables(model, 16)
    names = ["conv_init", "stage2_block1", "head"]
    out = jax.jit(functools.partial(classic_cnns.features, model, layers=names))(variables, x)
    kernel = variables["params"]["conv_init"]["kernel"]
    expected = jax.jit(functools.partial(lowering.conv, padding=((1, 1), (1, 1))))(x, kernel)
    np.testing.assert_allclose(out["conv_init"], expected, atol=1e-5)
    np.testing.assert_allclose(out["head"], jax.jit(model.apply)(variables, x), atol=1e-5)
    assert out["stage2_block1"].shape == (2, 8, 8, 128)
    layers = classic_cnns.list_layers(model, (16, 16, 3))
    assert [layer.name for layer in layers][:3] == ["conv_init", "bn_init", "stage1_block1/conv1"]
    with pytest.raises(
        ConfigError, match=r'no layer "stage2_blok1" \(did you mean "stage2_block1"'
    ):
        classic_cnns.features(model, variables, x, ["stage2_blok1"])
    assert classic_cnns.features(model, variables, x, []) == {}


def test_features_of_weights_for_images_of_another_size():
    """GoogLeNet has another stem below 64 px; the weights, not the images, decide."""
    model = create_model("googlenet", 3, impl="lax")
    large, small = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 32, 32, 3))
    for made, seen, there in ((large, small, True), (small, large, False)):
        variables = jax.eval_shape(model.init, jax.random.key(0), made)
        run = functools.partial(classic_cnns.features, model, layers=["conv2"])
        if there:
            assert jax.eval_shape(run, variables, seen)["conv2"].shape[-1] == 64
        else:
            with pytest.raises(ConfigError, match='no layer "conv2"'):
                jax.eval_shape(run, variables, seen)


def test_weights_for_grey_images_are_used_again(tmp_path, capsys):
    model = create_model("resnet20_cifar", 10)
    variables = seeded_variables(model, 32, channels=1)
    preprocess = Preprocess((32, 32, 1), mean=(0.3,), std=(0.2,))
    export_weights(
        LoadedRun(model, variables, tuple("0123456789"), preprocess, 0, "resnet20_cifar"),
        "akamaster",
        tmp_path / "x.npz",
    )
    run, _ = load_weights(tmp_path / "x.npz", "resnet20_cifar")
    assert len(run.preprocess.mean) == len(run.preprocess.std) == 1
    save_bundle(run, tmp_path / "run")
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data", "digits"]) == 0
    assert "drawn class by class" in capsys.readouterr().out


def test_a_head_of_another_size_is_not_exported(tmp_path):
    model = create_model("lenet5", 10)
    preprocess = Preprocess((64, 64, 3))
    run = LoadedRun(
        model, random_variables(model, 64), tuple("0123456789"), preprocess, 0, "lenet5"
    )
    with pytest.raises(DataError, match="Fix: --to=safetensors"):
        export_weights(run, "torch", tmp_path / "x.npz")
    for name, fields, text in (
        ("googlenet", {}, "torchvision has another network in 9 arrays: inception3a/b3"),
        ("resnet18", {"bn_epsilon": 1e-2, "stem": "imagenet"}, "epsilon 1e-05, this .* 0.01"),
    ):
        model = create_model(name, 10, **fields)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        run = LoadedRun(model, dict(shapes), tuple("0123456789"), preprocess, 0, name)
        with pytest.raises(ConfigError, match=text):
            export_weights(run, "torchvision", tmp_path / "x.npz")
    with pytest.raises(ConfigError, match="exclude='\\['"):
        load_weights(tmp_path / "x.npz", "lenet5", exclude="[")
