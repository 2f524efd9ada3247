"""Commands around training."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from classic_cnns.errors import DataError


def add_commands(commands: Any) -> None:
    """Adds their parsers to argparse's sub-parsers."""
    check = commands.add_parser("check-data", help="what is wrong with a folder of images")
    check.add_argument("directory", type=Path, help="as for data.dir; nothing in it is changed")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")
    check.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")
    check.add_argument(
        "--no-duplicates", action="store_true", help="do not look for pictures that are there twice"
    )
    check.set_defaults(run=_check_data, on_device=False)

    compare = commands.add_parser("compare", help="runs side by side: a table and their curves")
    compare.add_argument("workdirs", nargs="+", type=Path, metavar="RUN")
    compare.add_argument("--out", type=Path, default=Path("compare.png"))
    compare.set_defaults(run=_compare, on_device=False)

    find = commands.add_parser("lr-find", help="a learning rate, by a short range test")
    find.add_argument("config", help="configs/FILE.py[:DATASET]; --config.FIELD=VALUE may follow")
    find.add_argument("--from", dest="low", type=float, default=1e-5)
    find.add_argument("--to", dest="high", type=float, default=10.0)
    find.add_argument("--steps", type=int, default=100)
    find.add_argument("--out", type=Path, default=Path("lr_find.png"))
    find.set_defaults(run=_lr_find)

    reproduce = commands.add_parser("reproduce", help="trains a row of docs/results.md again")
    reproduce.add_argument("row", help="for example lenet5-mnist")
    reproduce.add_argument("--results", type=Path, default=Path("results/results.json"))
    reproduce.add_argument("--seed", type=int, help="the row's first by default")
    reproduce.add_argument("--data-dir", default="")
    reproduce.add_argument("--workdir", type=Path, help="runs/reproduce-ROW-seedSEED by default")
    reproduce.set_defaults(run=_outliving(_reproduce))

    sweep = commands.add_parser("sweep", help="trains over a grid of settings and seeds")
    sweep.add_argument("config", help="configs/FILE.py[:DATASET]; --config.FIELD=VALUE may follow")
    sweep.add_argument("--grid", nargs="+", required=True, metavar="FIELD=VALUE,VALUE")
    sweep.add_argument("--seeds", default="0", help="0-2 or 0,1,2")
    sweep.add_argument(
        "--out", type=Path, default=Path("runs/sweep"), help="of the run directories"
    )
    sweep.set_defaults(run=_outliving(_sweep))

    fit = commands.add_parser("fit-batch", help="the largest batch that fits, by the compiler")
    fit.add_argument("config", help="configs/FILE.py[:DATASET]; --config.FIELD=VALUE may follow")
    fit.add_argument("--gib", type=float, default=0.0, help="memory; the device's own by default")
    fit.set_defaults(run=_fit_batch)

    benchmark = commands.add_parser("benchmark", help="speed of networks on this machine")
    benchmark.add_argument("names", nargs="+", metavar="NAME")
    benchmark.add_argument("--image-size", type=int, default=32)
    benchmark.add_argument("--batch-size", type=int, default=64)
    benchmark.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    benchmark.add_argument("--seconds", type=float, default=3.0, help="of timing each")
    benchmark.add_argument("--json", type=Path, help="write everything to this file")
    benchmark.set_defaults(run=_benchmark)


def _check_data(args: argparse.Namespace) -> int:
    from classic_cnns.check_data import check_data

    report = check_data(
        args.directory,
        json_file=args.json,
        html_file=args.html,
        find_copies=not args.no_duplicates,
    )
    return DataError.exit_code if report.refused else 0


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
    if not found.fell:
        print(
            "WARNING    the loss hardly fell, so this says little. Fix: a larger --to, more --steps"
        )


def show_warnings() -> None:
    """From here on warnings of this package are lines for people, as in main.py."""
    from classic_cnns.commandline import show_warning

    warnings.showwarning = show_warning


def _outliving(run: Callable[..., Any]) -> Callable[..., Any]:
    """The command, which goes on where the reader of its output ends."""

    def command(args: argparse.Namespace) -> Any:
        from classic_cnns.commandline import lasting_output

        with lasting_output():
            return run(args)

    return command


def _reproduce(args: argparse.Namespace) -> int:
    from classic_cnns import results
    from classic_cnns.commandline import read_config
    from classic_cnns.train import train_and_evaluate

    row = results.find(results.read(args.results), args.row)
    seed = row["seeds"][0] if args.seed is None else args.seed
    # Config files are named from the directory that holds results/.
    path = args.results.resolve().parents[1] / row["config"]
    config = read_config(str(path), [*row["overrides"], f"--config.seed={seed}"])
    config.data.dir = args.data_dir
    workdir = args.workdir or Path("runs", f"reproduce-{args.row}-seed{seed}")
    _, summary = train_and_evaluate(config, workdir)
    low, high = results.band(row)
    accuracy = summary["test_accuracy"]
    inside = low <= accuracy <= high
    verdict = "inside" if inside else "OUTSIDE"
    print(f"{args.row}: test accuracy {accuracy:.4f} is {verdict} the band {low:.4f} to {high:.4f}")
    return 0 if inside else 1


