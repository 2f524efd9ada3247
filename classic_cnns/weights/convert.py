"""Between our variables and flat dictionaries of arrays in another library's names and layouts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from classic_cnns.errors import DataError
from classic_cnns.weights.dialects import Dialect, dialects
from classic_cnns.weights.program import short

Flat = dict[str, np.ndarray]
_CONTAINERS = (
    "state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema", "params",
)  # fmt: skip
_PREFIXES = ("module.", "_orig_mod.", "params/", "batch_stats/")  # the latter are our own

# Our leaf → theirs. PyTorch calls a scale and a kernel "weight"; Keras has its own words.
_TORCH = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_KERAS = {
    "kernel": "kernel",
    "scale": "gamma",
    "bias": "beta",
    "mean": "moving_mean",
    "var": "moving_variance",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every array.

    Attributes:
        dialect: whose names were found.
        loaded: our paths that were filled.
        kept: our paths that kept their values, since the file has none or they were excluded.
        dropped: their keys that have no place in the network.
    """

    dialect: str
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.dialect} names: {len(self.loaded)} arrays loaded"]
        for name, items in (("kept at init", self.kept), ("dropped", self.dropped)):
            if items:
                more = f" and {len(items) - 10} more" if len(items) > 10 else ""
                lines.append(f"{name}: {', '.join(items[:10])}{more}")
        return "\n".join(lines)


def unwrap(value: Any) -> Flat:
    """The weights inside a checkpoint: out of its containers, without prefixes and counters.

    Raises:
        DataError: no arrays in it.
    """
    while isinstance(value, dict):
        inner = next((value[c] for c in _CONTAINERS if isinstance(value.get(c), dict)), None)
        if inner is None:
            break
        value = inner
    arrays = (
        {k: v for k, v in value.items() if isinstance(v, np.ndarray)}
        if isinstance(value, dict)
        else {}
    )
    if not arrays:
        raise DataError(
            "no weights found. Fix: a file with a state dict, not a whole pickled module"
        )
    out: Flat = {}
    for key, array in arrays.items():
        key = str(key)
        while prefix := next((p for p in _PREFIXES if key.startswith(p)), None):
            key = key.removeprefix(prefix)
        if key.endswith("num_batches_tracked"):
            continue
        if key in out:
            raise DataError(f"the key {short(key)} is there twice without prefixes. Fix: the file")
        out[key] = array
    return out


def detect(model: nn.Module, keys: Mapping[str, np.ndarray]) -> Dialect:
    """The dialect that names most of the keys; of equals one whose classifier takes as many values.

    Raises:
        DataError: none names any.
    """
    scores = []
    for dialect in dialects(model):
        paths = _leaves(model.clone(**dialect.fields))
        theirs = {key_of(dialect, "/".join(path[:-1]), path[-1]) for path in paths}
        other = sum(
            keys[key].shape[1:] != (math.prod(size),)
            for layer, size in dialect.flatten.items()
            if (key := str(key_of(dialect, layer, "kernel"))) in keys
        )
        score = len(theirs & keys.keys()) - len(theirs - keys.keys()) / 1000 - other / 100
        scores.append((score, dialect))
    best, dialect = max(scores, key=lambda s: s[0])
    if best <= 0:
        some = ", ".join(sorted(keys)[:5])
        raise DataError(f"its names are of another network: {some}, …. Fix: the right --model")
    return dialect


def _leaves(
    model: nn.Module, side: int | None = None, channels: int = 3
) -> dict[tuple[str, ...], Any]:
    """Abstract variables by path, without the collection: "conv1", "kernel" → ShapeDtypeStruct."""
    side = side or max(model.min_size(), 224 if _large(model) else 32)  # type: ignore[attr-defined]
    x = jnp.zeros((1, side, side, channels))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return {path[1:]: leaf for path, leaf in flatten_dict(dict(variables)).items()}


def _large(model: nn.Module) -> bool:
    return getattr(model, "stem", getattr(model, "head", "")) != "cifar" and hasattr(
        model, "stem_for"
    )


