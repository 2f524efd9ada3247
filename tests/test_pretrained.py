"""Published weights: downloaded once and checked; training that starts from weights."""

import dataclasses
import hashlib
import http.server
import shutil
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from torch_files import write_state_dict

import classic_cnns
from classic_cnns import cli
from classic_cnns import train as train_lib
from classic_cnns.data import download
from classic_cnns.data.download import Download, fetch
from classic_cnns.data.sources import fake
from classic_cnns.errors import ConfigError, DataError
from classic_cnns.loading import load_dataset
from classic_cnns.models import create_model
from classic_cnns.train_state import TrainState
from classic_cnns.weights import export_weights, load_weights, pretrained, save_bundle
from classic_cnns.weights.convert import to_theirs
from classic_cnns.weights.dialects import dialect
from classic_cnns.weights.finetune import Start, adopt, find_start
from classic_cnns.weights.pretrained import V1, V2, fetch_pretrained

pytestmark = pytest.mark.usefixtures("quick_compile")

CONTENT = bytes(range(256)) * 4000  # more than a block


class Server:
    """Serves `files`; cuts answers after `cut` bytes; may not know ranges."""

    def __init__(self):
        self.files, self.asked = {}, []
        self.cut, self.ranges, self.status = 1 << 40, True, 200
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                given = self.headers.get("Range")
                outer.asked.append(given)
                data = outer.files.get(self.path.rsplit("/", 1)[1])
                if data is None:
                    return self.send_error(404)
                start = int(given.removeprefix("bytes=")[:-1]) if given and outer.ranges else 0
                if start >= len(data):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start : start + outer.cut])

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"


@pytest.fixture
def server():
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


@pytest.fixture
def file(server):
    server.files["a.bin"] = CONTENT
    return Download(server.url + "a.bin", hashlib.sha256(CONTENT).hexdigest()[:8])


