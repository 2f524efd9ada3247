"""The cache of decoded images: made once, continued, checked, rebuilt."""

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from classic_cnns.data import cache, create_dataset
from classic_cnns.data.decode import read_file
from classic_cnns.data.loaders import StreamLoader, create_loader
from classic_cnns.data.preprocess import Preprocess
from classic_cnns.data.splits import Encoded
from classic_cnns.errors import DataError
from classic_cnns.sharding import create_mesh

PREPROCESS = Preprocess((8, 8, 3))


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 16)
    names = []
    for i in range(50):
        path = tmp_path / f"{i}.png"
        pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        names.append(str(path))
    return Encoded(names, read_file)


def expected(images):
    return np.stack([PREPROCESS(name) for name in images.names])


def counting(images):
    reads = []

    def read(name):
        reads.append(name)
        return read_file(name)

    return Encoded(images.names, read), reads


def test_every_file_is_decoded_once_and_for_all(images, tmp_path):
    counted, reads = counting(images)
    done = []
    for _ in range(3):
        pixels, bad, text = cache.open_cache(
            counted, PREPROCESS, tmp_path / "c", workers=2, progress=done.append
        )
        np.testing.assert_array_equal(pixels, expected(images))
        assert bad == {}
    assert sorted(reads) == sorted(images.names)
    assert sum(done) == 50
    assert text.startswith("decoded earlier")
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 0


def test_other_files_or_geometry_are_another_cache(images, tmp_path):
    keys = {cache.cache_key(images, PREPROCESS)}
    keys.add(cache.cache_key(images, Preprocess((8, 9, 3))))
    keys.add(cache.cache_key(images, Preprocess((8, 8, 3), mode="crop")))
    keys.add(cache.cache_key(images[np.arange(49)], PREPROCESS))
    os.utime(images.names[3], (1, 1))
    keys.add(cache.cache_key(images, PREPROCESS))
    assert len(keys) == 5


@pytest.mark.parametrize("harm", ["cut", "bit", "manifest", "gone"])
def test_a_damaged_cache_is_made_again(images, tmp_path, harm):
    cache.open_cache(images, PREPROCESS, tmp_path / "c")
    place = tmp_path / "c" / cache.cache_key(images, PREPROCESS)
    file = place / "images.bin"
    if harm == "cut":
        os.truncate(file, 1000)
    elif harm == "bit":
        data = bytearray(file.read_bytes())
        data[4321] ^= 4
        file.write_bytes(data)
    elif harm == "manifest":
        (place / "manifest.json").write_text('{"shape": [')
    else:
        file.unlink()
    pixels, _, text = cache.open_cache(images, PREPROCESS, tmp_path / "c")
    np.testing.assert_array_equal(pixels, expected(images))
    assert text.startswith("decoded again (")


def test_an_interrupted_build_goes_on(images, tmp_path):
    class Killed(BaseException):
        pass

    def read(name):
        if name == images.names[37]:
            raise Killed
        return read_file(name)

    with pytest.raises(Killed):
        cache.open_cache(Encoded(images.names, read), PREPROCESS, tmp_path / "c", workers=1)
    building = next((tmp_path / "c").glob(".*.building"))
    lines = (building / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["chunk"] for line in lines] == [0, 1]
    data = bytearray((building / "images.bin").read_bytes())
    data[20] ^= 1  # chunk 0 was damaged meanwhile
    (building / "images.bin").write_bytes(data)
    counted, reads = counting(images)
    pixels, _, _ = cache.open_cache(counted, PREPROCESS, tmp_path / "c")
    np.testing.assert_array_equal(pixels, expected(images))
    assert sorted(reads) == sorted(images.names[:16] + images.names[32:])
    assert not building.exists()


