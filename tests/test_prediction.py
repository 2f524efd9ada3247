"""What a run says of images, from Python and from the shell."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from seeded import seeded_variables

import classic_cnns
from classic_cnns import cli, predict
from classic_cnns.data.augment import normalize
from classic_cnns.data.preprocess import Preprocess
from classic_cnns.errors import ConfigError, DataError
from classic_cnns.loading import LoadedRun
from classic_cnns.models import create_model
from classic_cnns.weights import save_bundle

pytestmark = pytest.mark.usefixtures("quick_compile")

CLASSES = ("cat", "dög", "\udcff", "a, b")
PREPROCESS = Preprocess((32, 32, 3), mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def run():
    model = create_model("lenet5", len(CLASSES))
    return LoadedRun(model, seeded_variables(model, 32), CLASSES, PREPROCESS, 0, "lenet5")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven images in two folders, a damaged one, a hidden one and a text."""
    root = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    for i, image in enumerate(pixels):
        path = root / ("b" if i % 2 else "a") / f"{i}.PNG"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    (root / "b" / ".hidden.png").write_bytes(b"")
    (root / "notes.txt").write_text("none")
    return root, pixels


def expected(run, pixels, flip=False):
    def probabilities(images):
        x = normalize(images, PREPROCESS.mean, PREPROCESS.std)
        return run.model.apply(run.variables, x, train=False)

    logits = jax.jit(probabilities)(pixels)
    if flip:
        logits = (logits + jax.jit(probabilities)(pixels[:, :, ::-1])) / 2
    return np.asarray(jax.nn.softmax(logits))


def test_probabilities_of_files_and_of_pixels(run, photos):
    root, pixels = photos
    files = [root / ("b" if i % 2 else "a") / f"{i}.PNG" for i in range(7)]
    for batch_size in (3, 64):  # the last batch is not full
        for images in (files, list(map(str, files)), pixels):
            out = predict(run, images, batch_size=batch_size)
            np.testing.assert_allclose(out, expected(run, pixels), atol=1e-6)
    assert (out.shape, out.dtype) == ((7, 4), np.float32)
    assert np.ptp(out, axis=0).max() > 0.1, "all images look the same"
    mirrored = predict(run, pixels, flip=True)
    np.testing.assert_allclose(mirrored, expected(run, pixels, flip=True), atol=1e-6)
    assert abs(mirrored - out).max() > 0.01
    assert predict(run, []).shape == predict(run, pixels[:0]).shape == (0, 4)


def test_images_that_are_none(run, photos, tmp_path):
    root, pixels = photos
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"1 of 2 images .*x\.png: .*Fix: leave them out"):
        predict(run, [root / "a" / "0.PNG", tmp_path / "x.png"])
    for wrong in (pixels.astype(np.float32), pixels[0], pixels[..., :1], pixels[:, :28]):
        with pytest.raises(ConfigError, match=r"Fix: \(N, 32, 32, 3\) uint8, or paths"):
            predict(run, wrong)


def test_from_the_shell(run, photos, tmp_path, capsys):
    root, pixels = photos
    bundle = str(save_bundle(run, tmp_path / "bundle"))
    order = [0, 2, 4, 6, 1, 3, 5]
    assert cli.main(["predict", bundle, str(root), "--top", "2", "--batch-size", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [str(root / ("b" if i % 2 else "a") / f"{i}.PNG") for i in order]
    for line, name, p in zip(lines, names, expected(run, pixels)[order], strict=True):
        best = np.argsort(-p)[:2]
        shown = [("cat", "dög", r"'\udcff'", "a, b")[i] for i in best]
        assert line == f"{name}  {shown[0]} {p[best[0]]:.3f}, {shown[1]} {p[best[1]]:.3f}"

    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    files = [names[0], str(tmp_path / "x.png")]
    assert cli.main(["predict", bundle, *files, "--json"]) == 3
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first["file"] == names[0]
    assert len(first["predictions"]) == 3
    best = first["predictions"][0]["probability"]
    assert best == pytest.approx(expected(run, pixels).max(1)[0])
    assert second == {"file": files[1], "error": second["error"]}
    assert err == "ERROR 1 of 2 images cannot be decoded. Fix: leave them out\n"
    assert cli.main(["predict", bundle, *files]) == 3
    assert capsys.readouterr().err.startswith(f"WARNING {files[1]}: ")

    empty = tmp_path / "empty"
    empty.mkdir()
    for paths, code, text in (
        ([str(empty)], 3, "no images in it"),
        (["/no/1", names[0], "/no/2"], 3, "no such file: /no/1, /no/2. Fix: the path"),
        ([*files, "--top", "0"], 2, "are 1 or more"),
        ([*files, "--ema"], 4, "no averaged weights"),
    ):
        assert cli.main(["predict", bundle, *paths]) == code
        assert text in capsys.readouterr().err


def test_a_reader_that_ends_is_no_error(run, photos, tmp_path):
    bundle = str(save_bundle(run, tmp_path / "bundle"))
    command = f"{sys.executable} -m classic_cnns.cli predict {bundle} {photos[0]} --batch-size 1"
    piped = f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] in (["141"], ["0"])
    assert "rror" not in done.stderr


def test_a_run_predicts_as_it_is_evaluated(tmp_path, config, capsys):
    """With its flips, on its own test images, written to files."""
    config.test_time_flip, config.data.source = True, "fake"
    _, summary = classic_cnns.train_and_evaluate(config, tmp_path / "run")
    from classic_cnns.loading import load_dataset

    run = classic_cnns.load(tmp_path / "run")
    test = load_dataset(tmp_path / "run", run).test
    for i, image in enumerate(test.images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(len(test))]
    capsys.readouterr()
    assert cli.main(["predict", str(tmp_path / "run"), *files, "--top", "1", "--json"]) == 0
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    best = [int(line["predictions"][0]["class"]) for line in lines]
    assert np.mean(best == test.labels) == pytest.approx(summary["test_accuracy"])
    best = predict(run, test.images, flip=True).argmax(1)
    assert (best == test.labels).mean() == pytest.approx(summary["test_accuracy"])