def test_a_cut_download_is_continued(server, file, tmp_path):
    server.cut = 700_000
    with pytest.raises(DataError, match=r"after 700,000 of 1,024,000 bytes.*again to continue"):
        fetch("x", file, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin.part"]
    assert fetch("x", file, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=700000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    fetch("x", file, tmp_path)
    assert len(server.asked) == 2  # not asked again


def test_a_server_without_ranges_sends_all_again(server, file, tmp_path):
    server.ranges = False
    (tmp_path / "a.bin.part").write_bytes(b"wrong beginning")
    assert fetch("x", file, tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=15-"]


def test_left_over_parts(server, file, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT)  # whole, killed before it was renamed
    fetch("x", file, tmp_path).unlink()
    assert server.asked == []
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"of another, longer file")
    assert fetch("x", file, tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=1024023-", None]


def test_wrong_content_is_deleted(server, file, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"another beginning")
    with pytest.raises(DataError, match=rf"other content .*starts with {file.sha256}\) and put"):
        fetch("x", file, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert fetch("x", file, tmp_path).read_bytes() == CONTENT
    (tmp_path / "a.bin").write_bytes(b"damaged later")
    with pytest.raises(DataError, match=r"a\.bin: SHA-256 differs .*Fix: delete it"):
        fetch("x", file, tmp_path)


def test_several_at_once_download_once(server, file, tmp_path):
    threads = [threading.Thread(target=fetch, args=("x", file, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_offline_is_told_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ANSWER_S", 0.3)
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        started = time.monotonic()
        for base, reason in ((url, "no answer within 0.3 s"), ("http://127.0.0.1:1/", "refused")):
            monkeypatch.setattr(pretrained, "URL", base)
            with pytest.raises(DataError) as error:
                fetch_pretrained("resnet50", V2, tmp_path)
            for text in (f"{base}resnet50-11ad3fa6.pth", "11ad3fa6)", str(tmp_path), reason):
                assert text in str(error.value)
        assert time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []


def test_the_table_names_networks_and_hashes():
    for tag, files in pretrained.FILES.items():
        for name, file in files.items():
            create_model(name)
            stem, digits = file.removesuffix(".pth").rsplit("-", 1)
            assert stem == ("alexnet-owt" if name == "alexnet" else name), tag
            assert len(digits) == 8
            int(digits, 16)
    with pytest.raises(ConfigError, match='did you mean "torchvision:IMAGENET1K_V'):
        fetch_pretrained("vgg16", "torchvision:IMAGENET1K")
    with pytest.raises(ConfigError, match=r"IMAGENET1K_V2 has no vgg16\. Fix: one of resnet50, "):
        fetch_pretrained("vgg16", V2)


# ---- training that starts from weights


def seeded(model, side=32, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    rng = np.random.default_rng(seed)

    def fill(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100
        return rng.standard_normal(leaf.shape, np.float32) / np.float32(fan_in) ** 0.5 + (
            np.float32(leaf.ndim == 1)
        )

    return jax.tree.map(fill, dict(shapes))


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """ResNet-10 with 7 classes as if torchvision had published it; its variables."""
    model = create_model("resnet10", 7, stem="cifar")
    variables = seeded(model)
    path = write_state_dict(
        tmp_path / "resnet10.pth", to_theirs(variables, dialect(model, "torchvision"))
    )
    data = path.read_bytes()
    name = f"resnet10-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    server.files[name] = data
    monkeypatch.setattr(pretrained, "URL", server.url)
    monkeypatch.setattr(pretrained, "FILES", {V1: {"resnet10": name}, V2: {"resnet10": name}})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path, variables


@pytest.fixture
def lenet(tmp_path):
    """LeNet-5 with 10 classes as a file; its variables."""
    model = create_model("lenet5", 10)
    variables = seeded(model)
    return write_state_dict(
        tmp_path / "w.pth", to_theirs(variables, dialect(model, "torch"))
    ), variables


@pytest.fixture
def still(config):
    """A training of LeNet-5 in which parameters stay as they are."""
    config.num_steps, config.schedule.warmup_steps = 2, 1
    config.batch_size = 8
    config.optimizer.learning_rate = 1e-30  # is lost in rounding
    return config


def check_trunk(state, variables):
    params, expected = (flatten_dict(p) for p in (state.params, variables["params"]))
    assert params.keys() == expected.keys()
    for path, value in params.items():
        if path[0] == "head":
            assert value.shape[-1] == 10
        else:
            np.testing.assert_array_equal(value, expected[path])


def test_published_weights_by_tag(published, server, tmp_path, capsys):
    _, variables = published
    run, report = load_weights(V1, "resnet10")
    assert len(report.loaded) == len(jax.tree.leaves(variables))
    jax.tree.map(np.testing.assert_array_equal, dict(run.variables), variables)
    assert load_weights(V2, "resnet10")[0].preprocess.resize == 232
    assert (run.preprocess.mode, run.preprocess.resize) == ("crop", 256)
    out = tmp_path / "run"
    assert cli.main(["convert", V1, "--model", "resnet10", "--out", str(out)]) == 0
    jax.tree.map(np.testing.assert_array_equal, classic_cnns.load(out).variables, variables)
    start = find_start(V1, "resnet10", {})
    assert start.fields == {"stem": "cifar"}
    jax.tree.map(np.testing.assert_array_equal, start.variables, variables)
    assert len(server.asked) == 1
    assert len(list((tmp_path / "cache" / "classic_cnns" / "weights").iterdir())) == 1
    assert cli.main(["convert", V1, "--model", "vgg16", "--out", str(out) + "2"]) == 2
    assert "has no vgg16" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", ["run", *(pytest.param(k, marks=pytest.mark.slow) for k in ("tag", "file"))]
)
def test_training_starts_from_weights(kind, published, still, tmp_path, capsys):
    path, variables = published
    source = {"tag": V1, "file": str(path), "run": str(tmp_path / "bundle")}[kind]
    if kind == "run":
        save_bundle(load_weights(path, "resnet10")[0], source)
    still.model.update(name="resnet10", pretrained=source, options={"impl": "lax"})
    still.data.image_size, still.augment.crop_padding = 8, 0
    state, _ = classic_cnns.train_and_evaluate(still, tmp_path / "run")
    check_trunk(state, variables)
    out = capsys.readouterr().out
    assert (
        f"pretrained {source}, images normalised with its mean (0.485, 0.456, 0.406), "
        "std (0.229, 0.224, 0.225)" in out
    )
    assert (
        "60 arrays loaded\nkept at init: head/bias, head/kernel\ndropped: head/bias, head/" in out
    )
    run = classic_cnns.load(tmp_path / "run")
    assert run.model.stem == "cifar"
    assert run.preprocess.mean == (0.485, 0.456, 0.406)


def test_a_continued_training_does_not_start_again(lenet, still, tmp_path, monkeypatch):
    path, _ = lenet
    still.optimizer.learning_rate = 0.1
    still.num_steps, still.checkpoint_every_steps = 4, 2
    still.model.pretrained = str(path)
    whole, _ = classic_cnns.train_and_evaluate(still, tmp_path / "a")
    plain = train_lib.ResidentLoader.train

    def stop(self, at, count=1, room=0):
        if at <= 3 < at + count:
            raise KeyboardInterrupt
        return plain(self, at, count, room)

    with monkeypatch.context() as context:
        context.setattr(train_lib.ResidentLoader, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            classic_cnns.train_and_evaluate(still, tmp_path / "b")
    path.unlink()  # not needed any more
    parts, _ = classic_cnns.train_and_evaluate(still, tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(parts))


def test_as_many_classes_keep_the_classifier(lenet, still, tmp_path):
    path, variables = lenet
    still.model.pretrained = str(path)
    state, _ = classic_cnns.train_and_evaluate(still, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), variables["params"])


def test_weights_for_bgr_take_rgb(tmp_path):
    """Keras' weights see what they saw in Keras: the first kernel is turned, mean and std too."""
    model = create_model("resnet10", 5, stem="cifar", bn_epsilon=1.001e-5)
    variables = seeded(model)
    np.savez(tmp_path / "w.npz", **to_theirs(variables, dialect(model, "keras")))
    run, _ = load_weights(tmp_path / "w.npz", "resnet10")
    start = find_start(str(tmp_path / "w.npz"), "resnet10", {})
    assert start.fields == {"bn_epsilon": 1.001e-5, "bottleneck_stride": "1x1", "stem": "cifar"}
    x = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    mean, std = np.float32(run.preprocess.mean), np.float32(run.preprocess.std)
    bgr = jax.jit(model.apply)(variables, (x[..., ::-1] - mean[::-1]) / std[::-1])
    rgb = jax.jit(run.model.apply)(
        start.variables, (x - np.float32(start.mean)) / np.float32(start.std)
    )
    np.testing.assert_allclose(rgb, bgr, rtol=1e-4, atol=1e-4 * np.abs(bgr).max())
    back = export_weights(run, "keras", tmp_path / "back.npz")
    with np.load(tmp_path / "w.npz") as first, np.load(back) as second:
        added = set(second.files) - set(first.files)
        assert added == {key.replace("kernel", "bias") for key in first.files if "conv/k" in key}
        assert not any(second[key].any() for key in added)  # biases, which Keras has everywhere
        for key in first.files:
            np.testing.assert_array_equal(second[key], first[key])


def test_auxiliary_heads_go_with_the_classifier():
    def abstract(classes, **fields):
        model = create_model("googlenet", classes, arch="torchvision", stem="cifar", **fields)
        return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))

    def take(ours, theirs):
        state = TrainState(
            step=0, params=ours["params"], batch_stats=ours["batch_stats"], opt_state=()
        )
        return adopt(Start("x", variables=theirs), state)

    with_aux, without = abstract(7), abstract(7, aux=False)
    taken, report = take(with_aux, abstract(5))
    assert not any(p[1].startswith(("head", "aux")) for p in taken)
    assert len(taken) + 2 == len(jax.tree.leaves(without))
    assert len(report.kept) == len(report.dropped) == len(jax.tree.leaves(with_aux)) - len(taken)
    assert len(take(with_aux, with_aux)[0]) == len(jax.tree.leaves(with_aux))
    assert len(take(with_aux, without)[1].kept) == len(take(without, with_aux)[1].dropped) == 18


def test_weights_that_do_not_fit(published, still, tmp_path):
    path, _ = published
    bundle = tmp_path / "bundle"
    save_bundle(load_weights(path, "resnet10")[0], bundle)
    still.model.pretrained = str(bundle)
    still.model.name = "resnet18"
    with pytest.raises(ConfigError, match=r"is a resnet10, and resnet18 is trained"):
        classic_cnns.train_and_evaluate(still, tmp_path / "run")
    still.model.name = "resnet10"
    still.data.image_size = 64
    still.model.options.stem = "imagenet"
    with pytest.raises(
        DataError, match=r"conv_init/kernel: \(3, 3, 3, 64\) in the weights, \(7, 7, 3, 64\) here"
    ):
        classic_cnns.train_and_evaluate(still, tmp_path / "run")
    still.model.pretrained = str(tmp_path / "nothing")
    with pytest.raises(DataError, match="no such file"):
        classic_cnns.train_and_evaluate(still, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_evaluated_on_its_own_split_though_images_were_added(config, tmp_path):
    """Images that were trained on must not come into the test split of a grown folder."""
    made = fake(16, count=120)["all"]
    photos = tmp_path / "photos"
    for i, (pixels, label) in enumerate(zip(made.images, made.labels, strict=True)):
        (photos / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(photos / str(label) / f"{i:03}.png")
    config.data.update(source="folder", dir=str(photos), image_size=16)
    config.num_steps, config.schedule.warmup_steps = 4, 1
    config.augment.random_resized_crop = (0.5, 1.0)  # of larger images, in training
    classic_cnns.train_and_evaluate(config, tmp_path / "run")
    run = classic_cnns.load(tmp_path / "run")
    before = load_dataset(tmp_path / "run", run)
    assert before.train.images.shape[1:] == (16, 16, 3)
    renamed = tmp_path / "renamed"  # the same classes in another order
    for label in range(10):
        shutil.copytree(photos / str(label), renamed / f"{9 - label}-{label}")
    names = tuple(f"{9 - label}-{label}" for label in range(10))
    turned = load_dataset(
        tmp_path / "run", dataclasses.replace(run, classes=names), "folder", str(renamed)
    )
    assert turned.classes == names != tuple(sorted(names))
    label_of = {p.tobytes(): label for p, label in zip(made.images, made.labels, strict=True)}
    for split in turned.splits.values():
        assert [label_of[image.tobytes()] for image in split.images] == split.labels.tolist()
    own = load_dataset(tmp_path / "run", run, "folder", str(photos))
    np.testing.assert_array_equal(own.test.images, before.test.images)
    assert "drawn" in load_dataset(tmp_path / "run", run, "fake").note
    for label in range(10):
        Image.fromarray(made.images[label]).save(photos / str(label) / "!.png")
    after = load_dataset(tmp_path / "run", run)
    assert len(after.train) == len(before.train) + 10
    for name in ("val", "test"):
        np.testing.assert_array_equal(after.splits[name].images, before.splits[name].images)
