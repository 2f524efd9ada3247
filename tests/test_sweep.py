"""A sweep is the trainings of its grid, told apart, gone on with and summed up."""

import os
import sys
from pathlib import Path

import pytest

from classic_cnns import cli, sweep
from classic_cnns.errors import ConfigError

ROOT = Path(__file__).parents[1]
RATE, DECAY = "optimizer.learning_rate", "optimizer.weight_decay"


def test_grid_and_seeds():
    points = sweep.parse_grid([f"{RATE}=0.1,0.3", f"{DECAY}=0,1e-4"])
    assert points[1] == ((RATE, "0.1"), (DECAY, "1e-4"))
    assert len(points) == 4
    crops = sweep.parse_grid(["augment.random_resized_crop=(0.25,1.0),(0.5,1.0),()"])
    assert [value for ((_, value),) in crops] == ["(0.25,1.0)", "(0.5,1.0)", "()"]
    assert sweep.name_of(points[1], 2) == "learning_rate=0.1_weight_decay=1e-4_seed=2"
    assert "/" not in sweep.name_of((("data.dir", "../../x"),), 0)
    assert sweep.parse_seeds("0-2,7,1") == [0, 1, 2, 7]
    for grid in (["lr"], ["a=1,"], ["=1"], ["a=1", "a=2"], ["seed=1,2"], ["a=1,1"]):
        with pytest.raises(ConfigError, match="Fix:"):
            sweep.parse_grid(grid)
    for seeds in ("", "2-0", "a", "1-"):
        with pytest.raises(ConfigError, match="Fix:"):
            sweep.parse_seeds(seeds)


def test_table():
    points = sweep.parse_grid([f"{RATE}=0.1,0.3,9"])
    low, high, wild = points
    made = [{"val_accuracy": v, "test_accuracy": v - 0.1} for v in (0.5, 0.7, 0.9)]
    text = sweep.table(points, {low: made[:2], high: made[1:], wild: [made[2], None]})
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["0.1", "0.6000", "±", "0.1414", "2"]
    assert lines[2] == ["0.3", "0.8000", "±", "0.1414", "2", "*"]
    assert lines[3] == ["9", "0.9000", "1,", "1", "failed"]
    assert text.splitlines()[-1] == "* test accuracy 0.7000 ± 0.1414"
    averaged = {**made[0], "ema_val_accuracy": 0.75, "ema_test_accuracy": 0.71}
    text = sweep.table([low], {low: [averaged]})
    assert "0.7500  1 *" in text
    assert text.endswith("* test accuracy 0.7100")


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_the_command_trains_what_is_missing(tmp_path, capsys, monkeypatch):
    from classic_cnns import train
    from classic_cnns.errors import NonFiniteError

    trained = []

    def fake(config, workdir):
        import json

        trained.append((config.optimizer.learning_rate, config.seed, config.num_steps))
        if config.optimizer.learning_rate > 1:
            raise NonFiniteError("step 3. Fix: less")
        summary = {"val_accuracy": 0.5 + config.optimizer.learning_rate, "test_accuracy": 0.5}
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text(json.dumps(config.to_dict()))
        (workdir / "result.json").write_text(json.dumps(summary))
        return None, summary

    monkeypatch.setattr(train, "train_and_evaluate", fake)
    args = ["sweep", str(ROOT / "configs" / "lenet5.py:fake"), "--config.num_steps=5"]
    args += ["--config.schedule.warmup_epochs=0", "--out", str(tmp_path), "--grid"]
    assert cli.main([*args, f"{RATE}=0.1,5", "--seeds=0-1"]) == 0
    assert trained == [(0.1, 0, 5), (0.1, 1, 5), (5.0, 0, 5), (5.0, 1, 5)]
    out = capsys.readouterr().out
    assert "0.6000 ± 0.0000" in out
    assert "0, 2 failed" in out
    trained.clear()
    assert cli.main([*args, f"{RATE}=0.1,0.2", "--seeds=0-1"]) == 0
    assert trained == [(0.2, 0, 5), (0.2, 1, 5)]
    assert "* test accuracy 0.5000" in capsys.readouterr().out
    trained.clear()
    read, write = os.pipe()
    os.close(read)  # nobody reads any more
    with monkeypatch.context() as patch, open(write, "w") as nowhere:
        patch.setattr(sys, "stdout", nowhere)
        assert cli.main([*args, f"{RATE}=0.6,0.7"]) == 0
    assert trained == [(0.6, 0, 5), (0.7, 0, 5)]
    trained.clear()
    args[2] = "--config.num_steps=6"
    assert cli.main([*args, f"{RATE}=0.3,0.1"]) == 4
    assert not trained
    assert "another num_steps" in capsys.readouterr().err
    assert cli.main([*args, "schedule.factor=0.5,2"]) == 2  # before the first is trained
    assert not trained
    assert "schedule.factor is 2" in capsys.readouterr().err
    assert cli.main([*args, "optimizer.learning_rat=0.3"]) == 2
