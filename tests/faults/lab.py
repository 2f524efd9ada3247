"""A training as a child process that can be killed, stopped or starved at a chosen moment.

Children are forked from a process that has imported everything and started nothing, which saves two
of five seconds; they share a cache of compiled programs. A fault needs nothing in the program: an
audit hook, which Python calls before it opens, renames or removes a file, kills the process or
raises the error there.
"""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from classic_cnns.data.loaders import ResidentLoader, StreamLoader
from classic_cnns.logging import read_records
from classic_cnns.saved import SavedCheckpoints

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(tempfile.gettempdir()) / f"classic_cnns-faults-{os.getuid()}-jax{jax.__version__}"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TIMES = ("images_per_sec", "input_wait")
SMALL = {
    "num_steps": 24,
    "batch_size": 32,
    "log_every_steps": 3,
    "checkpoint_every_steps": 5,
    "eval_every_steps": 8,
    "schedule.name": "constant",  # one program whatever the length
    "schedule.warmup_epochs": 0.0,
}


@dataclasses.dataclass
class Fault:
    """What happens at the nth change of a file whose path matches.

    Args:
        path: pattern of `fnmatch` for the absolute path.
        number: 1 = the first such change.
        action: "KILL", or the name of an errno such as "ENOSPC", which the change then fails with.
        times: that it fails, from then on.
        mark: a file that is made when it happens, for a process that cannot see `seen`.

    Attributes:
        seen: changes so far.
    """

    path: str
    number: int = 1
    action: str = "KILL"
    times: int = 1
    mark: Path | None = None
    seen: int = 0

    def install(self) -> None:
        """Arms it in this process; `disarm` ends that."""
        if not _armed:
            sys.addaudithook(_hook)
        _armed.append(self)

    def disarm(self) -> None:
        """The end of it."""
        _armed[_armed.index(self)] = None

    def look(self, event: str, args: tuple) -> None:
        """Called before every audited event."""
        changed = _changed(event, args)
        if not any(fnmatch.fnmatch(path, self.path) for path in changed):
            return
        self.seen += 1
        if not self.number <= self.seen < self.number + self.times:
            return
        if self.mark:
            self.mark.touch()
        if self.action == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.action)
        raise OSError(code, os.strerror(code), changed[0])


_armed: list[Fault | None] = []  # an audit hook can be added, but not removed


def _hook(event: str, args: tuple) -> None:
    for fault in _armed:
        if fault:
            fault.look(event, args)


def _changed(event: str, args: tuple) -> list[str]:
    """Absolute paths that an audited event is about to change."""
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITES:
        found = [(args[0], -1)]
    elif event == "os.rename":
        found = [(args[0], args[2]), (args[1], args[3])]
    elif event in ("os.remove", "os.rmdir"):
        found = [(args[0], args[1])]
    elif event == "os.mkdir":
        found = [(args[0], args[2])]
    else:
        return []
    return [
        os.path.join(os.readlink(f"/proc/self/fd/{at}") if at >= 0 else os.getcwd(), os.fsdecode(p))
        for p, at in found
    ]


class Child:
    """A process that runs main.py."""

    def __init__(self, process: multiprocessing.Process, output: Path) -> None:
        self.process, self._output = process, output

    @property
    def output(self) -> str:
        """Everything printed so far."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def when(self, condition, timeout: float = 180.0) -> None:
        """Returns as soon as `condition()` holds."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.is_alive(), f"ended too soon:\n{self.output}"
            assert time.monotonic() < end, f"waited {timeout} s:\n{self.output}"
            time.sleep(0.002)

    def frozen(self) -> bool:
        """Whether it has been stopped by SIGSTOP."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ")[-1][0] == "T"

    def signal(self, *numbers: int) -> None:
        """Sends signals."""
        for number in numbers:
            os.kill(self.process.pid, number)

    def end(self, timeout: float = 180.0) -> int:
        """Waits for its exit code, negative after a signal."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still alive after {timeout} s:\n{self.output}")
        return self.process.exitcode


