"""Flags in, exit code out: the only place that knows about both."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from classic_cnns.errors import (
    ClassicCNNsError,
    ClassicCNNsWarning,
    ConfigError,
    describe,
    nearest,
    print_anything,
    printable,
)

# Whose fields are arguments of a network or an optax function: a config file need not hold them.
_OPEN = ("model.options.", "optimizer.options.")
# Any field is accepted: `_check_fields` knows which there are.
_CONFIG: dict[str, Any] = {"lock_config": False, "accept_new_attributes": True}

STARTED = time.monotonic()  # close to the start of the process: max_seconds counts from here


def main(doc: str) -> None:
    """All of main.py: reads the command line and trains.

    Args:
        doc: what --help shows before the flags.
    """
    print_anything()
    define_flags()
    if {"--help", "-help", "-h"} & set(sys.argv[1:]):
        text = flags.FLAGS.module_help(sys.modules[__name__])
        with lasting_output():
            print(f"{doc}\n{text}\n  --config.FIELD=VALUE: any field of configs/default.py")
        leave(0)
    app.run(lambda argv: train(argv, flags.FLAGS), flags_parser=parse)


def define_flags() -> None:
    """Defines all flags but those of absl."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run; a run in it is continued. Default: a new one in runs/.",
    )
    flags.DEFINE_string(
        "mirror",
        None,
        "Directory on another disk for a copy of all that is needed to go on; where the workdir is "
        "empty, the run in the mirror is continued.",
    )
    flags.DEFINE_bool(
        "extend",
        False,
        "num_epochs or num_steps may be larger than when the run began; the schedule is then that "
        "of the longer training.",
    )
    flags.DEFINE_float(
        "max_seconds", 0.0, "Save and leave before this many seconds are over; 0 = never.", 0.0
    )
    flags.DEFINE_float(
        "grace", 25.0, "Seconds that saving may take after SIGTERM, Ctrl-C or SIGHUP.", 0.0
    )
    flags.DEFINE_bool(
        "deterministic", False, "Use only GPU kernels whose results are reproducible to the bit."
    )
    flags.DEFINE_string(
        "compilation_cache",
        "default",
        "Directory of compiled programs, used again by later runs; default = in the user's cache "
        'directory, "" = none.',
    )
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    define_config()


def define_config() -> None:
    """Defines --config, a file with `get_config`, and --config.FIELD for each of its fields."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "A config file, perhaps with :DATASET. Default: configs/default.py.",
        **_CONFIG,
    )


def parse(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake in it is one line and exit code 2."""
    # --config chooses the file whose fields the other flags override, so it goes first.
    chosen = [a for a in argv[1:] if re.match(r"--?config=", a)]
    default = f"--config={Path(argv[0]).parent / 'configs' / 'default.py'}"
    argv = [argv[0], *(chosen[-1:] or [default]), *[a for a in argv[1:] if a not in chosen]]
    try:
        _check_fields(argv, _fields(argv))
        sys.argv = argv  # where ml_collections looks for overrides
        return flags.FLAGS(argv)
    except ClassicCNNsError as error:
        fail(error)
    except Exception as error:  # absl and ml_collections raise many kinds for a wrong flag
        if "--debug" in argv:
            raise
        fail(ConfigError(f"{' '.join(str(error).split())}. Fix: see --help and configs/default.py"))


def read_config(chosen: str, overrides: Sequence[str] = ()) -> Any:
    """The ConfigDict that `--config=CHOSEN` and `--config.FIELD=VALUE` flags mean.

    Args:
        chosen: a config file, perhaps with :DATASET.
        overrides: flags, in the same words as for main.py.

    Raises:
        ConfigError: no such file or field, or a value of the wrong kind.
    """
    argv = ["classic-cnns", f"--config={chosen}", *overrides]
    holder, before = flags.FlagValues(), sys.argv
    # A config file imports configs.default, which main.py finds beside itself.
    sys.path.insert(0, str(Path(chosen.split(":")[0]).resolve().parents[1]))
    try:
        _check_fields(argv, _fields(argv))
        config_flags.DEFINE_config_file("config", None, flag_values=holder, **_CONFIG)
        sys.argv = argv  # where ml_collections looks for overrides
        holder(argv)
        return holder["config"].value
    except ClassicCNNsError:
        raise
    except Exception as error:  # absl and ml_collections raise many kinds for a wrong flag
        raise ConfigError(f"{' '.join(str(error).split())}. Fix: see configs/default.py") from error
    finally:
        sys.argv = before
        del sys.path[0]


