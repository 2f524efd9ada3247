"""Weights in and out of other ecosystems: `load_weights`, `save_bundle`, `export_weights`."""

from __future__ import annotations

import dataclasses
import io
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from classic_cnns import manifest, rundir
from classic_cnns.checkpoints import Checkpoints
from classic_cnns.errors import ConfigError, DataError, WorkdirError
from classic_cnns.loading import LoadedRun
from classic_cnns.models import create_model, resolve_name
from classic_cnns.models.googlenet import GoogLeNet
from classic_cnns.models.resnet import ResNet
from classic_cnns.weights import dialects as dialects_lib
from classic_cnns.weights.convert import Report, detect, from_theirs, key_of, to_theirs
from classic_cnns.weights.files import (
    NO_OPTIONS,
    About,
    read_about,
    read_weights,
    write_safetensors,
)
from classic_cnns.weights.hdf5 import with_biases, write_h5
from classic_cnns.weights.preprocessing import FIRST_LAYERS, preprocess_of
from classic_cnns.weights.pretrained import fetch_pretrained, is_tag


def load_weights(
    path: str | Path,
    model: str = "",
    *,
    dialect: str = "",
    num_classes: int = 0,
    exclude: str = "",
    partial: bool = False,
    classes: Sequence[str] = (),
    **fields: Any,
) -> tuple[LoadedRun, Report]:
    """Reads another library's weights into one of our networks.

    Args:
        path: of the file, see `read_weights`, or "torchvision:IMAGENET1K_V1" or "…_V2" for
            published weights, see `fetch_pretrained`.
        model: name of the network; "" where the file says it itself, as those of `export_weights`
            in .safetensors do.
        dialect: whose names the file has; "" finds out.
        num_classes: of our network; 0 = as many as the file's classifier has.
        exclude: regular expression over our paths that keep their initial values, for example
            "^head/".
        partial: let arrays be missing or left over.
        classes: their names; by default numbers.
        **fields: of the network, beyond those that the weights themselves decide.

    Returns:
        The network with its variables and preprocessing, and the report.

    Raises:
        ConfigError, DataError: see `create_model`, `fetch_pretrained`, `read_weights`,
            `from_theirs`.
    """
    try:
        re.compile(exclude)
    except re.error as error:
        raise ConfigError(f"exclude={exclude!r}: {error}. Fix: a regular expression") from error
    tag = str(path) if is_tag(path) else ""
    file = fetch_pretrained(model, tag) if tag else path
    theirs, about = read_weights(file), read_about(file)
    name = _name(path, model, about)
    fields = {**(about.options if about else {}), **fields}
    blank = create_model(name, num_classes or 10, **fields)
    chosen = dialects_lib.dialect(blank, dialect) if dialect else detect(blank, theirs)
    if not about:  # which says all fields that are not the usual ones
        fields = {**_fields(blank, chosen, theirs), **fields}
    head = theirs.get(str(key_of(chosen, "head", "kernel")))
    if not num_classes and about:
        num_classes = len(about.classes)
    elif not num_classes and head is not None and head.ndim > 1:
        num_classes = head.shape[-1 if chosen.as_ours else 0]
    if not num_classes:
        raise DataError(f"{path} has no classifier. Fix: num_classes, and exclude=^head/")
    if not classes and about and len(about.classes) == num_classes:
        classes = about.classes
    network = create_model(name, num_classes, **fields)
    if about:
        preprocess = about.preprocess
    elif chosen.name == "ours":
        raise DataError(
            f"{path} does not say what its images went through. Fix: a .safetensors file of "
            "export_weights, or the run itself"
        )
    else:
        preprocess = preprocess_of(network, chosen, theirs, tag)

    def init(key: jax.Array) -> Any:
        return dict(network.init(key, jnp.zeros((1, *preprocess.image_shape))))

    if exclude or partial:
        variables = jax.device_get(jax.jit(init)(jax.random.key(0)))
    else:
        variables = jax.tree.map(_unfilled, jax.eval_shape(init, jax.random.key(0)))
    filled, report = from_theirs(
        network, variables, theirs, chosen, exclude=exclude, partial=partial
    )
    if chosen.name == "keras":
        filled = _reversed_channels(filled)
    run = LoadedRun(
        model=network,
        variables={"params": filled["params"], "batch_stats": filled.get("batch_stats", {})},
        classes=tuple(classes) or tuple(map(str, range(num_classes))),
        preprocess=preprocess,
        step=0,
        name=name,
    )
    if len(run.classes) != num_classes:
        raise ConfigError(f"{len(run.classes)} class names for {num_classes} classes. Fix: classes")
    return run, report


def _name(path: str | Path, model: str, about: About | None) -> str:
    """The name of the network, of the caller or of the file."""
    told = about.model if about else ""
    if not model and not told:
        raise ConfigError(
            f"{path} does not say which network it is for. Fix: --model=resnet50, say; see "
            "classic-cnns models"
        )
    name = resolve_name(model or told)
    if told and resolve_name(told) != name:
        raise ConfigError(f"{path} is of {told}, not of {name}. Fix: {told} as the model")
    return name


def _about(run: LoadedRun) -> About:
    """What a run or a file says of its network."""
    usual = create_model(run.name)
    options = {
        key: getattr(run.model, key)
        for key in run.model.__dataclass_fields__
        if key not in NO_OPTIONS and getattr(run.model, key) != getattr(usual, key)
    }
    return About(resolve_name(run.name), options, run.classes, run.preprocess)


