"""The whole program in one process, on eight devices."""

import csv
import json
import shutil
import struct
import time

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

import classic_cnns
from classic_cnns import rundir, train
from classic_cnns.data.loaders import ResidentLoader, StreamLoader
from classic_cnns.data.sources import fake
from classic_cnns.durations import Durations, durations, next_event
from classic_cnns.errors import ConfigError, DataError, NonFiniteError, WorkdirError
from classic_cnns.logging import Display, read_records
from classic_cnns.sharding import create_mesh
from classic_cnns.timing import Clock

pytestmark = pytest.mark.usefixtures("quick_compile")

TIMES = ("images_per_sec", "input_wait")


def records(workdir):
    return [
        {k: v for k, v in r.items() if k not in TIMES}
        for r in read_records(workdir / "metrics.jsonl")
    ]


class Stop(Exception):
    pass


def stop_at(step, monkeypatch):
    """Makes the training stop hard when it asks for the images of a step."""
    for kind in (ResidentLoader, StreamLoader):
        plain = kind.train

        def train(self, at, count=1, room=0, plain=plain):
            if at <= step < at + count:
                raise Stop
            return plain(self, at, count, room)

        monkeypatch.setattr(kind, "train", train)


def tensorboard_points(directory):
    """{name: {step: value}} of one event file; none has two values at a step."""
    (file,) = directory.iterdir()
    data, points = file.read_bytes(), {}
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        for value in event.summary.value:
            assert event.step not in points.setdefault(value.tag, {}), value.tag
            points[value.tag][event.step] = value.simple_value
    return points


