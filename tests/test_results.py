"""The page of results says what its file says, and a row can be trained again."""

import csv
import json
from pathlib import Path

import pytest

from classic_cnns import cli, results
from classic_cnns.errors import ConfigError

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parents[1]


def test_the_page_is_the_file_and_the_curves_are_there():
    table = results.read(ROOT / "results" / "results.json")
    assert (ROOT / "docs" / "results.md").read_text() == results.page(table)
    for name, row in table.items():
        assert (ROOT / row["config"].split(":")[0]).is_file(), name
        if row.get("accuracy"):
            assert len(row["accuracy"]) == len(row["seeds"])
            for seed in row["seeds"]:
                with (ROOT / row["log"] / f"seed{seed}.csv").open() as file:
                    last = list(csv.DictReader(file))[-1]
                # Whole steps: the last one ends less than a step before the epochs do.
                done, step = float(last["epoch"]), float(last["epoch"]) / int(last["step"])
                assert row["epochs"] - step < done <= row["epochs"] + 1e-9, name


def test_measurements_of_a_row(tmp_path):
    curves = []
    for seed, speeds in enumerate(((100, 300), (200, 1000, 250))):
        curves.append(tmp_path / f"{seed}.csv")
        curves[-1].write_text("\n".join(["step,images_per_sec", *(f"1,{v}" for v in speeds)]))
    summaries = [
        {"test_accuracy": 0.5, "seconds": 9, "goodput": {"useful": 7, "eval": 3}},
        {"test_accuracy": 0.25, "seconds": 1, "goodput": {"useful": 4, "lost": 8, "eval": 2}},
    ]
    info = {"python": "3.11", "versions": {"jax": "0"}}
    row = results.with_measurements(
        {"config": "c.py"}, summaries, info, curves, hardware="h", log="results/a", epochs=2
    )
    assert row["images_per_sec"] == 250
    assert row["accuracy"] == [0.5, 0.25]
    assert row["seconds"] == 12
    assert row["versions"] == {"python": "3.11", "jax": "0"}


def test_band():
    row = {"accuracy": [0.90, 0.92, 0.94]}
    assert results.band(row) == pytest.approx((0.86, 0.98))
    assert results.band({"accuracy": [0.9, 0.9]}) == pytest.approx((0.898, 0.902))
    assert results.band({"accuracy": [0.9]}) == pytest.approx((0.885, 0.915))
    assert "92.00 ± 2.00 %" in results.page(
        {
            "a": row
            | {"config": "c.py", "overrides": [], "epochs": 1, "seconds": 2, "hardware": "h"}
            | {"images_per_sec": 3.0, "versions": {"jax": "0"}, "log": "results/a"}
        }
    )
    with pytest.raises(ConfigError, match="did you mean"):
        results.find({"lenet5-mnist": row}, "lenet5-mnst")
    with pytest.raises(ConfigError, match="no result yet"):
        results.find({"a": {}}, "a")


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_reproduce(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "results").mkdir()
    overrides = ["--config.num_steps=8", "--config.schedule.warmup_steps=1"]
    row = {"config": "configs/lenet5.py:fake", "data": "fake", "overrides": overrides}
    row |= {"seeds": [3], "accuracy": [0.0, 1.0]}
    path = tmp_path / "results" / "results.json"
    path.write_text(json.dumps({"wide": row, "narrow": row | {"accuracy": [2.0]}}))
    assert cli.main(["reproduce", "wide"]) == 0
    assert "is inside the band" in capsys.readouterr().out
    saved = json.loads((tmp_path / "runs" / "reproduce-wide-seed3" / "config.json").read_text())
    assert (saved["seed"], saved["num_steps"]) == (3, 8)
    workdir = str(tmp_path / "runs" / "reproduce-wide-seed3")
    assert cli.main(["reproduce", "narrow", "--workdir", workdir]) == 1  # already trained
    assert "is OUTSIDE the band" in capsys.readouterr().out
    assert cli.main(["reproduce", "wid"]) == 2