def _fields(argv: list[str]) -> list[str]:
    """Names of all fields of the config file that the first flag names."""
    from classic_cnns.config import flatten

    path = Path(argv[1].split("=", 1)[1].split(":")[0])
    if not path.is_file():
        found = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        fix = nearest(str(path), found) if found else "a file in configs/"
        raise ConfigError(f"--config: no file {path}. Fix: {fix}")
    holder = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=holder)
    sys.argv = argv[:2]
    try:
        holder(argv[:2])
    except Exception as error:  # whatever the file raises, wrapped by ml_collections
        last = str(error).strip().splitlines()[-1]
        raise ConfigError(f"{argv[1]}: {last}. Fix: the config file") from error
    return list(flatten(holder["config"].value))


def _check_fields(argv: list[str], known: list[str]) -> None:
    names = [m.group(1) for a in argv if (m := re.match(r"--?(?:no)?config\.([\w.]+)", a))]
    wrong = [
        f'"{name}" ({nearest(name, known)})'
        for name in names
        if name not in known and not name.startswith(_OPEN)
    ]
    if wrong:
        raise ConfigError(f"unknown config field {', '.join(wrong)}")


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, stdout and stderr are `Lasting`."""
    out: Any = Lasting(sys.stdout)
    err: Any = Lasting(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


@lasting_output()
def train(argv: list[str], values: Any) -> None:
    """Runs the training that the flags ask for."""
    if len(argv) > 1:
        fail(ConfigError(f"unexpected argument {argv[1]!r}. Fix: flags start with --"))
    logging.set_verbosity(logging.INFO if values.debug else logging.ERROR)
    warnings.showwarning = show_warning
    try:
        if values.deterministic:
            _make_deterministic()
        from classic_cnns.compile_cache import collect_seldom, keep_compiled
        from classic_cnns.doctor import check_devices
        from classic_cnns.train import train_and_evaluate

        collect_seldom()
        keep_compiled(values.compilation_cache)
        check_devices()
        train_and_evaluate(
            values.config,
            values.workdir,
            extend=values.extend,
            mirror=values.mirror,
            grace=values.grace,
            max_seconds=(values.max_seconds or float("inf")) - (time.monotonic() - STARTED),
        )
    except KeyboardInterrupt:
        print("STOPPED by SIGINT before the training began", file=sys.stderr)
        leave(130)
    except Exception as error:
        if values.debug:
            raise
        fail(error)
    leave(0)


def _make_deterministic() -> None:
    """Asks XLA for reproducible GPU kernels, which it reads from the environment as JAX starts."""
    from classic_cnns.rundir import DETERMINISTIC

    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Ours as a line for people; those of libraries with --debug."""
    if issubclass(category, ClassicCNNsWarning):
        print(f"WARNING {printable(str(message))}", file=sys.stderr)
    else:
        logging.warning("%s: %s", category.__name__, message)


class Lasting:
    """A stream that drops what nobody can read any more, because the terminal was closed or the
    program behind a pipe ended: a training goes on.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of any stream."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of any stream."""
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # for ever; and Python writes at its exit
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def fail(error: Exception) -> NoReturn:
    """Prints an error in one line and exits with its code; 1 for one that nobody foresaw."""
    print(printable(describe(error)), file=sys.stderr)
    leave(getattr(error, "exit_code", 1))


def leave(code: int) -> NoReturn:
    """Exits; where threads of a library hold the process, without them after two seconds."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    timer = threading.Timer(2.0, os._exit, [code])
    timer.daemon = True
    timer.start()
    sys.exit(code)