class Lab:
    """Starts children.

    Args:
        directory: for what they print.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._count = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lab", *PRELOAD])

    def start(
        self,
        workdir: Path,
        *flags: str,
        before: Callable[[], object] | None = None,
        config: str = "lenet5.py:fake",
        devices: int = 1,
        **fields: object,
    ) -> Child:
        """A training of a few steps.

        Args:
            workdir: of the run.
            flags: further ones.
            before: called in the child first, to arm a fault for example.
            config: in configs/.
            devices: how many the CPU seems to be.
            fields: of the config, with "__" for a dot.
        """
        fields = SMALL | {k.replace("__", "."): v for k, v in fields.items()}
        argv = [
            str(ROOT / "main.py"),
            f"--config={ROOT / 'configs' / config}",
            f"--workdir={workdir}",
            *(f"--config.{k}={v}" for k, v in fields.items()),
            *flags,
        ]
        return self.call(run_main, argv, devices, before=before)

    def call(self, function, *args: object, before: Callable[[], object] | None = None) -> Child:
        """A function in a child."""
        self._count += 1
        output = self.directory / f"output-{self._count}.txt"
        process = self._context.Process(
            target=_child, args=(output, before, function, args), daemon=True
        )
        process.start()
        return Child(process, output)

    def run(self, *args: object, timeout: float = 180.0, **kwargs: object) -> tuple[int, str]:
        """Exit code and output of a training."""
        child = self.start(*args, **kwargs)
        return child.end(timeout), child.output


PRELOAD = (
    "classic_cnns.train",
    "classic_cnns.commandline",
    "classic_cnns.plots",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "orbax.checkpoint.experimental.v1",
    "tensorboardX.event_file_writer",
    "tensorboardX.summary",
)


def _child(output: Path, before: Callable[[], object] | None, function, args: tuple) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    _draw_quickly()
    if before:
        before()
    function(*args)


def _draw_quickly() -> None:
    """Figures without content, as drawing is most of what a short run does."""
    from matplotlib.figure import Figure

    def savefig(self: Figure, file, **_: object) -> None:
        png = b"\x89PNG"
        file.write(png) if hasattr(file, "write") else Path(file).write_bytes(png)

    Figure.savefig = savefig


def at_step(step: int, action: Callable[[], object]) -> None:
    """Makes this process do something each time it asks for images, from a step on."""
    for kind in (ResidentLoader, StreamLoader):
        plain = kind.train

        def train(self, at, count=1, room=0, plain=plain):
            if at + count > step:
                action()
            return plain(self, at, count, room)

        kind.train = train


def kill_at_step(step: int) -> None:
    """The process dies when it comes to a step."""
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def freeze_at_step(step: int) -> None:
    """The process stands still before every step from this one on, until SIGCONT."""
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def crawl() -> None:
    """Every step takes half a second."""
    plain = ResidentLoader.train

    def train(self, at, count=1, room=0):
        time.sleep(0.5 * count)
        return plain(self, at, count, room)

    ResidentLoader.train = train


def run_main(argv: list[str], devices: int) -> None:
    """main.py with a command line."""
    from classic_cnns import commandline

    commandline.STARTED = time.monotonic()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def outcome(workdir: Path) -> dict[str, object]:
    """What must not depend on whether a run was interrupted."""
    checkpoints = SavedCheckpoints(workdir / "checkpoints")
    step = checkpoints.steps()[-1]
    manifest = checkpoints.manifest(step)
    result = json.loads((workdir / "result.json").read_text())
    return {
        "step": step,
        "state": digest(checkpoints.read(step)["state"]),
        "notes": manifest["notes"],
        "records": [
            {k: v for k, v in record.items() if k not in TIMES}
            for record in read_records(workdir / "metrics.jsonl")
        ],
        "result": {k: v for k, v in result.items() if k not in ("seconds", "workdir", "goodput")},
    }


def digest(tree: object) -> str:
    """SHA-256 of every name, type, shape and bit."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