def save_bundle(run: LoadedRun, directory: str | Path, source: str = "") -> Path:
    """Writes a network with its weights as a run directory, which every command and `load` read.

    Args:
        run: see `load_weights`.
        directory: a new or an empty one.
        source: where the weights are from, for people.

    Raises:
        WorkdirError: the directory has something in it, or cannot be written.
    """
    directory = Path(directory).expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise WorkdirError(f"{directory} is not empty. Fix: a new --out")
    with rundir.lock(directory), Checkpoints(directory / "checkpoints") as checkpoints:
        best = {"step": 0, "eval_accuracy": -1.0}
        checkpoints.save(0, {"state": dict(run.variables)}, {"best": best}, keep=set())
        about = _about(run)
        info = {
            "model": about.model,
            "classes": list(about.classes),
            "preprocessing": dataclasses.asdict(about.preprocess),
            "source": source,
            "created": time.strftime("%F %T %z"),
        }
        rundir.write_json(directory / "run.json", info)
        model = {"name": about.model, "dtype": "auto", "options": about.options}
        rundir.write_json(directory / "config.json", {"model": model})
    return directory


def export_weights(run: LoadedRun, dialect: str, path: str | Path) -> Path:
    """Writes weights in another library's names and layouts.

    Args:
        run: see `classic_cnns.load`.
        dialect: whose names, or "ours" for our own paths.
        path: ends in .safetensors, .npz, or for Keras in .weights.h5 or .h5, which its
            `model.load_weights` takes; replaced in one step.

    Raises:
        ConfigError: unknown dialect or ending, or another library's network computes something
            else with the same weights.
        DataError: layers that it has no name for.
    """
    path = Path(path)
    if not path.name.endswith((".npz", ".safetensors", ".h5")):
        raise ConfigError(f"{path}: unknown ending. Fix: .safetensors, .npz, or .h5 for Keras")
    if path.suffix == ".h5" and dialect != "keras":
        raise ConfigError(f"{path}: only Keras has .h5 files. Fix: --to=keras, or .safetensors")
    if dialect == "ours":
        arrays = {"/".join(k): np.asarray(v) for k, v in flatten_dict(run.variables).items()}
    else:
        chosen = dialects_lib.dialect(run.model, dialect)
        _check_same(run, chosen)
        if dialect == "keras":
            arrays = with_biases(to_theirs(_reversed_channels(run.variables), chosen))
        else:
            arrays = to_theirs(run.variables, chosen)
    if path.suffix == ".h5":
        write_h5(path, arrays)
    elif path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        rundir.replace_file(path, buffer.getvalue())
    else:
        write_safetensors(path, arrays, _about(run))
    return path


def _check_same(run: LoadedRun, dialect: dialects_lib.Dialect) -> None:
    """Refuses what would load there without a word and compute something else, or not load."""
    model = run.model
    if hasattr(model, "bn_epsilon"):
        default = type(model).__dataclass_fields__["bn_epsilon"].default
        epsilon = dialect.fields.get("bn_epsilon", default)
        if abs(model.bn_epsilon / epsilon - 1) > 0.01:  # Keras has 1.001e-5
            raise ConfigError(
                f"{dialect.name} normalises with epsilon {epsilon:g}, this network with "
                f"{model.bn_epsilon:g}. Fix: --to=safetensors, which is exact"
            )
    shape = (1, *run.preprocess.image_shape)
    there = jax.eval_shape(model.clone(**dialect.fields).init, jax.random.key(0), jnp.zeros(shape))
    ours, theirs = manifest.shapes(dict(run.variables)), manifest.shapes(dict(there))
    other = [
        f"{name.split('/', 1)[1]}: {ours[name]}, {theirs.get(name, 'absent')} there"
        for name in ours
        if ours[name] != theirs.get(name)
    ]
    if other:
        raise ConfigError(
            f"{dialect.name} has another network in {len(other)} arrays: "
            f"{'; '.join(other[:5])}. Fix: --to=safetensors, which is exact"
        )
    if not isinstance(model, ResNet) or model.block != "bottleneck":
        return
    theirs = dialect.fields.get("bottleneck_stride", "3x3")
    if model.bottleneck_stride != theirs:
        raise ConfigError(
            f"{dialect.name} has the stride of a bottleneck at its {theirs} convolution, this "
            f"network at its {model.bottleneck_stride}. Fix: --to=safetensors, which is exact"
        )


def _unfilled(leaf: Any) -> np.ndarray:
    """Memory that is not touched until it is filled."""
    return np.empty(leaf.shape, leaf.dtype)


def _reversed_channels(variables: Any) -> Any:
    """The same variables with RGB and BGR swapped in the kernel that sees the image."""
    params = dict(variables["params"])
    layer = next(name for name in FIRST_LAYERS if name in params)
    params[layer] = {**params[layer], "kernel": params[layer]["kernel"][:, :, ::-1]}
    return {**variables, "params": params}


def _fields(
    model: nn.Module, dialect: dialects_lib.Dialect, theirs: dict[str, Any]
) -> dict[str, Any]:
    """Fields that the weights decide: the dialect's, the stem, auxiliary heads."""
    fields = dict(dialect.fields)
    if isinstance(model, ResNet):
        kernel = theirs.get(str(key_of(dialect, "conv_init", "kernel")))
        if kernel is not None and kernel.ndim == 4:
            side = kernel.shape[0] if dialect.name == "keras" else kernel.shape[2]
            fields["stem"] = "imagenet" if side == 7 else "cifar"
    if isinstance(model, GoogLeNet):
        fields["aux"] = any(key.startswith("aux") for key in theirs)
    return fields
