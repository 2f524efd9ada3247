"""Order, resident and streamed batches, skipped images."""

import io
import tracemalloc

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from classic_cnns.data.loaders import ResidentLoader, StreamLoader, create_loader
from classic_cnns.data.order import Order, permute
from classic_cnns.data.preprocess import Preprocess
from classic_cnns.data.splits import Encoded, Split
from classic_cnns.errors import DataError
from classic_cnns.evaluate import create_evaluate
from classic_cnns.models import create_model
from classic_cnns.sharding import create_mesh
from classic_cnns.train_state import create_train_state

PREPROCESS = Preprocess((16, 16, 3))


def png(value, size=(20, 30)):
    rng = np.random.default_rng(value)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(n, bad=()):
    files = {f"{i}.png": b"junk" if i in bad else png(i) for i in range(n)}
    return Split(Encoded(list(files), files.__getitem__), np.arange(n, dtype=np.int32) % 5)


def stream(split, batch=8, seed=0, devices=1, **settings):
    settings = {"preprocess": PREPROCESS, "mesh": create_mesh(devices), **settings}
    return StreamLoader(split, batch, seed=seed, **settings)


# ---- order


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_permute_is_a_permutation(size):
    for epoch in range(3):
        assert sorted(permute(np.arange(size), size, 5, epoch)) == list(range(size))


def test_permutations_look_random():
    size, count = 500, 400
    orders = np.array([permute(np.arange(size), size, seed, 0) for seed in range(count)])
    for place in (0, 1, 250, 499):  # every image is equally likely at every place
        found = np.histogram(orders[:, place], 10, (0, size))[0]
        assert ((found - count / 10) ** 2 / (count / 10)).sum() < 30  # χ², 9 degrees of freedom
    neighbours = np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.01
    assert 0.8 < (orders == np.arange(size)).sum(1).mean() < 1.2  # 1 is expected
    labels = np.repeat(np.arange(10), size // 10)  # a folder is read class after class
    batches = labels[orders[:, :50]]
    spread = np.array([np.bincount(b, minlength=10) for b in batches]).var()
    assert abs(spread - 50 * 0.09 * 450 / 499) < 0.3  # hypergeometric


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (7, 7), (5, 3), (3, 8)])
def test_every_image_once_an_epoch(size, batch):
    order = Order(size, batch, seed=0)
    steps = [order.step(s) for s in range(size)]  # exactly `batch` epochs
    index, epoch = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    for e in range(batch):
        assert sorted(index[epoch == e]) == list(range(size))
        assert (epoch[e * size : (e + 1) * size] == e).all()
    assert size < 5 or not np.array_equal(index[:size], index[size : 2 * size])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_order_of_ten_million_images_takes_no_memory(hosts):
    size, start = 10_000_000, 10**9  # steps from a start in the middle, as after a resume
    images = np.broadcast_to(np.zeros((1, 2, 2, 1), np.uint8), (size, 2, 2, 1))
    split = Split(images, np.broadcast_to(np.zeros(1, np.int32), size))
    Order(7, 256, seed=0).step(0)  # whatever numpy sets up once
    tracemalloc.start()
    try:
        order = Order(size, 256, seed=0)
        expected = [order.step(s)[0] for s in (0, start, start + 1)]
        loaders = [
            stream(split, 256, preprocess=Preprocess((2, 2, 1)), host=(i, hosts))
            for i in range(hosts)
        ]
        parts = [[x.train_batch(s)["index"] for x in loaders] for s in (0, start, start + 1)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000  # a bit for each image would be 1.25 MB, a number 40 MB
    for found, whole in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(found), whole)
        assert len(set(whole.tolist())) > 250
        assert whole.max() < size


def test_balanced_order_gives_every_class_the_same_share():
    labels = np.repeat([0, 1, 2], [90, 9, 1]).astype(np.int32)
    order = Order.balanced(labels, 10, seed=0)
    index = np.concatenate([order.step(s)[0] for s in range(30)])  # three epochs
    counts = np.bincount(labels[index])
    assert counts.tolist() == [100, 100, 100]
    seen = np.bincount(index, minlength=100)
    assert seen[:90].min() >= 1  # 100 draws from 90 images leave none out
    assert seen[90:99].tolist().count(11) + seen[90:99].tolist().count(12) == 9


# ---- loaders


def resident(n, batch, seed=0, devices=1):
    split = Split(np.zeros((n, 2, 2, 1), np.uint8), np.arange(n, dtype=np.int32))
    return ResidentLoader(split, batch, seed=seed, mesh=create_mesh(devices))


def test_order_depends_on_seed_and_step_alone():
    a, b = resident(50, 8), resident(50, 8, devices=8)
    for step in range(20):
        np.testing.assert_array_equal(a.train(step)["index"], b.train(step)["index"])
    assert not np.array_equal(a.train(13)["index"], resident(50, 8, seed=1).train(13)["index"])
    for start in (4, 62):  # over an epoch's end, over a block's end
        many = b.train(start, 3)
        for name in ("index", "epoch"):
            alone = [a.train(start + i)[name] for i in range(3)]
            np.testing.assert_array_equal(alone, many[name])
        np.testing.assert_array_equal(many["index"][2], a.order.step(start + 2)[0])


def test_evaluation_order_and_mask():
    seen = []
    for item in resident(10, 4).evaluation():
        assert item["index"].shape == item["mask"].shape == (4,)
        seen += np.asarray(item["index"])[np.asarray(item["mask"]) == 1].tolist()
    assert seen == list(range(10))


