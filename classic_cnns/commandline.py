"""Flags in, exit code out: the only place that knows about both."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import config_flags

from classic_cnns.errors import ClassicCNNsError, ConfigError, nearest


def define_config() -> None:
    """Defines --config, a file with `get_config`, and --config.FIELD for each of its fields."""
    config_flags.DEFINE_config_file(
        "config", None, "A config file, perhaps with :DATASET. Default: configs/default.py."
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
    wrong = [f'"{name}" ({nearest(name, known)})' for name in names if name not in known]
    if wrong:
        raise ConfigError(f"unknown config field {', '.join(wrong)}")


def train(argv: list[str], values: Any) -> None:
    """Runs the training that the flags ask for."""
    if len(argv) > 1:
        fail(ConfigError(f"unexpected argument {argv[1]!r}. Fix: flags start with --"))
    from classic_cnns.train import train_and_evaluate

    logging.set_verbosity(logging.INFO if values.debug else logging.ERROR)
    try:
        train_and_evaluate(values.config, values.workdir)
    except ClassicCNNsError as error:
        if values.debug:
            raise
        fail(error)


def fail(error: ClassicCNNsError) -> NoReturn:
    """Prints an error in one line and exits with its code."""
    print(f"ERROR {error}", file=sys.stderr)
    sys.exit(error.exit_code)
