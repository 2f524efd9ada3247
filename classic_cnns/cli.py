"""classic-cnns COMMAND: everything around training."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from classic_cnns import cli_training
from classic_cnns.compile_cache import collect_seldom, keep_compiled
from classic_cnns.errors import (
    ConfigError,
    DataError,
    DeviceMemoryError,
    describe,
    print_anything,
    printable,
)
from classic_cnns.large_pages import restart_with_large_pages
from classic_cnns.signals import leave_on_interrupt


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    if argv is None:
        print_anything()
    parser = argparse.ArgumentParser("classic-cnns", description="Classic CNNs in JAX.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--compilation-cache",
        default="default",
        help="directory of compiled programs; '' = none",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    cli_training.add_commands(commands)

    models = commands.add_parser("models", help="list the networks")
    models.add_argument("pattern", nargs="?", default="*", help="for example 'resnet*'")
    models.set_defaults(run=_models, on_device=False)

    summary = commands.add_parser("summary", help="the layers of a network")
    summary.add_argument("model")
    summary.add_argument("--image-size", type=int, default=224)
    summary.add_argument("--channels", type=int, default=3)
    summary.add_argument("--num-classes", type=int, default=1000)
    summary.set_defaults(run=_summary, on_device=False)

    convert = commands.add_parser("convert", help="weights of other libraries, in and out")
    convert.add_argument("source", type=Path, help="a weight file, or with --to a run directory")
    convert.add_argument(
        "--model", default="", help="the network that the file is for, if it does not say so itself"
    )
    convert.add_argument(
        "--out", type=Path, required=True, help="new run directory, or with --to a file"
    )
    convert.add_argument(
        "--to", help="torchvision, timm, keras, …, or safetensors for our own names"
    )
    convert.add_argument(
        "--dialect", default="", help="whose names the file has; found out by default"
    )
    convert.add_argument(
        "--exclude", default="", help="regular expression of our paths to leave at init"
    )
    convert.add_argument(
        "--partial", action="store_true", help="allow missing and left-over arrays"
    )
    convert.add_argument("--num-classes", type=int, default=0)
    convert.add_argument("--ema", action="store_true", help="with --to: the averaged weights")
    convert.set_defaults(run=_convert, on_device=False)

    evaluate = commands.add_parser("evaluate", help="accuracy of a run or of converted weights")
    evaluate.add_argument("workdir", type=Path)
    evaluate.add_argument("--data", default="", help="source; the run's own by default")
    evaluate.add_argument("--data-dir", default="")
    evaluate.add_argument("--split", choices=("train", "val", "test"), default="test")
    evaluate.add_argument("--batch-size", type=int, default=256)
    evaluate.add_argument("--ema", action="store_true", help="the averaged weights of the run")
    evaluate.set_defaults(run=_evaluate)

    predict = commands.add_parser("predict", help="classes of images, by a run")
    predict.add_argument("workdir", type=Path)
    predict.add_argument("images", type=Path, nargs="+", help="files, and folders of them")
    predict.add_argument("--top", type=int, default=3, help="how many classes of each image")
    predict.add_argument("--batch-size", type=int, default=64)
    predict.add_argument("--ema", action="store_true", help="the averaged weights of the run")
    predict.add_argument("--json", action="store_true", help="a JSON object a line")
    predict.set_defaults(run=_predict)

    doctor = commands.add_parser("doctor", help="whether this installation can train")
    doctor.set_defaults(run=_doctor, on_device=False)

    args, overrides = parser.parse_known_args(argv)
    args.overrides = overrides
    if wrong := [a for a in overrides if not (hasattr(args, "config") and a[:9] == "--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(map(printable, wrong))}")
    try:
        if getattr(args, "on_device", True):  # JAX takes a second and 100 MB to import
            if argv is None:
                leave_on_interrupt()
                restart_with_large_pages()
            from classic_cnns.doctor import check_devices

            collect_seldom()
            keep_compiled(args.compilation_cache)
            check_devices()
            if argv is None:
                cli_training.show_warnings()
        code = args.run(args) or 0
        if sys.stdout:  # which may be closed from the start
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if args.debug:
            raise
        text = describe(error)
        if "RESOURCE_EXHAUSTED" in text:
            text = "ERROR out of device memory. Fix: a smaller --batch-size or --config.batch_size"
            print(text, file=sys.stderr)
            return DeviceMemoryError.exit_code
        if hasattr(args, "data_dir"):
            text = text.replace("--config.data.dir=", "--data-dir=")
        print(text.replace(" with the same --workdir", ""), file=sys.stderr)  # a sweep has none
        return getattr(error, "exit_code", 1)


def _models(args: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from classic_cnns.models import MODELS, create_model, list_models
    from classic_cnns.models.macs import count_macs

    names = list_models(args.pattern)
    if not names:
        raise ConfigError(f'no network matches "{args.pattern}". Fix: one of {", ".join(MODELS)}')
    print(f"{'network':18}{'parameters':>14}{'GMACs':>9}{'at':>6}{'min':>5}  paper")
    for name in names:
        small = name.endswith("_cifar") or name.startswith("lenet")
        side, classes, channels = (32, 10, 1 if "lenet" in name else 3) if small else (224, 1000, 3)
        model: Any = create_model(name, classes)
        shape = (side, side, channels)
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
        size = sum(p.size for p in jax.tree.leaves(variables["params"]))
        paper = _paper(type(model).__module__)
        macs = count_macs(model, shape) / 1e9
        print(f"{name:18}{size:14,}{macs:9.4f}{side:6}{model.min_size():5}  {paper}")


def _paper(module: str) -> str:
    text = " ".join((sys.modules[module].__doc__ or "").split())
    return text.split('"')[1] if '"' in text else text.split(".")[0]


def _summary(args: argparse.Namespace) -> None:
    from classic_cnns.models import create_model
    from classic_cnns.models.features import list_layers

    model: Any = create_model(args.model, args.num_classes)
    if args.image_size < model.min_size():
        raise ConfigError(
            f"{args.model} takes {model.min_size()} px or more. Fix: "
            f"--image-size={model.min_size()}"
        )
    layers = list_layers(model, (args.image_size, args.image_size, args.channels))
    width = max(len(layer.name) for layer in layers)
    print(f"{'layer':{width}}{'output':>16}{'parameters':>14}{'MACs':>16}{'bytes':>12}")
    for layer in layers:
        shape = "×".join(map(str, layer.output))
        size = 4
        for n in layer.output:
            size *= n
        macs = f"{layer.macs:,}" if layer.macs else ""
        print(f"{layer.name:{width}}{shape:>16}{layer.parameters:14,}{macs:>16}{size:12,}")
    own = [layer for layer in layers if layer.macs or not any(_inside(o, layer) for o in layers)]
    total = sum(layer.parameters for layer in own)
    print(f"{'total':{width}}{'':>16}{total:14,}{sum(layer.macs for layer in layers):16,}")


def _inside(part: Any, whole: Any) -> bool:
    return part.name.startswith(f"{whole.name}/")


def _convert(args: argparse.Namespace) -> None:
    from classic_cnns import loading, weights

    if args.to:
        dialect = "ours" if args.to == "safetensors" else args.to
        run = loading.load(args.source, ema=args.ema)
        path = weights.export_weights(run, dialect, args.out)
        print(f"images     {run.preprocess}")
        print(path)
        return
    run, report = weights.load_weights(
        args.source,
        args.model,
        dialect=args.dialect,
        num_classes=args.num_classes,
        exclude=args.exclude,
        partial=args.partial,
    )
    print(report)
    print(weights.save_bundle(run, args.out, source=args.source.name))


def _evaluate(args: argparse.Namespace) -> None:
    from classic_cnns import loading, rundir
    from classic_cnns.data.loaders import create_loader
    from classic_cnns.evaluate import evaluate_run
    from classic_cnns.sharding import check_batch_size, create_mesh

    run = loading.load(args.workdir, ema=args.ema)
    dataset = loading.load_dataset(args.workdir, run, args.data, args.data_dir)
    split = dataset.splits.get(args.split)
    if split is None:
        raise ConfigError(f"{dataset.source} has no {args.split} split. Fix: --split=val")
    mesh = create_mesh()
    check_batch_size(args.batch_size, mesh)
    config = rundir.read_json(args.workdir / "config.json")
    data = config.get("data")
    loader = create_loader(
        split,
        min(args.batch_size, -(-len(split) // mesh.size) * mesh.size),
        seed=0,
        mesh=mesh,
        preprocess=dataset.preprocess,
        on_bad_image="skip" if data and data.get("on_bad_image") == "skip" else "error",
        max_bad_fraction=1.0,  # the training has said whether there are too many
    )
    print(f"data       {dataset.source}: {dataset.note}")
    for warning in dataset.warnings:
        print(f"WARNING {warning}")
    result = evaluate_run(run, loader, dataset.classes, *_views(config))
    print("RESULT " + json.dumps({"split": args.split, "images": loader.readable, **result}))


def _views(config: dict[str, Any]) -> tuple[bool, int]:
    """The flip and shift that a run evaluates with; see `logits_of`."""
    shift = config.get("test_time_shift")
    return config.get("test_time_flip") is True, shift if isinstance(shift, int) else 0


def _predict(args: argparse.Namespace) -> None:
    from classic_cnns import loading, rundir
    from classic_cnns.data.folder import visible
    from classic_cnns.prediction import image_files, predict_files

    if min(args.top, args.batch_size) < 1:
        raise ConfigError("--top and --batch-size are 1 or more. Fix: --top=3 --batch-size=64")
    run = loading.load(args.workdir, ema=args.ema)
    files = image_files(args.images)
    views = _views(rundir.read_json(args.workdir / "config.json"))
    bad = 0
    for name, found in predict_files(run, files, args.batch_size, *views):
        if isinstance(found, str):
            bad += 1
            line: dict[str, Any] = {"file": name, "error": found}
        else:
            best = (-found).argsort(kind="stable")[: args.top]
            pairs = [{"class": run.classes[i], "probability": float(found[i])} for i in best]
            line = {"file": name, "predictions": pairs}
        if args.json:
            print(json.dumps(line))
        elif isinstance(found, str):
            print(f"WARNING {visible(name)}: {printable(found)}", file=sys.stderr)
        else:
            said = (f"{visible(p['class'])} {p['probability']:.3f}" for p in pairs)
            print(f"{visible(name)}  {', '.join(said)}", flush=True)
    if bad:
        raise DataError(f"{bad} of {len(files)} images cannot be decoded. Fix: leave them out")


def _doctor(args: argparse.Namespace) -> int:
    from classic_cnns.doctor import examine, render

    findings = examine()
    print(render(findings))
    return int(any(finding.level == "error" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
