"""fit-batch asks the compiler; benchmark's numbers belong together; the peer is plain flax."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from classic_cnns import cli
from classic_cnns.models.resnet import ResNet

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "lenet5.py:fake")


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_fit_batch_stops_at_the_limit(capsys, monkeypatch):
    from classic_cnns import fit_batch

    plain, asked, needed = fit_batch.step_bytes, [], []

    def step_bytes(task, tx, size):
        asked.append(size)
        if size > 8:
            return size * 2**20
        # Compiled for the smallest only, which tells that the account is of the right order.
        needed.append(plain(task, tx, size))
        return needed[-1]

    monkeypatch.setattr(fit_batch, "step_bytes", step_bytes)
    assert cli.main(["fit-batch", CONFIG, "--gib=0.05"]) == 0
    out = capsys.readouterr().out
    assert asked == [8, 16, 32, 64]
    asked.clear()
    parts = ["--config.batch_size=64", "--config.accumulate_steps=2"]
    assert cli.main(["fit-batch", CONFIG, "--gib=0.001", *parts]) == 2
    assert asked == [16]
    assert "suggestion: --config.batch_size=32" in out
    # 62,006 parameters with momentum, in and out of the step: 1 MB; 810 images of 3 kB: 2.5 MB.
    smallest = float(next(line for line in out.splitlines() if "batch      8" in line).split()[2])
    assert 0.0025 < smallest < 0.02
    assert cli.main(["fit-batch", CONFIG, "--gib=0.01", "--config.ema_decay=0.9"]) == 0
    # The averages; and without them what is temporary may lie where the new parameters come.
    assert 0.98 <= (needed[1] - needed[0]) / (4 * 62_006) <= 2
    monkeypatch.setattr(fit_batch, "step_bytes", lambda *_: 2**40)
    assert cli.main(["fit-batch", CONFIG]) == 2


def test_benchmark(tmp_path, capsys):
    path = tmp_path / "b.json"
    args = ["benchmark", "lenet5", "--batch-size=8", "--seconds=0.5", f"--json={path}"]
    assert cli.main(args) == 0
    row = json.loads(path.read_text())["rows"][0]
    assert row["parameters"] == 62006
    assert row["gmacs"] == pytest.approx(651_720e-9, rel=1e-3)
    for key, factor in (("train", 3), ("eval", 1)):
        speed = row[key]
        assert speed["n"] >= 5
        images = 8 * (row["steps_per_call"] if key == "train" else 1)  # a call
        assert speed["n"] * images / speed["min"] >= 0.5
        assert speed["n"] == 5 or (speed["n"] - 1) * images / speed["max"] < 0.5
        assert speed["min"] <= speed["images_per_sec"] <= speed["max"]
        expected = factor * row["gmacs"] * speed["images_per_sec"]
        assert speed["gmacs_per_sec"] == pytest.approx(expected)
    assert f"{row['train']['images_per_sec']:,.1f}" in capsys.readouterr().out
    assert cli.main(["benchmark", "lenet5", "--image-size=8"]) == 2
    assert cli.main(["benchmark", "lenet"]) == 2


def test_the_plain_network_beside_ours_is_the_same_function(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from peers import plain_linen

    model, x = ResNet("basic", (1,), 10), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    ours = jax.jit(model.apply)
    with plain_linen():
        plain = jax.jit(lambda *args: model.apply(*args))
        text = str(plain.trace(variables, x).jaxpr)
        logits = plain(variables, x)
    assert "residual_relu" in str(ours.trace(variables, x).jaxpr)
    assert "residual_relu" not in text
    assert text.count("conv_general_dilated[") == 3
    np.testing.assert_allclose(ours(variables, x), logits, rtol=1e-4, atol=1e-5)


def test_rows_replace_their_own_and_never_those_of_another_machine(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import train_step

    def row(**fields):
        return {"model": "a", "side": 32, "batch": 64, "dtype": "float32", "peer": "ours"} | fields

    path = tmp_path / "rows.json"
    train_step.write(path, [row(), row(peer="theirs")])
    train_step.write(path, [row(batch=32)])
    train_step.write(path, [row(model="b"), row(speed=2)])
    assert train_step.rows_of(path) == [row(batch=32), row(model="b"), row(speed=2)]
    before = path.read_text()
    monkeypatch.setattr(train_step, "machine", lambda: "another")
    with pytest.raises(SystemExit, match="another --out"):
        train_step.write(path, [row()])
    assert path.read_text() == before
