"""Logits of our networks against torchvision's and others', the same seeded weights in both.

    python benchmarks/parity.py [--write] [--side 224] [--dtype float64]

Needs the extra `bench`. Prints the largest difference relative to the largest logit, in inference
and in training (batch statistics; auxiliary logits too), and for three networks that of the
gradients. In float64 nothing but the mathematics is left.
Keras gets the weights in both of its HDF5 formats, timm and transformers as state dicts, all as
we export them; what they then save themselves comes back through our reader, to the bit.
--write keeps their logits in tests/goldens/logits.json, which the tests compare with.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import numpy as np
import torch
import torchvision

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from seeded import CASES, OTHERS, others_images, seeded_images, seeded_variables  # noqa: E402

from classic_cnns import create_model  # noqa: E402
from classic_cnns.weights.convert import from_theirs, to_theirs  # noqa: E402
from classic_cnns.weights.dialects import dialect  # noqa: E402
from classic_cnns.weights.files import read_weights  # noqa: E402
from classic_cnns.weights.hdf5 import with_biases, write_h5  # noqa: E402

GRADIENTS = ("vgg11_bn", "googlenet", "resnet50")


def torch_model(name, weights, dtype):
    settings = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, num_classes=10, **settings)
    tensors = {k: torch.from_numpy(v) for k, v in weights.items()}
    missing = model.load_state_dict(tensors, strict=False)
    assert all("num_batches_tracked" in key for key in missing.missing_keys), missing
    assert not missing.unexpected_keys
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(torch.float64 if dtype == np.float64 else torch.float32)


def difference(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def compare(name, model, variables, images, train):
    """Relative differences of all logits, and torchvision's main logits."""
    theirs = to_theirs(variables, dialect(model, "torchvision"))
    peer = torch_model(name, theirs, images.dtype).train(train)
    with torch.no_grad():
        out = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    outputs = (
        [out] if isinstance(out, torch.Tensor) else [out.logits, out.aux_logits1, out.aux_logits2]
    )
    expected = [o.numpy() for o in outputs if o is not None]

    @jax.jit
    def run(variables, images):
        mutable = ["batch_stats", "aux_logits"]
        rngs = {"dropout": jax.random.key(0)}
        logits, kept = model.apply(variables, images, train=train, mutable=mutable, rngs=rngs)
        return [logits, *jax.tree.leaves(kept.get("aux_logits", {}))]

    ours = run(variables, images)
    return [difference(a, b) for a, b in zip(ours, expected, strict=True)], expected[0]


def compare_gradients(name, model, variables, images):
    chosen = dialect(model, "torchvision")
    peer = torch_model(name, to_theirs(variables, chosen), images.dtype).eval()
    peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).square().sum().backward()
    theirs = {k: p.grad.float().numpy() for k, p in peer.named_parameters() if p.grad is not None}

    def loss(params):
        logits = model.apply({**variables, "params": params}, images, train=False)
        return (logits**2).sum()

    grads = jax.device_get(jax.jit(jax.grad(loss))(variables["params"]))
    grads = {k: v for k, v in grads.items() if not k.startswith("aux")}
    filled, _ = from_theirs(model, {"params": grads}, theirs, chosen)
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(filled["params"]), strict=True)
    return max(difference(a, b) for a, b in pairs)


def keras_logits(network, weights, batches, folder):
    """Logits of Keras' network, and the file that it then saved."""
    import keras

    make = getattr(keras.applications, network.replace("vgg", "VGG").replace("resnet", "ResNet"))
    out = []
    for images in batches:
        logits = []
        for ending in (".weights.h5", ".h5"):
            path = folder / f"ours{ending}"
            write_h5(path, with_biases(weights), keras.__version__)
            peer = make(weights=None, input_shape=images.shape[1:], classes=10)
            peer.layers[-1].activation = None
            peer.load_weights(path)
            logits.append(np.asarray(peer(images, training=False)))
        np.testing.assert_array_equal(*logits)
        out.append(logits[0])
    peer.save_weights(folder / "theirs.weights.h5")
    return out, folder / "theirs.weights.h5"


def timm_logits(network, weights, batches, folder):
    """The same for timm."""
    import timm

    peer = timm.create_model(network, pretrained=False, num_classes=10)
    return state_dict_logits(peer, weights, batches, folder)


def transformers_logits(network, weights, batches, folder):
    """The same for transformers."""
    import transformers

    assert network == "resnet50"  # which its default configuration is
    config = transformers.ResNetConfig(num_labels=10)
    peer = transformers.ResNetForImageClassification(config)
    return state_dict_logits(peer, weights, batches, folder)


def state_dict_logits(peer, weights, batches, folder):
    counters = {k: v for k, v in peer.state_dict().items() if k.endswith("num_batches_tracked")}
    peer.load_state_dict(counters | {k: torch.from_numpy(v) for k, v in weights.items()})
    peer.eval()
    out = []
    with torch.no_grad():
        for images in batches:
            logits = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
            out.append(getattr(logits, "logits", logits).numpy())
    torch.save(peer.state_dict(), folder / "theirs.pth")
    return out, folder / "theirs.pth"


def compare_other(name):
    """Prints the differences to another library's network, and returns its logits by golden."""
    library, network = name.split("/")
    _, fields, sides = OTHERS[name]
    model = create_model(network, 10, **fields)
    variables = seeded_variables(model, 224)
    chosen = dialect(model, library)
    weights = to_theirs(variables, chosen)
    batches = [others_images(name, side) for side in sides]
    with tempfile.TemporaryDirectory() as folder:
        run = {"keras": keras_logits, "timm": timm_logits, "transformers": transformers_logits}
        expected, saved = run[library](network, weights, batches, Path(folder))
        back, _ = from_theirs(model, variables, read_weights(saved), chosen)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    for side, images, logits in zip(sides, batches, expected, strict=True):
        error = difference(jax.jit(model.apply)(variables, images), logits)
        print(f"{name} {side} px eval {error:.1e}, round trip equal to the bit", flush=True)
    return {f"{name}/{s}": e.tolist() for s, e in zip(sides, expected, strict=True)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--side", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--model", nargs="+", default=[*CASES, *OTHERS])
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", args.dtype == "float64")
    goldens = {}
    for name in args.model:
        if name in OTHERS:
            goldens |= compare_other(name)
            continue
        network, fields, sides = CASES[name]
        model = create_model(network, 10, dtype=args.dtype, **fields)
        variables = seeded_variables(model, 224)
        variables = jax.tree.map(lambda v: v.astype(args.dtype), variables)
        for side in (args.side,) if args.side else sides:
            images = seeded_images(side).astype(args.dtype)
            for train in (False, True):
                relative, logits = compare(name, model, variables, images, train)
                mode = "train" if train else "eval"
                goldens[f"{name}/{side}/{mode}"] = logits.tolist()
                print(
                    f"{name:10} {side:4} px {mode:6}", *(f"{r:.1e}" for r in relative), flush=True
                )
        if name in GRADIENTS:
            worst = compare_gradients(name, model, variables, images)
            print(f"{name:10} gradients, worst tensor {worst:.1e}", flush=True)
    if args.write:
        path = ROOT / "tests" / "goldens" / "logits.json"
        source = f"torchvision {torchvision.__version__}, torch {torch.__version__}"
        kept = json.loads(path.read_text())["logits"] if path.exists() else {}
        path.write_text(json.dumps({"source": source, "logits": kept | goldens}) + "\n")


if __name__ == "__main__":
    main()
