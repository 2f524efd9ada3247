"""Trains the rows of docs/results.md, one run after another, and adds them to results/results.json.

    python benchmarks/train_results.py --data-root DATA --hardware 'AMD EPYC, 2 cores' [ROW…]

All rows by default, or with --missing those that have no result yet; with --add-seeds 1 2 further
seeds of a row that has one. DATA holds a directory a dataset; that of images_set has train and
test. A run that is complete is not repeated and one that was stopped goes on, so the same command
finishes what a kill left. The best epoch is chosen on validation images; the test images are
looked at once, by each training at its end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from classic_cnns import results
from classic_cnns.errors import nearest

ROOT = Path(__file__).parents[1]


def train(row, seed, workdir, data_root):
    """Trains one seed of a row, or goes on with it; its summary."""
    config = f"--config={ROOT / row['config'].split(':')[0]}:{row['data']}"
    command = [
        *(sys.executable, str(ROOT / "main.py"), config, *row["overrides"]),
        *(f"--config.seed={seed}", f"--config.data.dir={data_root / row['data']}"),
        f"--workdir={workdir}",
    ]
    if not (workdir / "result.json").exists():
        print(time.strftime("%F %T"), " ".join(command), flush=True)
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with workdir.with_suffix(".log").open("a") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True)
    return json.loads((workdir / "result.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="for example lenet5-mnist")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--missing", action="store_true", help="rows without a result alone")
    parser.add_argument("--hardware", required=True, help="in words: AMD EPYC, 2 cores")
    parser.add_argument("--add-seeds", type=int, nargs="+", default=[], metavar="SEED")
    args = parser.parse_args()
    path = ROOT / "results" / "results.json"
    table = results.read(path)
    names = args.rows or list(table)
    wrong = [f'no row "{name}": {nearest(name, table)}' for name in names if name not in table]
    if wrong:
        parser.error("; ".join(wrong))
    names = [n for n in names if not (args.missing and table[n].get("accuracy"))]
    for name in names:  # before hours of training
        row, folder = table[name], args.data_root / table[name]["data"]
        if row["data"] == "images_set" and not (folder / "test").is_dir():
            parser.error(f"{folder}: no test folder, and val is what epochs are chosen on")
        if args.add_seeds and (not row.get("accuracy") or set(args.add_seeds) & set(row["seeds"])):
            parser.error(f"{name}: --add-seeds takes new seeds of a row that has a result")
    for name in names:
        row = table[name]
        seeds = args.add_seeds or row["seeds"]
        workdirs = [args.runs / f"{name}-seed{seed}" for seed in seeds]
        summaries = [
            train(row, seed, workdir, args.data_root)
            for seed, workdir in zip(seeds, workdirs, strict=True)
        ]
        logs = ROOT / "results" / name
        logs.mkdir(exist_ok=True)
        for seed, workdir in zip(seeds, workdirs, strict=True):
            shutil.copy(workdir / "metrics.csv", logs / f"seed{seed}.csv")
        table = results.read(path)  # another process may have added rows meanwhile
        if args.add_seeds:  # times stay those of the first seeds
            accuracy = row["accuracy"] + results.accuracies(summaries)
            table[name] = row | {"seeds": row["seeds"] + seeds, "accuracy": accuracy}
        else:
            config = json.loads((workdirs[0] / "config.json").read_text())
            table[name] = results.with_measurements(
                row,
                summaries,
                json.loads((workdirs[0] / "run.json").read_text()),
                [workdir / "metrics.csv" for workdir in workdirs],
                hardware=args.hardware,
                log=f"results/{name}",
                epochs=config["num_epochs"],
            )
        results.write(path, table)
        (ROOT / "docs" / "results.md").write_text(results.page(table))
        print(f"{name}: {table[name]['accuracy']}", flush=True)


if __name__ == "__main__":
    main()
