"""CSV and NumPy sources, choice of the loader, settings."""

import importlib.util
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from classic_cnns.data import create_dataset
from classic_cnns.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def table(tmp_path):
    rows = []
    for i in range(24):
        name = f"pictures/{i}.png"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / name)
        rows.append([name, ("zebra", "ant", "cat")[i % 3]])
    return tmp_path, rows


def write(path, header, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    return str(path)


def test_a_table_of_paths_and_labels(table):
    root, rows = table
    file = write(root / "labels.csv", ["path", "label"], rows)
    data = create_dataset("csv", dir=file, image_size=8)
    assert data.classes == ("ant", "cat", "zebra")
    for split in data.splits.values():
        reds = split.images[:, 0, 0, 0]
        assert split.labels.tolist() == [(2, 0, 1)[i % 3] for i in reds]
    assert sum(map(len, data.splits.values())) == 24

    parts = [[*row, ("train", "validation")[i % 4 == 0]] for i, row in enumerate(rows)]
    file = write(root / "split.csv", ["path", "label", "split"], parts)
    data = create_dataset("csv", dir=file, image_size=8)
    assert data.val.images[:, 0, 0, 0].tolist() == list(range(0, 24, 4))
    assert data.test is None


def test_everything_wrong_with_a_table_at_once(table):
    root, rows = table
    rows = [["gone.png", "cat", ""], [rows[0][0], "", ""], [rows[1][0], "ant", "tset"]]
    file = write(root / "labels.csv", ["path", "label", "split"], rows)
    with pytest.raises(DataError) as error:
        create_dataset("csv", dir=file)
    for text in ("line 2: no file 'gone.png'", "line 3: an empty field", "line 4: unknown split"):
        assert text in str(error.value)
    with pytest.raises(DataError, match="path,label"):
        create_dataset("csv", dir=write(root / "x.csv", ["file", "class"], []))
    with pytest.raises(DataError, match="is not a file"):
        create_dataset("csv", dir=str(root / "none.csv"))


def test_rows_that_would_leak_or_leave_a_class_untrained(table):
    root, rows = table
    rows.append(rows[3])
    with pytest.raises(DataError, match=r"line 26: 'pictures/3\.png' once more"):
        create_dataset("csv", dir=write(root / "a.csv", ["path", "label"], rows))
    parts = [[*row, "val" if row[1] == "ant" else "train"] for row in rows]
    file = write(root / "b.csv", ["path", "label", "split"], parts)
    with pytest.raises(DataError, match="1 problems: no row of 'ant' is in train"):
        create_dataset("csv", dir=file)  # that 3.png is there twice is how it is weighted
    (root / "c.csv").write_bytes("path,label\ncaf\xe9.png,a\n".encode("latin-1"))
    with pytest.raises(DataError, match="Fix: a CSV file in UTF-8"):
        create_dataset("csv", dir=str(root / "c.csv"))


def test_arrays_that_cannot_be_trained_on(tmp_path):
    x, y = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 4
    for number, (arrays, text) in enumerate(
        (
            ({"x_train": x, "y_train": y, "x_test": x[:, :6, :6], "y_test": y}, "shapes"),
            ({"x_train": x, "y_train": y, "x_val": x[:0], "y_val": y[:0]}, "y_val is empty"),
            ({"images": x, "labels": y + 2**32}, "labels is empty, or has numbers"),
            ({"images": x, "labels": y * 0}, "fewer than two classes"),
        )
    ):
        np.savez(tmp_path / f"{number}.npz", **arrays)
        with pytest.raises(DataError, match=text):
            create_dataset("npz", dir=str(tmp_path / f"{number}.npz"))
    names = np.array([b"cat", b"dog", b"ant", b"fox"])
    np.savez(tmp_path / "n.npz", images=x, labels=y, classes=names)
    file = tmp_path / "n.npz"
    assert create_dataset("npz", dir=str(file)).classes == ("cat", "dog", "ant", "fox")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"an \.npz file without objects"):
        create_dataset("npz", dir=str(file))


def test_arrays(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 8, 8), np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "all.npz", images=x, labels=y)
    data = create_dataset("npz", dir=str(tmp_path / "all.npz"))
    assert data.image_shape == (8, 8, 1)
    assert data.classes == ("0", "1", "2", "3")
    assert abs(data.preprocess.mean[0] - 0.5) < 0.02
    assert abs(data.preprocess.std[0] - 0.29) < 0.02

    np.savez(tmp_path / "k.npz", x_train=x, y_train=y[:, None], x_test=x[:8], y_test=y[:8, None])
    data = create_dataset("npz", dir=str(tmp_path / "k.npz"), image_size=16)
    np.testing.assert_array_equal(data.test.labels, y[:8])
    assert data.image_shape == (16, 16, 1)

    np.savez(tmp_path / "bad.npz", x_train=x / 255, y_train=y[:-1])
    with pytest.raises(DataError, match=r"x_train is float64.*y_train is int64\(39,\)"):
        create_dataset("npz", dir=str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "objects.npz", images=np.array([{}, []], object), labels=y)
    with pytest.raises(DataError, match="allow_pickle=False"):
        create_dataset("npz", dir=str(tmp_path / "objects.npz"))


