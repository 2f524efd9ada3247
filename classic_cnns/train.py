"""The training program, top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from classic_cnns import config as config_lib
from classic_cnns import rundir
from classic_cnns.checkpoints import Checkpoints
from classic_cnns.data.loaders import ResidentLoader, create_loader
from classic_cnns.diagnose import explain_non_finite
from classic_cnns.errors import NonFiniteError, WorkdirError
from classic_cnns.evaluate import create_evaluate
from classic_cnns.header import describe
from classic_cnns.logging import Clock, Display, MetricFiles, advice, decoding_bar
from classic_cnns.metrics import EpochSums
from classic_cnns.sharding import check_batch_size, create_mesh, replicate
from classic_cnns.steps import Progress, train_on, train_step
from classic_cnns.train_state import TrainState, abstract_train_state, create_train_state
from classic_cnns.weights.finetune import adopt, find_start


def train_and_evaluate(
    config: ConfigDict, workdir: str | Path | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """Trains, keeps the best and the newest checkpoint, evaluates the best one on the test split.

    The same call on the same directory continues where the last one stopped, exactly.

    Args:
        config: see configs/default.py.
        workdir: of the run; None claims a new runs/MODEL-DATA-NUMBER.

    Returns:
        The last state, and the summary that is printed as RESULT and kept in result.json.

    Raises:
        ConfigError, DataError: before anything is written.
        WorkdirError: the directory holds another run, is in use, or cannot be written.
        NonFiniteError: the loss or a gradient is not finite; names the step and the layer.
    """
    # ---- data, model, optimiser: everything that can be wrong with them is found before the first
    # write
    dataset = config_lib.dataset_from(config, progress=decoding_bar)
    source, options = config.model.pretrained, dict(config.model.options)
    start = find_start(source, config.model.name, options, workdir)
    dataset = start.normalize_as_before(dataset)
    mean, std = dataset.preprocess.mean, dataset.preprocess.std
    model = config_lib.model_from(config, dataset.num_classes, dataset.image_shape, **start.fields)
    augment = config_lib.augment_from(config)
    mesh = create_mesh()
    check_batch_size(config.batch_size, mesh)
    spans = config_lib.durations(config, len(dataset.train))
    tx, schedule = config_lib.optimizer_from(config, spans)
    abstract = {
        "state": abstract_train_state(model, tx, dataset.image_shape),
        "progress": jax.eval_shape(Progress.empty),
    }
    given, report = adopt(start, abstract["state"])

    # ---- the run directory
    if workdir is None:
        workdir = rundir.claim(Path("runs"), f"{config.model.name}-{config.data.source}")
    workdir = Path(workdir).expanduser().absolute()
    new_run = _check_same_run(workdir, config, dataset.fingerprint)
    with contextlib.ExitStack() as stack:
        stack.enter_context(rundir.lock(workdir))
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints"))
        if new_run:
            info = rundir.describe_run(sys.argv) | {
                "model": config.model.name,
                "model_fields": start.fields,
                "classes": list(dataset.classes),
                "data_fingerprint": dataset.fingerprint,
                "preprocessing": dataclasses.asdict(dataset.preprocess),
            }
            rundir.write_json(workdir / "run.json", info)
            rundir.write_json(workdir / "config.json", config.to_dict())

        # ---- state: fresh, or the newest sound checkpoint
        restored = checkpoints.restore_newest(abstract)
        if restored is None:
            step, epoch_sums = 0, EpochSums()
            best: dict[str, Any] = {"step": 0, "eval_accuracy": -1.0}
            state = create_train_state(
                model, tx, dataset.image_shape, seed=config.seed, mesh=mesh, given=given
            )
            progress = replicate(Progress.empty(), mesh)
        else:
            step, tree, notes = restored
            epoch_sums, best = EpochSums(**notes["epoch_sums"]), notes["best"]
            state, progress = replicate(tree["state"], mesh), replicate(tree["progress"], mesh)

        # ---- compiled functions and loaders
        one_step = functools.partial(
            train_step,
            model=model,
            tx=tx,
            mean=mean,
            std=std,
            augment=augment,
            label_smoothing=config.label_smoothing,
            seed=config.seed,
        )
        train = jax.jit(functools.partial(train_on, step=one_step), donate_argnums=(0, 1))
        evaluate = create_evaluate(model, mean=mean, std=std)
        loaders = {
            name: create_loader(split, config.batch_size, mesh=mesh, **settings)
            for name, split in dataset.splits.items()
            for settings in [config_lib.loader_settings(config, dataset, name)]
        }

        # ---- loop
        display = Display(spans.total)
        lines = describe(config, dataset, model, state, mesh, spans, workdir, step)
        for line in [*lines, *start.describe(report)]:
            display.print(line)
        for text in dataset.warnings:
            display.print(f"WARNING {text}")
        del start, given  # as large as the network
        files = stack.enter_context(MetricFiles(workdir, step, workdir.name))
        stack.enter_context(display)
        display.start(step)
        clock, started = Clock(config.batch_size), time.monotonic()
        per_dispatch = config.steps_per_dispatch or (1 if jax.default_backend() == "cpu" else 16)
        if not isinstance(loaders["train"], ResidentLoader):
            per_dispatch = 1
        while step < spans.total:
            next_eval, next_save, next_log = (
                min(spans.total, config_lib.next_event(step, every))
                for every in (spans.eval_every, spans.checkpoint_every, config.log_every_steps)
            )
            stop = min(next_eval, next_save, next_log)
            count = per_dispatch if stop - step >= per_dispatch else 1
            with clock.waiting():
                item = loaders["train"].train(step, count)
            with jax.transfer_guard("disallow"):
                state, progress = train(state, progress, loaders["train"].data, item)
            step += count
            clock.count(count, progress)
            display.advance(step)
            if step < stop:
                continue

            jax.block_until_ready(progress)
            clock.pause()
            evaluating = step == next_eval
            if evaluating or step == next_log:
                sums = jax.device_get(progress)
                if not sums.finite:
                    raise NonFiniteError(
                        explain_non_finite(state, loaders["train"], schedule, one_step)
                    )
                progress = replicate(Progress.empty(), mesh)
                epoch_sums = epoch_sums.add(sums.metrics)
                record = {"step": step, "epoch": step * config.batch_size / len(dataset.train)}
                record |= {f"train_{k}": float(v) for k, v in sums.metrics.compute().items()}
                record |= {"learning_rate": float(schedule(step - 1))} | clock.read()
                files.write(record)
                display.status(record)
            if evaluating:
                record = record | epoch_sums.means()
                record |= {f"eval_{k}": v for k, v in evaluate(state, loaders["val"]).items()}
                epoch_sums = EpochSums()
                improved = record["eval_accuracy"] > best["eval_accuracy"]
                if improved:
                    best = {"step": step, "eval_accuracy": record["eval_accuracy"]}
                files.write(record)
                files.draw()
                display.epoch(record, improved)
                for text in advice(record, loaders):
                    display.print(text)
            if evaluating or step == next_save:
                notes = {"epoch_sums": dataclasses.asdict(epoch_sums), "best": best}
                checkpoints.save(
                    step, {"state": state, "progress": progress}, notes, keep={best["step"]}
                )
            clock.restart(new_epoch=evaluating)
        checkpoints.wait()
        display.stop()

        # ---- the test split, once, with the best checkpoint
        result = workdir / "result.json"
        if result.exists():
            summary = rundir.read_json(result)
            display.print(f"training is already complete at step {step}")
        else:
            tree, _ = checkpoints.restore(best["step"], abstract)
            best_state = replicate(tree["state"], mesh)
            summary = {
                "model": config.model.name,
                "data": config.data.source,
                "steps": step,
                "best_step": best["step"],
                "val_accuracy": best["eval_accuracy"],
            }
            if "test" in loaders:
                values = evaluate(best_state, loaders["test"])
                summary |= {f"test_{k}": v for k, v in values.items() if k != "recall"}
            summary |= {"seconds": round(time.monotonic() - started, 1), "workdir": str(workdir)}
            if config.weights_txt:
                rundir.write_weights(workdir / "weights.txt", best_state.variables)
            rundir.write_json(result, summary)
        display.print(f"run directory: {workdir} (see {workdir / 'curves.png'})")
        display.print("RESULT " + json.dumps(summary))
    return state, summary


def _check_same_run(workdir: Path, config: ConfigDict, fingerprint: str) -> bool:
    """True for a fresh directory, False for one this config may continue in; raises otherwise."""
    if not (workdir / "config.json").exists():
        return True
    differences = config_lib.changes(rundir.read_json(workdir / "config.json"), config.to_dict())
    if differences:
        raise WorkdirError(
            f"{workdir} holds a run with another config, which cannot be continued: "
            f"{'; '.join(differences)}. Fix: the old values, or another --workdir"
        )
    if rundir.read_json(workdir / "run.json")["data_fingerprint"] != fingerprint:
        raise WorkdirError(
            f"{workdir} holds a run on other data (the images or labels have changed since). "
            "Fix: the old data, or another --workdir"
        )
    return False
