"""Runs side by side: the numbers of the files, whatever is wrong with some of them."""

import json

from classic_cnns import cli


def make_run(path, rate=0.1, finished=True, name="lenet5", evals=(0.5, 0.75, 0.625)):
    path.mkdir()
    config = {"model": {"name": name}, "data": {"source": "fake", "dir": str(path)}}
    config |= {"optimizer": {"learning_rate": rate}, "seed": 0}
    (path / "config.json").write_text(json.dumps(config))
    with (path / "metrics.jsonl").open("w") as file:
        for i, accuracy in enumerate(evals, 1):
            record = {"step": 10 * i, "epoch": i / 2, "train_loss": 2.0, "train_accuracy": 0.5}
            record |= {"eval_loss": 1 / i, "eval_accuracy": accuracy, "eval_recall": [1.0, None]}
            file.write(json.dumps(record | {"images_per_sec": 100.0 * i}) + "\n")
    if finished:
        result = {"test_accuracy": 0.7125, "seconds": 1234.4}
        (path / "result.json").write_text(json.dumps(result))
    return path


def run(capsys, *args):
    code = cli.main(["compare", *map(str, args)])
    return code, capsys.readouterr()


def test_numbers_and_differences(tmp_path, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", rate=0.3)
    code, out = run(capsys, a, b, "--out", tmp_path / "c.png")
    assert code == 0
    lines = [line.split() for line in out.out.splitlines()]
    numbers = ["lenet5", "fake", "–", "1.5", "0.7500", "0.7125", "1,234", "s", "200"]
    assert lines[1] == ["a", *numbers]
    assert ["optimizer.learning_rate", "0.1", "0.3"] in lines
    assert not [line for line in lines if line and line[0] in ("seed", "data.dir", "model.name")]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_averages_that_validation_prefers_count(tmp_path, capsys):
    a = make_run(tmp_path / "a")
    records = [json.loads(line) for line in (a / "metrics.jsonl").read_text().splitlines()]
    records[1]["ema_eval_accuracy"] = 0.8125
    (a / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = {"test_accuracy": 0.7125, "ema_test_accuracy": 0.8, "seconds": 1.0}
    (a / "result.json").write_text(json.dumps(result))
    _, out = run(capsys, a, "--out", tmp_path / "c.png")
    assert out.out.splitlines()[1].split()[5:7] == ["0.8125", "0.8000"]
    assert "a: accuracies are those of the averaged weights" in out.out


def test_unfinished_and_damaged_runs_are_named(tmp_path, capsys):
    good, going = make_run(tmp_path / "good"), make_run(tmp_path / "going", finished=False)
    bad = make_run(tmp_path / "bad")
    (bad / "config.json").write_text("{")
    empty = make_run(tmp_path / "empty", evals=())
    code, out = run(capsys, good, going, bad, empty, tmp_path / "no", "--out", tmp_path / "c.png")
    assert code == 0
    assert "going: not finished, at step 30" in out.out
    for path, reason in ((bad, "config.json"), (empty, "no metrics"), (tmp_path / "no", "missing")):
        assert any(
            line.startswith("left out") and str(path) in line and reason in line
            for line in out.out.splitlines()
        ), path
    code, out = run(capsys, bad, "--out", tmp_path / "d.png")
    assert (code, out.out) == (4, "")
    assert str(bad) in out.err
    assert not (tmp_path / "d.png").exists()
    assert run(capsys, good, "--out", tmp_path / "no" / "c.png")[0] == 4


def test_names_and_values_cannot_repaint_the_terminal(tmp_path, capsys):
    a = make_run(tmp_path / "a\x1b[2J\n$x_", name="lenet\x1b]0;title\x07")
    (a / "result.json").write_text('{"test_accuracy": "\x1b[31m", "seconds": 1e400}')
    b = make_run(tmp_path / "b")
    code, out = run(capsys, a, b, "--out", tmp_path / "c.png")
    assert code == 0
    assert "\x1b" not in out.out + out.err
    assert "\x07" not in out.out + out.err
    assert "lenet\\x1b]0;title" in out.out