def from_theirs(
    model: nn.Module,
    variables: Any,
    theirs: Flat,
    dialect: Dialect,
    *,
    exclude: str = "",
    partial: bool = False,
) -> tuple[Any, Report]:
    """Fills our variables with their arrays.

    Args:
        model: whose dialect it is.
        variables: {"params", "batch_stats"} as NumPy arrays, which give shapes and what is kept.
        theirs: see `unwrap`.
        dialect: see `detect`.
        exclude: a regular expression; our paths that it matches are kept.
        partial: let the file lack arrays, or have others, without an error.

    Returns:
        Variables of the same tree, and the report.

    Raises:
        DataError: lists every array that is missing, left over, of another shape, or not finite.
    """
    flat = flatten_dict(dict(variables))
    out, loaded, kept, problems, used = dict(flat), [], [], [], set()
    for path, old in flat.items():
        layer, leaf = "/".join(path[1:-1]), path[-1]
        name = f"{layer}/{leaf}"
        key = key_of(dialect, layer, leaf)
        bias_key = f"{layer_of_conv(dialect, layer)}/bias"
        folded = leaf == "mean" and dialect.name == "keras" and bias_key in theirs
        if exclude and re.search(exclude, name):
            kept.append(name)
            used |= {key, bias_key} if folded else {key}
            continue
        if key not in theirs:
            kept.append(name)
            if not partial:
                problems.append(f"{name}: {key or 'no such layer'} is missing")
            continue
        used.add(key)
        array = theirs[key]
        if folded:
            bias = theirs[bias_key]
            used.add(bias_key)
            if bias.shape != array.shape:
                problems.append(f"{name}: {bias_key} has shape {bias.shape}, not {array.shape}")
                continue
            array = array - bias  # of the convolution before, exactly
        try:
            new = to_ours(array, dialect, layer, old.ndim)
        except ValueError as error:
            problems.append(f"{name}: {key} of shape {array.shape}: {error}")
            continue
        if new.shape != old.shape:
            problems.append(
                f"{name}: {key} has shape {new.shape} in our layout, {old.shape} expected"
            )
        elif not np.isfinite(new).all():
            problems.append(f"{name}: {key} is not finite")
        else:
            out[path] = new
            loaded.append(name)
    dropped = sorted(set(theirs) - {u for u in used if u})
    if not partial:
        problems += [f"{key}: has no place in the network" for key in dropped]
    if problems:
        shown = "\n  ".join(problems[:30])
        more = f"\n  and {len(problems) - 30} more" if len(problems) > 30 else ""
        raise DataError(
            f"{len(problems)} arrays do not fit ({dialect.name} names):\n  {shown}{more}\n"
            "Fix: the model and num_classes it was made for, or exclude (--exclude=^head/), or "
            "partial (--partial)"
        )
    report = Report(dialect.name, tuple(loaded), tuple(kept), tuple(dropped))
    return unflatten_dict(out), report


def to_theirs(variables: Any, dialect: Dialect) -> Flat:
    """Our variables in another library's names and layouts, float32.

    Raises:
        DataError: layers that it has no name for.
    """
    out: Flat = {}
    unknown = []
    for path, array in flatten_dict(dict(variables)).items():
        layer, leaf = "/".join(path[1:-1]), path[-1]
        key = key_of(dialect, layer, leaf)
        if key is None:
            unknown.append(layer)
        else:
            out[key] = from_ours(np.asarray(array), dialect, layer, leaf)
    if unknown:
        raise DataError(
            f"{dialect.name} has no name for {', '.join(sorted(set(unknown)))}. Fix: another --to"
        )
    return out


def key_of(dialect: Dialect, layer: str, leaf: str) -> str | None:
    """Their key of one of our arrays, or None."""
    name = dialect.layer(layer)
    if name is None:
        return None
    if dialect.name == "ours":
        return f"{name}/{leaf}"
    if dialect.name == "keras":
        word = "bias" if leaf == "bias" and "bn" not in layer.rsplit("/", 1)[-1] else _KERAS[leaf]
        return f"{name}/{word}"
    return f"{name}.{_TORCH[leaf]}"


def layer_of_conv(dialect: Dialect, bn: str) -> str | None:
    """Their name of the convolution before one of our BatchNorms."""
    head, _, last = bn.rpartition("/")
    return dialect.layer((f"{head}/" if head else "") + last.replace("bn", "conv", 1))


def to_ours(array: np.ndarray, dialect: Dialect, layer: str, ndim: int) -> np.ndarray:
    """Another library's layout to ours: HWIO kernels, (in, out) matrices, HWC flattening."""
    if dialect.as_ours or array.ndim < 2:
        array = np.array(array, np.float32)  # a copy, so that a mapped file can be let go
        return array.squeeze() if array.ndim > ndim else array
    array = np.asarray(array, np.float32)
    if array.ndim == 2 and layer in dialect.flatten and ndim == 2:
        channels, height, width = dialect.flatten[layer]
        array = array.reshape(len(array), channels, height, width)
    if array.ndim == 2:
        return np.ascontiguousarray(array.T)
    array = np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return array.reshape(-1, array.shape[-1]) if ndim == 2 else array


def from_ours(array: np.ndarray, dialect: Dialect, layer: str, leaf: str) -> np.ndarray:
    """The inverse of `to_ours`, bit for bit."""
    if leaf != "kernel" or dialect.as_ours:
        return array
    if layer in dialect.dense_as_conv:
        height, width = dialect.dense_as_conv[layer]
        array = array.reshape(height, width, -1, array.shape[-1])
    elif layer in dialect.flatten:
        channels, height, width = dialect.flatten[layer]
        if array.shape[0] != height * width * channels:
            raise DataError(
                f"{layer} takes {array.shape[0]} values; {dialect.name} has {height}×{width} maps "
                f"of {channels} channels. Fix: --to=safetensors, which takes any size"
            )
        array = array.reshape(height, width, channels, -1).transpose(3, 2, 0, 1)
        return np.ascontiguousarray(array.reshape(len(array), -1))
    if array.ndim == 2:
        return np.ascontiguousarray(array.T)
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