def _sweep(args: argparse.Namespace) -> None:
    from classic_cnns import config as config_lib
    from classic_cnns import sweep
    from classic_cnns.commandline import read_config
    from classic_cnns.errors import DeviceMemoryError, NonFiniteError, printable
    from classic_cnns.progress import decoding_bar
    from classic_cnns.train import train_and_evaluate

    points, seeds = sweep.parse_grid(args.grid), sweep.parse_seeds(args.seeds)
    plan = []  # every mistake in it is found before the first training
    for point in points:
        for seed in seeds:
            changes = [f"--config.{field}={value}" for field, value in point]
            changes = [*args.overrides, *changes, f"--config.seed={seed}"]
            config = read_config(args.config, changes)
            workdir = args.out / sweep.name_of(point, seed)
            flat = config_lib.flatten(config)
            summary = sweep.finished(workdir, flat, config_lib.FREE)
            plan.append((point, config, workdir, summary))
    unfinished = [config for _, config, _, summary in plan if summary is None]
    if unfinished:
        dataset = config_lib.dataset_from(unfinished[0], progress=decoding_bar)
        for config in unfinished:
            config_lib.check(config, dataset)
        del dataset
    summaries: dict[sweep.Point, list[Any]] = {point: [] for point in points}
    for number, (point, config, workdir, summary) in enumerate(plan, 1):
        print(f"== {number} of {len(plan)}: {printable(workdir.name)}", flush=True)
        if summary is None:
            try:
                _, summary = train_and_evaluate(config, workdir)
            except (NonFiniteError, DeviceMemoryError) as error:
                print(f"failed: {printable(str(error))}")
        summaries[point].append(summary)
    print(printable_lines(sweep.table(points, summaries)))


def printable_lines(text: str) -> str:
    """Lines of text without other control characters."""
    from classic_cnns.errors import printable

    return "\n".join(map(printable, text.split("\n")))


def _fit_batch(args: argparse.Namespace) -> None:
    from classic_cnns.commandline import read_config
    from classic_cnns.config import optimizer_from
    from classic_cnns.errors import ConfigError
    from classic_cnns.fit_batch import device_bytes, step_bytes
    from classic_cnns.task import task_from

    config = read_config(args.config, args.overrides)
    task = task_from(config)
    tx, _ = optimizer_from(config, task.spans)
    limit, kind = (int(args.gib * 2**30), "--gib") if args.gib > 0 else device_bytes()
    print(f"{limit / 2**30:.2f} GiB: {kind}")
    best, size = 0, task.mesh.size * config.accumulate_steps
    while size <= len(task.dataset.train):
        needed = step_bytes(task, tx, size)
        print(
            f"batch {size:6,}  {needed / 2**30:9.3f} GiB{'' if needed <= limit else '  too much'}"
        )
        if needed > limit:
            break
        best, size = size, 2 * size
    if not best:
        raise ConfigError("not even the smallest batch fits. Fix: smaller images, or bfloat16")
    print(f"suggestion: --config.batch_size={best}")


def _benchmark(args: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from classic_cnns import rundir
    from classic_cnns.benchmark import measure
    from classic_cnns.errors import ConfigError
    from classic_cnns.models import create_model

    for name in args.names:  # before the first takes its time
        smallest = create_model(name, 10).min_size()  # type: ignore[attr-defined]
        if args.image_size < smallest or args.batch_size < 1:
            raise ConfigError(
                f"{name} with images of {args.image_size} px, {args.batch_size} at a time. Fix: "
                f"--image-size={smallest} or more, --batch-size=1 or more"
            )
    device = jax.devices()[0].device_kind
    print(f"{device}, {args.image_size} px, batch {args.batch_size}, {args.dtype}; medians")
    print(
        f"{'network':16}{'train im/s':>12}{'GMACs/s':>10}{'eval im/s':>12}{'GMACs/s':>10}"
        f"{'first step':>12}{'memory':>12}"
    )
    rows = []
    for name in args.names:
        row = measure(
            name,
            image_size=args.image_size,
            batch_size=args.batch_size,
            dtype=jnp.dtype(args.dtype),
            seconds=args.seconds,
        )
        train, infer = row["train"], row["eval"]
        print(
            f"{name:16}{train['images_per_sec']:12,.1f}{train['gmacs_per_sec']:10,.1f}"
            f"{infer['images_per_sec']:12,.1f}{infer['gmacs_per_sec']:10,.1f}"
            f"{row['first_step']:10.1f} s{row['step_bytes'] / 2**30:8.3f} GiB",
            flush=True,
        )
        rows.append(row)
    if args.json:
        about = {"device": device, "versions": rundir.versions(), "rows": rows}
        rundir.write_json(args.json, about)
