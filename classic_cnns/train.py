"""The training program, top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from classic_cnns import config as config_lib
from classic_cnns import failures, resume, rundir, schedules, selection, signals
from classic_cnns import mirror as mirror_lib
from classic_cnns.checkpoints import Checkpoints
from classic_cnns.data.loaders import ResidentLoader
from classic_cnns.diagnose import draw_first_batch, draw_schedule, explain_non_finite
from classic_cnns.dispatch import JitStep, Progress, fetch, train_on
from classic_cnns.durations import durations, keeps_averages, next_event
from classic_cnns.errors import NonFiniteError
from classic_cnns.evaluate import create_evaluate
from classic_cnns.header import advice, describe
from classic_cnns.logging import Display, MetricFiles
from classic_cnns.metrics import EpochSums
from classic_cnns.numbers import Numbers, numbers_from
from classic_cnns.progress import decoding_bar
from classic_cnns.sharding import check_batch_size, create_mesh, replicate
from classic_cnns.task import bind_step, from_images
from classic_cnns.timing import Clock, Stopwatch, dispatch_sizes, summarize
from classic_cnns.train_state import TrainState, abstract_train_state, create_train_state
from classic_cnns.watch import first_batch
from classic_cnns.weights.finetune import adopt, find_start


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | Path | None = None,
    *,
    extend: bool = False,
    mirror: str | Path | None = None,
    grace: float = 25.0,
    max_seconds: float = float("inf"),
) -> tuple[TrainState, dict[str, Any]]:
    """Trains, keeps the best and the newest checkpoint, evaluates the best one on the test split.

    The same call on the same directory continues where the last one stopped, exactly.

    Args:
        config: see configs/default.py.
        workdir: of the run; None claims a new runs/MODEL-DATA-NUMBER.
        extend: num_epochs or num_steps may be larger than when the run began. The schedule is then
            that of the longer training, so the learning rate jumps.
        mirror: a directory on another disk that gets a copy of all that is needed to go on; where
            workdir is empty, the run in the mirror is continued.
        grace: seconds that saving may take after SIGTERM, Ctrl-C or SIGHUP.
        max_seconds: the run is saved and left before these are over.

    Returns:
        The last state, and the summary that is printed as RESULT and kept in result.json.

    Raises:
        ConfigError, DataError: before anything is written.
        WorkdirError: the directory holds another run, is in use, or cannot be written.
        NonFiniteError: the loss or a gradient is not finite; names the step and the layer.
        DeviceMemoryError: a step does not fit into the memory of the device.
        Stopped: by a signal or the end of max_seconds; everything is saved.
    """
    deadline = time.monotonic() + max_seconds
    while True:
        try:
            return _train(config, workdir, extend, mirror, grace, deadline)
        except NonFiniteError as error:
            workdir = failures.roll_back(config, error)
        except jax.errors.JaxRuntimeError as error:
            raise failures.out_of_memory(error, config) from error


def _train(
    config: ConfigDict,
    workdir: str | Path | None,
    extend: bool,
    mirror: str | Path | None,
    grace: float,
    deadline: float,
) -> tuple[TrainState, dict[str, Any]]:
    stopwatch = Stopwatch()
    # ---- data, model, optimiser: what can be wrong with them is found before the first write
    way = resume.way_of_data(workdir, config)
    dataset = config_lib.dataset_from(config, progress=decoding_bar, **way)
    source, options = config.model.pretrained, dict(config.model.options)
    start = find_start(source, config.model.name, options, workdir)
    dataset = start.normalize_as_before(dataset)
    model = config_lib.model_from(config, dataset.num_classes, dataset.image_shape, **start.fields)
    loss = config_lib.loss_from(config, dataset)
    augment = config_lib.augment_from(config, dataset)
    mesh = create_mesh()
    check_batch_size(config.batch_size, mesh, config.accumulate_steps)
    spans = durations(config, len(dataset.train))
    tx, schedule = config_lib.optimizer_from(config, spans)
    ema = keeps_averages(config)
    abstract = {
        "state": abstract_train_state(model, tx, dataset.image_shape, ema=ema),
        "progress": jax.eval_shape(Progress.empty),
    }
    given, report = adopt(start, abstract["state"])

    # ---- the run directory
    if workdir is None:
        workdir = rundir.claim(Path("runs"), f"{config.model.name}-{config.data.source}")
    workdir = Path(workdir).expanduser().absolute()
    with contextlib.ExitStack() as stack:
        stack.enter_context(stopwatch.watching_compilation())
        stack.enter_context(rundir.lock(workdir))
        stack.enter_context(rundir.reporting(workdir))
        if mirror is not None:
            mirror = mirror_lib.fetch(mirror, workdir)
        changes = resume.check(workdir, config, dataset, spans.total, extend=extend)
        copy = stack.enter_context(mirror_lib.copying(workdir, mirror))
        facts = resume.facts(config, dataset)
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", run=facts, on_saved=copy)
        )
        if changes is None:
            resume.write_new(workdir, config, dataset, spans.total, start.fields)

        # ---- state: fresh, or the newest sound checkpoint
        restored = checkpoints.restore_newest(abstract)
        if restored is None:
            step, notes = 0, resume.Notes(total=spans.total)
            given = given or from_images(model, dataset)
            state = create_train_state(
                model, tx, dataset.image_shape, seed=config.seed, mesh=mesh, given=given, ema=ema
            )
            progress = replicate(Progress.empty(), mesh)
        else:
            step, tree, saved_notes = restored
            notes = resume.read_notes(step, saved_notes, spans.total)
            manifest = checkpoints.manifest(step)
            resume.check_manifest(step, manifest["run"], facts)
            stopwatch.go_on(manifest["saved"], alive=rundir.last_alive(workdir))
            state, progress = replicate(tree["state"], mesh), replicate(tree["progress"], mesh)
            tx, schedule = config_lib.optimizer_from(config, spans, notes.rate_scale)
        if changes is not None:
            resume.write_continued(workdir, config, step, changes, spans.total)

        # ---- compiled functions and loaders
        one_step = bind_step(config, dataset, model, tx, augment, loss, config.ema_decay)
        numbers = replicate(numbers_from(config, notes.rate_scale), mesh)
        loaders = config_lib.loaders_from(config, dataset, mesh)
        resident = isinstance(loaders["train"], ResidentLoader)
        most, room = dispatch_sizes(config.steps_per_dispatch, resident, model.impl)

        @functools.partial(JitStep, loops=room > 0)
        def train(*tree: Any, numbers: Numbers) -> Any:
            tx = config_lib.optimizer_from(config, spans, numbers=numbers)[0]
            augment = config_lib.augment_from(config, dataset, numbers.seed)
            bound = config, dataset, model, tx, augment, loss, config.ema_decay, numbers.seed
            return train_on(*tree, step=bind_step(*bound))

        views, prepared = (config.test_time_flip, config.test_time_shift), dataset.preprocess
        evaluate = create_evaluate(model, *views, mean=prepared.mean, std=prepared.std)

        # ---- loop
        display = Display(spans.total, lambda: stopwatch.read()["compile"])
        lines = describe(config, dataset, model, state, mesh, spans, workdir, step)
        lines += [*start.describe(report), *(f"WARNING {text}" for text in dataset.warnings)]
        lines += [f"changed    {line}" for line in changes or ()]
        del start, given  # as large as the network
        display.print_all(lines)
        files = stack.enter_context(MetricFiles(workdir, step, workdir.name))
        stack.enter_context(display)
        stop = stack.enter_context(signals.watch(grace, deadline))
        validate = functools.partial(evaluate, loader=loaders["val"], stop=stop.requested)
        draw_schedule(schedule, spans, workdir / "schedule.png", workdir.name)
        if step == 0:
            first = fetch(loaders["train"].data, loaders["train"].train(0))
            draw_first_batch(first, augment, config.seed, dataset.classes, workdir)
            how = config.optimizer.name, float(schedule(0)), config.watch_gradient
            display.print_all(first_batch(state, first, one_step, *how))
        display.start(step)
        clock = Clock(config.batch_size)
        checkpoints.prepare({"state": state, "progress": progress})
        if step == 0 and config.on_divergence == "rollback":
            tree = {"state": state, "progress": progress}
            checkpoints.save(0, tree, dataclasses.asdict(notes), keep=set())
        while (step < spans.total and not notes.ended) or notes.unevaluated:
            next_eval, next_save, next_log = (
                min(spans.total, next_event(step, every))
                for every in (spans.eval_every, spans.checkpoint_every, config.log_every_steps)
            )
            evaluating = notes.unevaluated  # the evaluation of this step was interrupted
            if not evaluating:
                until = min(next_eval, next_save, next_log)
                count = clock.steps(until - step, most, room)
                with clock.waiting(room or count, progress), stopwatch.charge("data_wait"):
                    item = loaders["train"].train(step, count, room)
                stopwatch.to_training(room or count)
                before, data = progress, loaders["train"].data
                with jax.transfer_guard("disallow"):
                    state, progress = train(state, progress, data, item, numbers=numbers)
                jax.block_until_ready(before)  # one dispatch waits on the device, not thirty
                step += count
                clock.count(count, room or count, progress)
                display.advance(step, before.metrics)
                if step < until and not stop.requested():
                    continue

                jax.block_until_ready(progress)
                clock.pause()
                stopwatch.to("other")
                checkpoints.poll()
                sums = jax.device_get(progress)
                if not sums.finite:
                    what = explain_non_finite(state, loaders["train"], schedule, one_step)
                    images = loaders["train"].order.step(int(state.step))[0].tolist()
                    raise failures.non_finite(workdir, what, images)
                evaluating = step == next_eval
                if evaluating or step == next_log:
                    progress = replicate(Progress.empty(), mesh)
                    notes.epoch_sums = notes.epoch_sums.add(sums.metrics)
                    record = {"step": step, "epoch": step * config.batch_size / len(dataset.train)}
                    record |= {f"train_{k}": v for k, v in sums.metrics.summary().items()}
                    rate = float(schedule(step - 1)) * schedules.plateau_scale(state.opt_state)
                    record |= {"learning_rate": rate} | clock.read()
                    files.write(record)
                    display.status(record)
            if evaluating:
                with stopwatch.charge("eval"):
                    values = selection.evaluate_all(validate, state)
                notes.unevaluated = values is None
            if evaluating and values is not None:
                record = files.records[-1] | notes.epoch_sums.means() | values
                notes.epoch_sums = EpochSums()
                on_plateau = config.schedule.factor, config.schedule.patience
                opt_state = schedules.note_evaluation(
                    state.opt_state, values["eval_loss"], *on_plateau
                )
                state = dataclasses.replace(state, opt_state=replicate(opt_state, mesh))
                checkpoints.poll()
                if checkpoints.missed is not None:  # perhaps the best so far
                    resume.forget_unsaved(notes, checkpoints)
                improved = selection.note(notes, record, config.early_stopping)
                files.write(record)
                files.draw(always=False)
                display.epoch(record, improved)
                display.print_all(advice(record, loaders))
            stopping = stop.requested()
            if evaluating or step == next_save or stopping:
                with stopwatch.charge("save"):
                    tree = {"state": state, "progress": progress}
                    keep = {notes.best["step"], notes.best_ema["step"]}
                    seconds = stopwatch.read()
                    checkpoints.save(step, tree, dataclasses.asdict(notes), keep, seconds)
                stop.reserve = 1 + 2 * checkpoints.seconds
            if stopping:
                files.draw()
                checkpoints.finish()
                raise stop.stopped(step, spans.total)
            clock.restart(new_epoch=evaluating)
        files.draw()
        with stopwatch.charge("save"):
            checkpoints.finish()
        display.stop()
        if notes.ended:
            display.print(f"ended      at step {step:,}: {notes.ended}")

        # ---- the test split, once, with the best checkpoint
        result = workdir / "result.json"
        if result.exists():
            summary = rundir.read_json(result)
            display.print(f"training is already complete at step {step}")
        else:
            stopwatch.to("eval")
            test = None
            if "test" in loaders:
                test = functools.partial(evaluate, loader=loaders["test"], stop=stop.requested)
            at_end = step, state, checkpoints, abstract, mesh, validate, test
            chosen, best_state = selection.conclude(notes.best, *at_end)
            if state.ema:
                chosen |= selection.conclude(notes.best_ema, *at_end, averaged=True)[0]
            summary = {"model": config.model.name, "data": config.data.source, "steps": step}
            summary |= {"ended": notes.ended or "all steps done"} | chosen
            if stop.requested():
                raise stop.stopped(step, spans.total)
            stopwatch.to("other")
            if config.weights_txt:
                rundir.write_weights(workdir / "weights.txt", best_state.variables)
            summary["goodput"] = parts = {k: round(v, 3) for k, v in stopwatch.read().items()}
            summary |= {"seconds": round(sum(parts.values()), 1), "workdir": str(workdir)}
            rundir.write_json(result, summary)
            display.print(summarize(parts))
        if copy:
            copy()
        display.print(f"run directory: {workdir} (see {workdir / 'curves.png'})")
        display.print("RESULT " + json.dumps(summary))
    return state, summary
