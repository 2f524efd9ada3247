"""Sources, splits, order."""

import gzip
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import struct
import sys
import tarfile
import threading
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from classic_cnns.data import archives, create_dataset, folder
from classic_cnns.data.archives import Archive, Download, Member
from classic_cnns.data.drawing import stratified_split
from classic_cnns.data.preprocess import decode_image
from classic_cnns.errors import ConfigError, DataError


@pytest.fixture
def photos(tmp_path):
    """train and val with two classes of four and two images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path


def test_digits_are_real_and_split_by_class():
    data = create_dataset("digits", val_fraction=0.2, test_fraction=0.2)
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    assert data.image_shape == (32, 32, 1)
    for split in (data.train, data.val, data.test):
        share = np.array(split.counts(10)) / len(split)
        assert abs(share - 0.1).max() < 0.02
    assert abs(data.train.images.mean() / 255 - data.preprocess.mean[0]) < 0.01
    assert abs((data.train.images / 255).std() - data.preprocess.std[0]) < 0.01


def test_splits_are_disjoint_seeded_and_complete():
    labels = np.arange(100) % 3
    rest, part = stratified_split(labels, 0.2, seed=1)
    assert sorted([*rest, *part]) == list(range(100))
    assert np.bincount(labels[part]).tolist() == [7, 7, 7]
    np.testing.assert_array_equal(part, stratified_split(labels, 0.2, seed=1)[1])
    assert not np.array_equal(part, stratified_split(labels, 0.2, seed=2)[1])


def test_classes_that_cannot_be_split_are_all_named():
    labels = np.array([0, 0, 1, 2, 2, 3])
    with pytest.raises(DataError, match=r"classes: 'b', 'd'\. Fix"):
        stratified_split(labels, 0.5, 0, ("a", "b", "c", "d"))


@pytest.mark.slow
def test_memory_of_a_folder_of_100_000_files(tmp_path):
    """At most 100 bytes a file beyond the paths themselves."""
    for c in range(10):
        (tmp_path / str(c)).mkdir()
        for i in range(10_000):
            os.close(os.open(tmp_path / str(c) / f"{i}.jpg", os.O_CREAT | os.O_WRONLY))
    tracemalloc.start()
    splits, _ = folder.photos(tmp_path)
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    names = splits["all"].images.names
    assert len(names) == 100_000
    assert now - sum(map(sys.getsizeof, names)) < 100 * len(names)


def test_folder(photos):
    (photos / "train" / "cat" / ".hidden.png").write_bytes(b"junk")
    (photos / "train" / ".ipynb_checkpoints").mkdir()
    (photos / "train" / "cat" / "notes.txt").write_text("not an image")
    data = create_dataset("folder", dir=str(photos), image_size=16)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val), data.test) == (8, 4, None)
    assert data.image_shape == (16, 16, 3)
    expected = Image.open(photos / "train" / "dog" / "0.png").resize(
        (16, 16), Image.Resampling.BILINEAR
    )
    np.testing.assert_array_equal(data.train.images[4], expected)
    assert create_dataset("images_set", dir=str(photos)).image_shape == (112, 112, 3)


def test_flat_folder_is_split_by_class(photos):
    data = create_dataset(
        "folder", dir=str(photos / "train"), image_size=8, val_fraction=0.25, test_fraction=0.25
    )
    assert [len(s) for s in (data.train, data.val, data.test)] == [4, 2, 2]
    assert data.test.counts(2) == [1, 1]


def test_fingerprint_sees_one_changed_pixel(photos):
    before = create_dataset("folder", dir=str(photos), image_size=8).fingerprint
    assert create_dataset("folder", dir=str(photos), image_size=8).fingerprint == before
    Image.new("RGB", (8, 8), (1, 2, 3)).save(photos / "val" / "cat" / "0.png")
    assert create_dataset("folder", dir=str(photos), image_size=8).fingerprint != before


def test_folder_mistakes_are_all_reported(photos):
    (photos / "train" / "empty").mkdir()
    (photos / "val" / "bird").mkdir()
    Image.new("RGB", (8, 8)).save(photos / "val" / "bird" / "0.png")
    with pytest.raises(DataError) as error:
        create_dataset("folder", dir=str(photos))
    for text in (
        "classes without images in train: empty",
        "classes in val that train lacks: bird",
        "classes in train that val lacks: empty",
        "Fix:",
    ):
        assert text in str(error.value)


def test_folder_missing_empty_or_one_class(photos, tmp_path):
    with pytest.raises(DataError, match="not a directory"):
        create_dataset("folder", dir=str(tmp_path / "none"))
    empty = tmp_path / "nothing"
    empty.mkdir()
    with pytest.raises(DataError, match="no images found"):
        create_dataset("folder", dir=str(empty))
    with pytest.raises(DataError, match="no images found"):  # one level too deep
        create_dataset("folder", dir=str(photos / "train" / "cat"))
    for name in ("train", "val"):
        for file in (photos / name / "dog").iterdir():
            file.unlink()
        (photos / name / "dog").rmdir()
    with pytest.raises(DataError, match="only one class, 'cat'"):
        create_dataset("folder", dir=str(photos))
    with pytest.raises(ConfigError, match=r"data\.dir is empty"):
        create_dataset("folder")


def test_every_damaged_file_is_named(photos):
    (photos / "train" / "cat" / "1.png").write_bytes(b"")
    (photos / "train" / "dog" / "2.png").write_text("<html>404</html>")
    whole = (photos / "val" / "dog" / "1.png").read_bytes()
    (photos / "val" / "dog" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as error:
        create_dataset("folder", dir=str(photos))
    assert "cat/1.png" in str(error.value)
    assert "dog/2.png" in str(error.value)
    assert "val/dog/0.png" in str(error.value)
    assert "3 of 12 files" in str(error.value)


def test_decoding_of_unusual_modes(tmp_path):
    def roundtrip(image, name="x.png", **kwargs):
        image.save(tmp_path / name, **kwargs)
        return decode_image(tmp_path / name, 4, 4)

    gray = roundtrip(Image.new("L", (4, 4), 77))
    assert (gray == 77).all()
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    assert (roundtrip(deep) == 40_000 >> 8).all()
    clear = roundtrip(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))
    assert (clear == 255).all()
    ink = roundtrip(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "x.jpg")
    assert (ink == 255).all()
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_allclose(roundtrip(palette)[0, 0], (10, 200, 30), atol=2)
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    np.testing.assert_array_equal(roundtrip(upright, exif=exif), np.asarray(upright)[::-1, ::-1])
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        decode_image(tmp_path / "f.tiff", 4, 4)


def test_unknown_source_and_fraction():
    with pytest.raises(ConfigError, match='did you mean "cifar10" or "cifar100"'):
        create_dataset("cifar")
    with pytest.raises(ConfigError, match=r"data\.val_fraction is 1"):
        create_dataset("digits", val_fraction=1.0)


# ---- archives


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def server(tmp_path):
    """Serves a folder on this machine; yields (folder, address, paths asked for)."""
    root, asked = tmp_path / "served", []
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def log_message(self, *args):
            asked.append(self.path)

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield root, f"http://127.0.0.1:{httpd.server_port}/", asked
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_tar_is_downloaded_once_checked_and_extracted(server, tmp_path):
    root, url, asked = server
    data = bytes(range(100))
    tar = tar_of({"inside/a.bin": data, "../evil": b"x", "inside/other": b"y"})
    (root / "set.tar.gz").write_bytes(tar)
    archive = Archive(
        (Member("a.bin", 100, sha(data)),), (Download(url + "set.tar.gz", sha(tar)),), "inside"
    )
    target = tmp_path / "data"
    for _ in range(2):
        assert archives.read_members("toy", archive, target) == {"a.bin": data}
    assert asked == ["/set.tar.gz"]
    assert sorted(p.name for p in target.rglob("*")) == ["a.bin", "inside", "set.tar.gz"]
    assert not (tmp_path / "evil").exists()


def test_only_missing_gzip_files_are_downloaded(server, tmp_path):
    root, url, asked = server
    contents = {"a": b"A" * 9, "b": b"B" * 9}
    zipped = {n: gzip.compress(d) for n, d in contents.items()}
    for name, data in zipped.items():
        (root / f"{name}.gz").write_bytes(data)
    archive = Archive(
        tuple(Member(n, 9, sha(d)) for n, d in contents.items()),
        tuple(Download(f"{url}{n}.gz", sha(d)) for n, d in zipped.items()),
    )
    (tmp_path / "a").write_bytes(contents["a"])
    assert archives.read_members("toy", archive, tmp_path) == contents
    assert asked == ["/b.gz"]


def test_wrong_content_is_refused_and_leaves_nothing(server, tmp_path):
    root, url, _ = server
    (root / "a.gz").write_bytes(b"something else")
    target = tmp_path / "data"
    with pytest.raises(DataError, match=r"sent other content .*Fix: get .* and put it in"):
        archives.fetch("toy", Download(url + "a.gz", sha(b"right")), target)
    assert list(target.iterdir()) == []
    with pytest.raises(DataError, match="404"):
        archives.fetch("toy", Download(url + "missing.gz", sha(b"right")), target)
    assert list(target.iterdir()) == []


def test_damaged_files_are_all_named(tmp_path):
    archive = Archive((Member("a", 3, sha(b"abc")), Member("b", 3)), ())
    (tmp_path / "a").write_bytes(b"abd")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"abc")[:-9])
    with pytest.raises(DataError, match=r"a: SHA-256 differs.*b\.gz: .*Fix: delete them"):
        archives.read_members("toy", archive, tmp_path)


def test_parsing_of_the_official_formats():
    pixels = np.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).astype(np.uint8)
    blocks = [bytes([7, 9]) + pixels[0].tobytes(), bytes([1, 99]) + pixels[1].tobytes()]
    images, labels = archives.parse_cifar(blocks, 2)
    assert labels.tolist() == [9, 99]
    np.testing.assert_array_equal(images, pixels.transpose(0, 2, 3, 1))
    raw = np.arange(2 * 28 * 28).astype(np.uint8)
    images, labels = archives.parse_idx(
        struct.pack(">4i", 2051, 2, 28, 28) + raw.tobytes(), struct.pack(">2i", 2049, 2) + b"\3\4"
    )
    np.testing.assert_array_equal(images.ravel(), raw)
    assert labels.tolist() == [3, 4]


def photo_folder(directory, classes=3, count=12):
    for c in range(classes):
        (directory / f"c{c}").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (c * 80, i * 20, 0)).save(directory / f"c{c}" / f"{i:02}.png")
    return directory


def names_of(split):
    return {"/".join(name.split("/")[-2:]) for name in split.images.names}


def test_a_drawn_split_is_listed_and_taken_again_though_images_were_added(tmp_path):
    photos = photo_folder(tmp_path / "photos")
    settings = {"dir": str(photos), "image_size": 8, "loader": "stream"}
    first = create_dataset("folder", **settings)
    assert set(first.drawn) == {"val", "test"}
    for name, members in first.drawn.items():
        assert set(members) == names_of(first.splits[name])
    path = tmp_path / "split.json"
    path.write_text(json.dumps(first.drawn))

    for c in range(3):  # before all others in the alphabet
        for i in range(6):
            Image.new("RGB", (8, 8)).save(photos / f"c{c}" / f"!{i}.png")
    drawn_anew = create_dataset("folder", **settings)
    assert drawn_anew.drawn != first.drawn
    again = create_dataset("folder", **settings, split_file=str(path))
    assert again.drawn == first.drawn
    assert len(again.train) == len(first.train) + 18
    assert not names_of(again.train) & (names_of(again.val) | names_of(again.test))
    assert f"test and val as in {path}" in again.note

    path.write_text(json.dumps({"val": first.drawn["val"]}))
    half = create_dataset("folder", **settings, split_file=str(path))
    assert half.drawn["val"] == first.drawn["val"]
    assert f"test (10%) drawn class by class with seed 0; val as in {path}" in half.note


def test_a_split_file_of_val_alone_leaves_val_out_of_test(tmp_path):
    labels = np.repeat(np.arange(2), 40)
    images = np.arange(80, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    members = list(range(0, 80, 2))
    (tmp_path / "split.json").write_text(json.dumps({"val": members}))
    data = create_dataset(
        "npz", dir=str(tmp_path / "a.npz"), split_file=str(tmp_path / "split.json")
    )
    parts = {name: set(split.images[:, 0, 0, 0].tolist()) for name, split in data.splits.items()}
    assert parts["val"] == set(members)
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 80


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.8, 0.99])
def test_of_every_class_something_stays(fraction):
    rest, drawn = stratified_split(np.array([0, 0, 1, 1, 1, 2, 2]), fraction, 0)
    assert len({0, 1, 2} & set(np.array([0, 0, 1, 1, 1, 2, 2])[rest].tolist())) == 3
    assert sorted([*rest, *drawn]) == list(range(7))


def test_a_folder_that_moved_is_the_same_data(tmp_path):
    for label in "ab":
        (tmp_path / "x" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 9 * i).save(tmp_path / "x" / label / f"{i}.png")
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    shutil.copytree(tmp_path / "x", tmp_path / "z")
    (tmp_path / "z" / "a" / "0.png").rename(tmp_path / "z" / "a" / "9.png")
    settings = {"image_size": 8, "loader": "stream"}
    x, y, z = (create_dataset("folder", dir=str(tmp_path / d), **settings) for d in "xyz")
    assert x.train.encoded
    assert x.fingerprint == y.fingerprint != z.fingerprint


def test_a_split_file_that_is_not_needed_is_mentioned(tmp_path):
    for name in ("train", "test"):
        photo_folder(tmp_path / "photos" / name)
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"val": ["train/c0/00.png", "train/c1/00.png"], "test": ["x"]}))
    data = create_dataset("folder", dir=str(tmp_path / "photos"), split_file=str(path))
    assert len(data.val) == 2
    assert f"test of {path} not used, as the source has its own" in data.note


def test_a_split_of_arrays_lists_positions(tmp_path):
    first = create_dataset("fake")
    path = tmp_path / "split.json"
    path.write_text(json.dumps(first.drawn))
    other = create_dataset("fake", seed=5)
    again = create_dataset("fake", seed=5, split_file=str(path))
    assert other.drawn != first.drawn
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not an object"),
        ('{"train": ["c0/00.png"]}', "not an object"),
        ('{"val": []}', "val is no list of images"),
        ('{"val": ["c0/00.png", 3]}', "other things than paths or positions"),
        ('{"val": ["c0/00.png"], "test": ["c0/00.png"]}', "c0/00.png is in val and in test"),
        ('{"val": ["c0/00.png", "c9/1.png", "x"]}', "not in the data: c9/1.png, x. Fix:"),
        (json.dumps({"val": [f"c1/{i:02}.png" for i in range(12)]}), "nothing to train for c1"),
        ("{", "split.json"),
    ],
)
def test_a_split_file_that_does_not_fit_is_named(tmp_path, text, message):
    photos = photo_folder(tmp_path / "photos")
    path = tmp_path / "split.json"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        create_dataset(
            "folder", dir=str(photos), image_size=8, loader="stream", split_file=str(path)
        )