def test_a_run_and_its_directory(finished):
    run, state, summary = finished.workdir, finished.state, finished.summary
    assert int(state.step) == summary["steps"] == 60
    assert "lenet5: 62,006 parameters, 0.0006517 GMACs" in finished.printed
    assert "810 images: 81 of each class" in finished.printed
    assert "weight decay 0.0005 on 5 of 10 tensors" in finished.printed
    last = finished.printed.strip().splitlines()[-1]
    assert json.loads(last.removeprefix("RESULT ")) == summary
    assert summary["test_accuracy"] > 0.5

    evals = [r for r in records(run) if "eval_loss" in r]
    assert [r["step"] for r in evals] == [25, 50, 60]
    assert summary["val_accuracy"] == max(r["eval_accuracy"] for r in evals)
    with (run / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [25, 50, 60]
    for name in ("curves", "schedule", "train_batch"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    logged = [r["step"] for r in records(run) if "eval_loss" not in r]
    points = tensorboard_points(run / "tensorboard")
    assert list(points["train_loss"]) == list(points["learning_rate"]) == logged
    means = {r["step"]: pytest.approx(r["train_loss"]) for r in evals}
    assert points["epoch_train_loss"] == means
    assert list(points["eval_accuracy"]) == [25, 50, 60]
    info = rundir.read_json(run / "run.json")
    assert len(info["classes"]) == 10
    assert info["versions"]["jax"] == jax.__version__

    loaded = classic_cnns.load(run, "latest")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, jax.device_get(state.variables))
    assert classic_cnns.load(run).step == summary["best_step"]
    assert loaded.preprocess.image_shape == (32, 32, 3)
    text = (run / "weights.txt").read_text()
    assert "params/conv1/kernel\n(5, 5, 3, 6)\n" in text
    assert "..." not in text
    with pytest.raises(WorkdirError, match=r"no averaged weights. Fix: train with config.ema"):
        classic_cnns.load(run, ema=True)


def test_an_ended_run_is_not_trained_again(finished, config, tmp_path, capsys):
    run = shutil.copytree(finished.workdir, tmp_path / "run")
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    config.weights_txt = True
    _, same = classic_cnns.train_and_evaluate(config, run)
    assert same == finished.summary
    assert "already complete" in capsys.readouterr().out

    info = rundir.read_json(run / "run.json")
    rundir.write_json(run / "run.json", info | {"data_fingerprint": "0" * 64})
    with pytest.raises(DataError, match="dataset changed since step 60"):
        classic_cnns.train_and_evaluate(config, run)

    config.log_every_steps = 3  # may change
    config.optimizer.name = "adam"
    config.batch_size = 16
    with pytest.raises(
        WorkdirError, match=r"batch_size: 32 → 16; optimizer.name: 'sgd' → 'adam'. Fix:"
    ):
        classic_cnns.train_and_evaluate(config, run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before


def test_stopped_and_continued_is_the_same_to_the_bit(finished, config, tmp_path, monkeypatch):
    for step in (13, 58):  # checkpoints are at 10, 20, 25, 30, 40, 50, 60
        with monkeypatch.context() as context:
            stop_at(step, context)
            with pytest.raises(Stop):
                classic_cnns.train_and_evaluate(config, tmp_path)
    parts, same = classic_cnns.train_and_evaluate(config, tmp_path)
    whole, summary = finished.state, finished.summary
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(parts))
    for key in summary.keys() - {"seconds", "workdir", "goodput"}:
        assert summary[key] == same[key], key
    assert records(finished.workdir) == records(tmp_path)


def test_a_streamed_run_continues_to_the_bit(config, tmp_path, monkeypatch):
    made = fake(16, count=120)["all"]
    for i, (pixels, label) in enumerate(zip(made.images, made.labels, strict=True)):
        folder = tmp_path / "photos" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    config.num_steps, config.checkpoint_every_steps = 14, 3
    config.data.update(source="folder", dir=str(tmp_path / "photos"), image_size=16)
    config.data.loader = "stream"
    whole, _ = classic_cnns.train_and_evaluate(config, tmp_path / "a")
    config.data.loader = "auto"
    with monkeypatch.context() as context:
        context.setattr("classic_cnns.data.free_memory", lambda: 0)
        stop_at(8, context)
        with pytest.raises(Stop):
            classic_cnns.train_and_evaluate(config, tmp_path / "b")
    # There is memory now, the folder has moved, and a cache is asked for: it streams as before.
    (tmp_path / "photos").rename(tmp_path / "moved")
    config.data.update(dir=str(tmp_path / "moved"), cache=str(tmp_path / "cache"))
    parts, _ = classic_cnns.train_and_evaluate(config, tmp_path / "b")
    assert not (tmp_path / "cache").exists()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(parts))
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert len(records(tmp_path / "a")[-1]["eval_recall"]) == 10

    # The same images, kept in memory: the same training.
    config.data.update(loader="resident", cache="")
    again, _ = classic_cnns.train_and_evaluate(config, tmp_path / "c")
    for a, b in zip(*map(jax.tree.leaves, (whole.params, again.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_progress_is_that_of_the_device(config, tmp_path, monkeypatch):
    # Thirty steps sent ahead would be thirty to finish after Ctrl-C, and a bar that lies.
    times = []
    advance, pause = Display.advance, Clock.pause
    monkeypatch.setattr(
        Display, "advance", lambda *a: (times.append(time.monotonic()), advance(*a))[1]
    )
    monkeypatch.setattr(Clock, "pause", lambda *a: (times.append(time.monotonic()), pause(*a))[1])
    monkeypatch.setattr(train, "create_mesh", lambda: create_mesh(1))  # eight are slow to send to
    config.update(batch_size=128, num_steps=12, log_every_steps=12, checkpoint_every_steps=12)
    config.steps_per_dispatch = 1
    classic_cnns.train_and_evaluate(config, tmp_path)
    advanced, end = times[:12], times[12]
    assert (advanced[5] - advanced[0]) / (end - advanced[0]) > 0.1  # of 12 steps


def test_non_finite_names_step_rate_and_layer(config, tmp_path):
    config.optimizer.learning_rate = 1e20
    with pytest.raises(
        NonFiniteError, match=r"step 1, learning rate 4e\+19: the output of \w+ is the first"
    ):
        classic_cnns.train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (("batch_size", 30), ConfigError, "cannot be split over 8 devices"),
        (("batch_size", 2000), ConfigError, "has no step: 810 images in batches of 2,000"),
        (("model.name", "lenet"), ConfigError, "did you mean"),
        (("data.source", "cfar10"), ConfigError, "did you mean"),
        (
            ("data.image_size", 8),
            ConfigError,
            r"lenet5, which takes 16 px or more. Fix: --config.data.i",
        ),
        (("optimizer.name", "sdg"), ConfigError, "did you mean"),
        (("num_steps", -1), ConfigError, "num_steps is negative"),
        (("log_every_steps", 0), ConfigError, "log_every_steps is below 1"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(config, tmp_path, change, error, text):
    field, value = change
    config.update_from_flattened_dict({field: value})
    if field == "batch_size" and value == 2000:
        config.num_steps = 0
        config.num_epochs = 1.0
    with pytest.raises(error, match=text):
        classic_cnns.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_data_writes_nothing(config, tmp_path):
    config.data.source, config.data.dir = "folder", str(tmp_path / "none")
    with pytest.raises(DataError, match="not a directory"):
        classic_cnns.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_directories_are_numbered_and_locked(tmp_path):
    assert [rundir.claim(tmp_path / "runs", "a-b").name for _ in range(3)] == [
        "a-b-1",
        "a-b-2",
        "a-b-3",
    ]
    with (
        rundir.lock(tmp_path / "run"),
        pytest.raises(WorkdirError, match=r"in use by pid \d+ on"),
        rundir.lock(tmp_path / "run"),
    ):
        pass
    with rundir.lock(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(WorkdirError, match=r"Not a directory|File exists"),
        rundir.lock(tmp_path / "file"),
    ):
        pass


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(
        WorkdirError, match=r"run\.json is missing. Fix: give the directory of a run"
    ):
        classic_cnns.load(tmp_path)


def test_durations(config):
    config.num_steps = config.schedule.warmup_steps = config.checkpoint_every_steps = 0
    config.num_epochs, config.batch_size, config.eval_every_epochs = 2.0, 64, 0.5
    spans = durations(config, 100)
    assert spans == Durations(
        100 / 64, total=3, warmup=1, eval_every=1.0, checkpoint_every=100 / 64
    )
    assert [next_event(step, 2.5) for step in range(8)] == [2, 2, 5, 5, 5, 7, 7, 10]
    assert [next_event(step, 3) for step in range(4)] == [3, 3, 3, 6]


def test_records_cut_by_a_kill_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_file_of_the_run_that_cannot_be_written_is_named(tmp_path):
    from classic_cnns import rundir

    (tmp_path / "run.json").mkdir()
    with (
        pytest.raises(WorkdirError, match=r"run\.json.*: Is a directory\. Fix: the disk"),
        rundir.reporting(tmp_path),
    ):
        rundir.write_json(tmp_path / "run.json", {})
    assert not (tmp_path / "traceback.txt").exists()
    with pytest.raises(OSError, match="elsewhere"), rundir.reporting(tmp_path):
        (tmp_path.parent / "elsewhere" / "file").write_text("")
    assert "elsewhere" in (tmp_path / "traceback.txt").read_text()