def test_streamed_batches_are_those_of_the_resident_loader():
    split = encoded(20)
    pixels = np.stack([PREPROCESS(png(i)) for i in range(20)])
    still = ResidentLoader(Split(pixels, split.labels), 8, seed=3, mesh=create_mesh(8))
    for loader in (stream(split, seed=3), stream(Split(pixels, split.labels), seed=3, devices=8)):
        for step in (0, 1, 2, 7, 3):  # any step may follow any other
            item, expected = loader.train(step), still.train(step)
            for key in ("index", "epoch"):
                np.testing.assert_array_equal(item[key], expected[key])
            np.testing.assert_array_equal(item["image"], pixels[item["index"]])
            np.testing.assert_array_equal(item["label"], split.labels[item["index"]])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_a_batch(hosts):
    split = encoded(20)
    whole = stream(split, crop_scale=(0.2, 1.0))
    parts = [stream(split, crop_scale=(0.2, 1.0), host=(i, hosts)) for i in range(hosts)]
    for step in range(4):
        expected = whole.train_batch(step)
        found = [p.train_batch(step) for p in parts]
        for key in expected:
            np.testing.assert_array_equal(np.concatenate([f[key] for f in found]), expected[key])
    evals = [np.concatenate([p.eval_batch(2)["mask"] for p in parts]), whole.eval_batch(2)["mask"]]
    np.testing.assert_array_equal(*evals)
    assert evals[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_workers_change_nothing_and_crops_follow_the_position():
    split = encoded(20)
    loaders = [stream(split, workers=n, crop_scale=(0.2, 1.0)) for n in (1, 4)]
    first = [np.asarray(loaders[0].train(s)["image"]) for s in range(6)]
    for step in range(6):
        np.testing.assert_array_equal(loaders[1].train(step)["image"], first[step])
    again = {i: [] for i in range(20)}
    for step in range(6):
        for i, image in zip(*(loaders[1].train_batch(step)[k] for k in ("index", "image")),
                            strict=True):  # fmt: skip
            again[i].append(image.tobytes())
    assert all(len(set(crops)) == len(crops) for crops in again.values())


def test_a_bad_image_is_an_error_with_its_name():
    loader = stream(encoded(20, bad=[7]), batch=4)
    with pytest.raises(DataError, match=r"'7\.png' cannot be decoded: not an image.*Fix:"):
        list(map(loader.train, range(5)))


def test_skipped_images_are_replaced_the_same_way_and_named():
    split = encoded(20, bad=[7, 8])
    batches = []
    for workers in (1, 3):
        loader = stream(split, workers=workers, on_bad_image="skip", max_bad_fraction=0.1)
        batches.append([{k: np.asarray(v) for k, v in loader.train(s).items()} for s in range(5)])
        assert set(loader.bad) == {"7.png", "8.png"}
    jax.tree.map(np.testing.assert_array_equal, *batches)
    index = np.concatenate([b["index"] for b in batches[0]])
    assert not {7, 8} & set(index.tolist())
    assert np.bincount(index[:20], minlength=20)[9] == 3  # for itself, 7 and 8
    for batch in batches[0]:
        np.testing.assert_array_equal(batch["label"], split.labels[batch["index"]])


def test_skipped_images_do_not_count_in_evaluation():
    loader = stream(encoded(20, bad=[7]), on_bad_image="skip", max_bad_fraction=0.1)
    masks = np.concatenate([np.asarray(item["mask"]) for item in loader.evaluation()])
    assert masks.sum() == 19
    assert masks[7] == 0


def test_a_bad_image_that_is_listed_twice_is_two_less(tmp_path):
    files = {"a.png": png(0), "b.png": b"junk"}
    split = Split(
        Encoded(["a.png", "b.png", "b.png", "a.png"], files.__getitem__), np.int32([0] * 4)
    )
    loader = stream(split, batch=3, on_bad_image="skip", max_bad_fraction=0.5)
    shape = (16, 16, 3)
    model = create_model("lenet5", 2)
    state = create_train_state(model, optax.sgd(0.1), shape, seed=0, mesh=create_mesh(1))
    result = create_evaluate(model, mean=(0.5,) * 3, std=(0.5,) * 3)(state, loader)
    assert result["recall"][0] == result["accuracy"]


def test_the_share_of_bad_images_is_of_all_splits():
    split = encoded(20, bad=[7])
    few = {"on_bad_image": "skip", "max_bad_fraction": 0.01}
    with pytest.raises(DataError, match="1 of 20 images"):
        list(stream(split, **few).evaluation())
    list(stream(split, **few, total=100).evaluation())


def test_too_many_bad_images():
    loader = stream(encoded(20, bad=[1, 2, 3]), on_bad_image="skip", max_bad_fraction=0.1)
    with pytest.raises(DataError, match=r"3 of 20 images.*1\.png.*2\.png.*3\.png.*max_bad"):
        list(map(loader.train, range(5)))


def test_a_file_that_vanishes_is_named(tmp_path):
    names = []
    for i in range(8):
        names.append(str(tmp_path / f"{i}.png"))
        (tmp_path / f"{i}.png").write_bytes(png(i))
    from classic_cnns.data.decode import read_file

    loader = stream(Split(Encoded(names, read_file), np.zeros(8, np.int32)))
    (tmp_path / "5.png").unlink()
    with pytest.raises(DataError, match=r"5\.png' cannot be decoded: No such file"):
        loader.train(0)


def test_the_kind_of_loader_follows_the_images(tmp_path):
    pixels = np.zeros((8, 16, 16, 3), np.uint8)
    pixels.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.uint8, "r", shape=pixels.shape)
    settings = {"seed": 0, "mesh": create_mesh(), "preprocess": PREPROCESS}
    kinds = [
        create_loader(Split(images, np.zeros(8, np.int32)), 8, **settings)
        for images in (pixels, mapped, encoded(8).images)
    ]
    assert [type(k) for k in kinds] == [ResidentLoader, StreamLoader, StreamLoader]
