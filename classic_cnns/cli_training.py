"""Commands around training: compare, lr-find."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds their parsers to argparse's sub-parsers."""
    compare = commands.add_parser("compare", help="runs side by side: a table and their curves")
    compare.add_argument("workdirs", nargs="+", type=Path, metavar="RUN")
    compare.add_argument("--out", type=Path, default=Path("compare.png"))
    compare.set_defaults(run=_compare)

    find = commands.add_parser("lr-find", help="a learning rate, by a short range test")
    find.add_argument("config", help="configs/FILE.py[:DATASET]; --config.FIELD=VALUE may follow")
    find.add_argument("--from", dest="low", type=float, default=1e-5)
    find.add_argument("--to", dest="high", type=float, default=10.0)
    find.add_argument("--steps", type=int, default=100)
    find.add_argument("--out", type=Path, default=Path("lr_find.png"))
    find.set_defaults(run=_lr_find)


def _compare(args: argparse.Namespace) -> None:
    from classic_cnns.compare import compare

    for line in compare(args.workdirs, args.out):
        print(line)


def _lr_find(args: argparse.Namespace) -> None:
    from classic_cnns.commandline import read_config
    from classic_cnns.config import loader_settings, optimizer_from
    from classic_cnns.data.loaders import create_loader
    from classic_cnns.lr_find import range_test, rising
    from classic_cnns.plots import plot_range_test
    from classic_cnns.task import task_from

    config = read_config(args.config, args.overrides)
    schedule = rising(args.low, args.high, args.steps)
    task = task_from(config)
    tx, _ = optimizer_from(config, task.spans, schedule=schedule)
    settings = loader_settings(config, task.dataset, "train")
    loader = create_loader(task.dataset.train, config.batch_size, mesh=task.mesh, **settings)
    items = (loader.train(step) for step in range(args.steps))
    found = range_test(task.step(tx), task.state(tx), items, loader.data, schedule, args.steps)
    title = f"{config.model.name} on {config.data.source}, {config.optimizer.name}"
    chosen = found.suggestion
    plot_range_test(found.rates, found.losses, found.smooth, chosen, args.out, title)
    print(f"steepest descent at {found.steepest:.2g}")
    tenth = f"{found.tenth:.2g}" if found.tenth else "it did not diverge"
    print(f"a tenth of the rate of divergence: {tenth}")
    per = config.optimizer.learning_rate_per
    field = chosen * per / config.batch_size if per else chosen
    print(f"suggestion: --config.optimizer.learning_rate={field:.2g} (peak; see {args.out})")
