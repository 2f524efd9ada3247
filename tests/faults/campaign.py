"""Kills trainings at random moments, again and again, and compares what becomes of them.

    python tests/faults/campaign.py --kills 200

One training after the other is killed (-9) until it gets to its end, on two networks and both
loaders, with a cache of decoded images that is made anew each time. Half of the kills come at a
random moment, half at a random change of a file of the run or of the cache, as these are where a
kill could do harm. Prints a table for docs/reliability.md.
"""

import argparse
import collections
import functools
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from lab import Fault, Lab, outcome  # noqa: E402

from classic_cnns.data.sources import fake  # noqa: E402
from classic_cnns.timing import Stopwatch  # noqa: E402

SMALL = {"num_steps": 10, "log_every_steps": 2, "checkpoint_every_steps": 3, "eval_every_steps": 4}
FOLDER = {"data__image_size": 32, "augment__crop_padding": 2}
KINDS = {
    "lenet5, resident": {"config": "lenet5.py:fake", "augment__mixup_alpha": 0.4},
    "lenet5, stream and cache": {
        "config": "lenet5.py:folder",
        "data__loader": "stream",
        "data__on_bad_image": "skip",
        **FOLDER,
    },
    "resnet10, resident": {
        "config": "resnet18.py:fake",
        "model__name": "resnet10",
        "batch_size": 8,
    },
    "resnet10, stream and cache": {
        "config": "resnet18.py:folder",
        "model__name": "resnet10",
        "batch_size": 8,
        "data__loader": "stream",
        **FOLDER,
    },
}


def watch(phase: Path, fault: Fault | None) -> None:
    """Writes down what the time of this process is charged to; arms a fault."""
    plain = Stopwatch.to
    file = os.open(phase, os.O_WRONLY | os.O_CREAT)

    def to(self: Stopwatch, part: str) -> None:
        os.pwrite(file, f"{part:12}".encode(), 0)
        plain(self, part)

    Stopwatch.to = to
    if fault:
        fault.install()


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        campaign(args.kills, random.Random(args.seed), Path(directory))


def campaign(kills: int, rng: random.Random, directory: Path) -> None:
    """Lines of runs until there were so many kills."""
    lab = Lab(directory)
    photos = make_photos(directory / "photos")
    whole = {}
    seconds = {}
    for kind, fields in KINDS.items():
        for _ in range(2):  # the first one compiles
            run = directory / "whole"
            shutil.rmtree(run, ignore_errors=True)
            start = time.monotonic()
            code, output = lab.run(run, timeout=300, **settings(fields, photos, directory / "c"))
            assert code == 0, output
            seconds[kind] = time.monotonic() - start
        whole[kind] = outcome(run)
        print(f"{kind}: {seconds[kind]:.1f} s without a kill", flush=True)
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    count = lines = 0
    while count < kills:
        kind = list(KINDS)[lines % len(KINDS)]
        lines += 1
        run, cache = directory / f"run{lines}", directory / f"cache{lines}"
        flags = settings(KINDS[kind], photos, cache)
        for attempt in range(100):
            phase = directory / "phase"
            phase.unlink(missing_ok=True)
            aimed = rng.random() < 0.5 and attempt < 12
            fault = Fault(f"{directory}/*{lines}/*", rng.randrange(1, 60)) if aimed else None
            child = lab.start(run, before=functools.partial(watch, phase, fault), **flags)
            if not aimed and attempt < 12:
                child.process.join(rng.uniform(0.2, 1.1 * seconds[kind]))
                if child.process.is_alive():
                    child.process.kill()
            code = child.end(120)
            if code == 0:
                break
            assert code == -9, child.output
            count += 1
            table[kind][moment(run, cache, phase)] += 1
            table[kind]["in a save or deletion"] += window(run)
        result = outcome(run)
        for key, expected in whole[kind].items():
            assert result[key] == expected, (kind, key, result[key], expected)
        print(f"{count} kills, {lines} runs identical", flush=True)
        shutil.rmtree(run)
        shutil.rmtree(cache, ignore_errors=True)
    columns = sorted({name for row in table.values() for name in row})
    print("| |" + "|".join(columns) + "|")
    for kind, row in table.items():
        print(f"| {kind} |" + "|".join(str(row[name]) for name in columns) + "|")
    print(f"{count} kills, {lines} runs, all identical to those never killed")


def settings(fields: dict, photos: Path, cache: Path) -> dict:
    """Arguments of `Lab.start`."""
    given = SMALL | fields
    if "folder" in given["config"]:
        given |= {"data__dir": str(photos), "data__cache": str(cache)}
    return given


def make_photos(folder: Path) -> Path:
    """Two hundred PNG files in ten folders."""
    from PIL import Image

    made = fake(32, count=200)["all"]
    for i, (pixels, label) in enumerate(zip(made.images, made.labels, strict=True)):
        (folder / str(label)).mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels).save(folder / str(label) / f"{i}.png")
    return folder


def moment(run: Path, cache: Path, phase: Path) -> str:
    """What the killed process was doing."""
    if window(run):
        return "saving"
    if not (run / "config.json").exists():
        return "caching" if cache.exists() else "starting"
    if (run / "result.json").exists():
        return "closing"
    part = (phase.read_text().strip() if phase.exists() else "") or "starting"
    return {"eval": "evaluating", "useful": "training", "data_wait": "training"}.get(part, part)


def window(run: Path) -> bool:
    """Whether a checkpoint was being written or deleted."""
    folder = run / "checkpoints"
    return folder.exists() and any(p.name.startswith(".") for p in folder.iterdir())


if __name__ == "__main__":
    main()