@pytest.fixture
def prepared(tmp_path):
    """A dataset made by tensorflow-datasets: 24 and 6 images of 8×8, red = number in the split."""
    with zipfile.ZipFile(Path(__file__).parent / "fixtures" / "toy_set.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def test_tfds_is_read_without_tensorflow(prepared):
    data = create_dataset("tfds:toy_set", dir=str(prepared))
    assert data.classes == ("ant", "bee", "cat")
    assert [len(s) for s in (data.train, data.val, data.test)] == [21, 3, 6]
    for split in data.splits.values():
        reds = split.images[:, 0, 0, 0].astype(int)
        np.testing.assert_array_equal(split.labels, reds % 3)
        assert (split.images[..., 1] == (100 if split is data.test else 0)).all()
    halves = {"train": "train[:50%]", "val": "train[50%:]", "test": "test"}
    data = create_dataset("tfds:toy_set", dir=str(prepared), splits=halves, loader="stream")
    assert [len(s) for s in (data.train, data.val, data.test)] == [12, 12, 6]
    assert data.train.encoded
    assert "tensorflow" not in sys.modules


def test_tfds_says_what_is_wrong(prepared, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"mnist is not prepared.*tfds build mnist --file_format a"):
        create_dataset("tfds:mnist", dir=str(prepared))
    with pytest.raises(ConfigError, match="mnits"):
        create_dataset("tfds:mnits", dir=str(prepared))
    with pytest.raises(ConfigError, match=r'no split "valid".*one of train, test'):
        create_dataset("tfds:toy_set", dir=str(prepared), splits={"train": "train", "val": "valid"})
    with pytest.raises(ConfigError, match="train, val and test"):
        create_dataset("tfds:toy_set", dir=str(prepared), splits={"test": "test"})


def test_a_damaged_shard_is_named(prepared):
    shard = next(prepared.rglob("*train.array_record*"))
    data = bytearray(shard.read_bytes())
    start = data.find(b"PNG") + 20
    data[start : start + 64] = bytes(64)
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"toy_set.*damaged shard among examples 0 to 24 of train"):
        create_dataset("tfds:toy_set", dir=str(prepared))


def test_the_loader_follows_the_size(table):
    root, rows = table
    file = write(root / "labels.csv", ["path", "label"], rows)

    def streams(**settings):
        return create_dataset("csv", dir=file, image_size=32, **settings).train.encoded

    assert not streams()
    assert streams(resident_gb=1e-6)
    assert streams(loader="stream")
    assert not streams(loader="resident", resident_gb=1e-6)


def test_all_wrong_settings_at_once():
    with pytest.raises(ConfigError) as error:
        create_dataset("folder", loader="steam", on_bad_image="ignore", workers=-1)
    assert str(error.value) == (
        'data.loader is "steam", which is unknown; '
        'data.on_bad_image is "ignore", which is unknown; '
        "data.workers is -1; data.dir is empty. "
        'Fix: data.loader: did you mean "stream"?; data.on_bad_image: use one of error, skip; '
        "data.workers: 0 or more; data.dir: a folder with a sub-folder a class"
    )


def test_random_crops_come_from_larger_squares_or_from_the_host(table):
    from classic_cnns import config as config_lib
    from configs import default

    root, rows = table
    config = default.get_config("folder")
    config.data.update(source="csv", dir=write(root / "l.csv", ["path", "label"], rows))
    config.data.image_size, config.augment.crop_padding = 21, 0
    config.augment.random_resized_crop, config.augment.flip = (0.2, 0.5), "none"
    for loader, side, scale in (("resident", 24, (0.2, 0.5)), ("stream", 21, (0.2, 0.5))):
        config.data.loader = loader
        data = config_lib.dataset_from(config)
        assert data.image_shape == (21, 21, 3)
        settings = config_lib.loader_settings(config, data, "train")
        assert settings["crop_scale"] == scale
        assert config_lib.loader_settings(config, data, "val")["crop_scale"] == ()
        images = np.arange(24 * 24 * 3, dtype=np.uint32).astype(np.uint8).reshape(1, 24, 24, 3)
        images = images[:, :side, :side]
        batch = config_lib.augment_from(config, data)(jax.random.key(0), {"image": images})
        assert batch["image"].shape == (1, 21, 21, 3)
        if loader == "stream":  # cropped already
            np.testing.assert_array_equal(batch["image"], images)
        else:
            assert data.train.images.shape[1] == 24
