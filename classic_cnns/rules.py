"""Settings by parameter name: ordered regular expressions, of which the first that matches decides.

(("^head/", {"lr": 10.0}), ("^(conv_init|stage1)", {"frozen": True}), ("bn", {"weight_decay": 0.0}))
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from classic_cnns.errors import ConfigError, nearest

Rules = Sequence[tuple[str, Mapping[str, Any]]]
SETTINGS = {"lr": "a factor of 0 or more", "weight_decay": "0 or more", "frozen": "True or False"}


def check(rules: Rules) -> None:
    """Raises ConfigError for what is wrong in the rules themselves, all at once."""
    problems = []
    for rule in rules:
        try:
            pattern, settings = rule
            re.compile(pattern)
            items = list(settings.items())
        except (AttributeError, TypeError, ValueError, re.error) as error:
            problems.append(f"{rule!r} is not (regular expression, settings): {error}")
            continue
        for name, value in items:
            if name not in SETTINGS:
                problems.append(f'{pattern}: unknown setting "{name}" ({nearest(name, SETTINGS)})')
            elif name == "frozen":
                if not isinstance(value, bool):
                    problems.append(f"{pattern}: frozen is {value!r}, not {SETTINGS[name]}")
            elif (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not (0 <= value < math.inf)
            ):
                problems.append(f"{pattern}: {name} is {value!r}, not {SETTINGS[name]}")
    if problems:
        raise ConfigError(f"optimizer.rules: {'; '.join(problems)}. Fix: see classic_cnns/rules.py")


def match(rules: Rules, params: Any) -> list[list[str]]:
    """The names, as in "stage1_block1/conv1/kernel", that each rule decides for.

    Raises:
        ConfigError: a rule decides for nothing; shows the names there are.
    """
    names = [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    found = [[n for n in names if _first(rules, n) == i] for i in range(len(rules))]
    idle = [f'"{pattern}"' for (pattern, _), mine in zip(rules, found, strict=True) if not mine]
    if idle:
        raise ConfigError(
            f"optimizer.rules: {', '.join(idle)} matches no parameter that an earlier rule has not "
            f"matched. Fix: one of {', '.join(names[:12])}{', …' if len(names) > 12 else ''}"
        )
    return found


def setting(rules: Rules, name: str, otherwise: Any) -> Callable[[Any], Any]:
    """A function of params that gives a tree of one setting; `otherwise` where no rule says it,
    itself a function of params that gives a tree.
    """

    def tree(params: Any) -> Any:
        def one(path: Any, default: Any) -> Any:
            first = _first(rules, _name(path))
            return default if first is None else rules[first][1].get(name, default)

        return jax.tree_util.tree_map_with_path(one, otherwise(params))

    return tree


def frozen(rules: Rules) -> Callable[[Any], Any] | None:
    """A function of params that gives True for what is frozen; None where nothing is."""
    if not any(settings.get("frozen") for _, settings in rules):
        return None
    return setting(rules, "frozen", lambda params: jax.tree.map(lambda _: False, params))


def describe(rules: Rules, params: Any) -> list[str]:
    """A line for each rule: what it sets, and on what."""
    sizes = {_name(path): p.size for path, p in jax.tree_util.tree_flatten_with_path(params)[0]}
    lines = []
    for (pattern, settings), names in zip(rules, match(rules, params), strict=True):
        what = ", ".join(f"{k}={v}" for k, v in settings.items())
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        count = f"{len(names)} tensors with {sum(sizes[n] for n in names):,} parameters"
        lines.append(f"rule       {pattern}: {what} on {count}: {some}")
    return lines


def _first(rules: Rules, name: str) -> int | None:
    return next((i for i, (pattern, _) in enumerate(rules) if re.search(pattern, name)), None)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
