"""Flags in, exit code out: the only place that knows about both."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import config_flags

from classic_cnns.errors import ClassicCNNsError, ConfigError, nearest


def define_config(default: str) -> None:
    """Defines --config, a Python file with `get_config`, and an override --config.FIELD for every
    field.
    """
    config_flags.DEFINE_config_file(
        "config", default, "A config file, perhaps with :DATASET.", lock_config=True
    )


def parse(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake in it is one line and exit code 2."""
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # absl and ml_collections raise many kinds for a wrong flag
        if "--debug" in argv:
            raise
        fail(ConfigError(_explain(error, argv)))


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


def _explain(error: Exception, argv: list[str]) -> str:
    text = " ".join(str(error).split())
    paths = [a.split("=", 1)[-1] for a in argv if re.match(r"--?config(=|$)", a)]
    path = Path(paths[-1].split(":")[0]) if paths else None
    if path and not path.is_file():
        found = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        return (
            f"--config: no file {path}. Fix: "
            f"{nearest(str(path), found) if found else 'a file in configs/'}"
        )
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        field = match.group(1) if match else ""
        if field and (f"config.{field}" in text or field.rsplit(".", 1)[-1] in text):
            known = _fields(argv)
            if known and field not in known:
                return f'unknown config field "{field}". Fix: {nearest(field, known)}'
            return (
                f"--config.{field}: {text}. Fix: a value of the field's type, see "
                "configs/default.py"
            )
    return f"{text}. Fix: see --help"


def _fields(argv: list[str]) -> list[str]:
    """All fields of the config that --config names, without the overrides."""
    holder = flags.FlagValues()
    config_flags.DEFINE_config_file("config", "configs/default.py", flag_values=holder)
    try:
        holder([argv[0], *[a for a in argv[1:] if re.match(r"--?config=", a)]])
    except Exception:  # the config file itself is broken: its own error says more
        return []
    from classic_cnns.config import flatten

    return list(flatten(holder["config"].value))