def test_bad_files_are_remembered(images, tmp_path):
    with open(images.names[20], "wb") as file:
        file.write(b"junk")
    for _ in range(2):
        _, bad, _ = cache.open_cache(images, PREPROCESS, tmp_path / "c")
        assert bad == {20: "not an image of a supported format"}
    with pytest.raises(DataError, match=r"1 of 50 files.*\n  'x': not an image"):
        cache.report_bad({"x": bad[20]}, 50, limit=0.1, skip=False)
    assert "left out" in cache.report_bad({"x": bad[20]}, 50, limit=0.1, skip=True)[0]
    with pytest.raises(DataError, match="max_bad_fraction"):
        cache.report_bad({"x": bad[20]}, 50, limit=0.01, skip=True)


def test_an_error_of_reading_is_not_remembered(images, tmp_path):
    def failing(name):
        if name == images.names[20]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_file(name)

    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        cache.open_cache(Encoded(images.names, failing), PREPROCESS, tmp_path / "c")
    counted, reads = counting(images)
    pixels, bad, _ = cache.open_cache(counted, PREPROCESS, tmp_path / "c")
    np.testing.assert_array_equal(pixels, expected(images))
    assert bad == {}
    assert images.names[0] not in reads  # of a chunk that was whole


def test_names_that_are_of_no_file_need_an_origin(images):
    with pytest.raises(FileNotFoundError):
        cache.cache_key(Encoded(["test 0"], read_file), PREPROCESS)
    keys = {
        cache.cache_key(Encoded(["test 0"], read_file, origin)[np.arange(1)], PREPROCESS)
        for origin in ("cifar10", "cifar100")
    }
    assert len(keys) == 2


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 100, 200)).save(path)
    return tmp_path / "photos"


def test_training_data_from_a_cache(folder, tmp_path):
    plain = create_dataset("folder", dir=str(folder), image_size=8)
    settings = {"dir": str(folder), "image_size": 8, "cache": str(tmp_path / "c")}
    for _ in range(2):
        mapped = create_dataset("folder", **settings)
        for name, split in plain.splits.items():
            np.testing.assert_array_equal(mapped.splits[name].images, split.images)
        assert mapped.fingerprint == plain.fingerprint
    assert len(list((tmp_path / "c").glob("*/images.bin"))) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_without_room_for_the_cache_it_goes_on(folder, tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    data = create_dataset("folder", dir=str(folder), image_size=8, cache=str(tmp_path / "c"))
    assert len(data.train) + len(data.val) + len(data.test) == 20
    assert os.strerror(number) in data.warnings[0]
    assert "going on without" in data.warnings[0]
    assert len(data.warnings) == 1  # for all three splits
    if number == errno.ENOSPC:
        assert not list((tmp_path / "c").glob(".*.building"))


def test_without_a_cache_what_does_not_fit_is_streamed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("classic_cnns.data.free_memory", lambda: 2000)  # of 3,840 bytes
    (tmp_path / "c").write_text("in the way")
    settings = {"dir": str(folder), "image_size": 8, "cache": str(tmp_path / "c")}
    data = create_dataset("folder", **settings)
    assert data.train.encoded
    assert "going on without" in data.warnings[0]
    with pytest.raises(DataError, match="loader=stream"):
        create_dataset("folder", **settings, loader="resident")


def test_skipped_files_are_left_out_of_the_split(folder):
    (folder / "a" / "0.png").write_bytes(b"junk")
    data = create_dataset(
        "folder", dir=str(folder), image_size=8, on_bad_image="skip", max_bad_fraction=0.5
    )
    assert len(data.train) + len(data.val) + len(data.test) == 19
    assert "a/0.png" in data.warnings[0]
    mapped = create_dataset(
        "folder", dir=str(folder), image_size=8, on_bad_image="skip", max_bad_fraction=0.5,
        cache=str(folder.parent / "c"),
    )  # fmt: skip
    assert mapped.fingerprint == data.fingerprint
    for name, split in mapped.splits.items():
        loader = create_loader(split, 8, seed=0, mesh=create_mesh(8), preprocess=data.preprocess)
        assert isinstance(loader, StreamLoader)  # from the file, not from a copy in memory
        seen = [np.asarray(item["image"]) for item in loader.evaluation()]
        expected = data.splits[name].images
        np.testing.assert_array_equal(np.concatenate(seen)[: len(expected)], expected)
    assert all(split.images[..., 1].min() == 100 for split in data.splits.values())
