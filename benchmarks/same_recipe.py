"""The same training here and in PyTorch: what does each learn?

    python benchmarks/same_recipe.py configs/resnet18.py:images_set --config.data.dir=DIR …

Both start with the same weights, and see the same images, augmented once for both, in the same
order, with the same learning rate at every step; PyTorch has torchvision's network, its own
cross-entropy with label smoothing and its own SGD, float32 both. The first loss agrees to six
digits. After it they drift apart, as two float32 trainings do: rounding puts some unit on the other
side of a ReLU. What is learned is compared by accuracy, on the validation split after each epoch
and on the test split at the end. Needs the extra `bench`; colour images, a network that torchvision
has, without dropout or auxiliary heads, and plain SGD. Writes nothing.
"""

import argparse

import jax
import numpy as np
import torch
from torch_peers import torch_model

from classic_cnns import config as config_lib
from classic_cnns.commandline import read_config
from classic_cnns.data.augment import normalize
from classic_cnns.dispatch import fetch
from classic_cnns.durations import next_event
from classic_cnns.errors import ClassicCNNsError
from classic_cnns.evaluate import create_evaluate
from classic_cnns.steps import augmented
from classic_cnns.task import task_from
from classic_cnns.weights.convert import to_theirs
from classic_cnns.weights.dialects import dialect


class Peer:
    """torchvision's network with the weights of `variables`, and its training."""

    def __init__(self, task, variables):
        config, (height, _, _) = task.config, task.dataset.image_shape
        self.model = torch_model(config.model.name, task.dataset.num_classes, height)
        weights = to_theirs(variables, dialect(task.model, "torchvision"))
        tensors = {k: torch.from_numpy(np.array(v)) for k, v in weights.items()}
        missing = self.model.load_state_dict(tensors, strict=False)
        assert all("num_batches_tracked" in k for k in missing.missing_keys), missing
        assert not missing.unexpected_keys, missing
        self.model.to(memory_format=torch.channels_last)
        groups = [
            {"params": [p for p in self.model.parameters() if (p.ndim > 1) == kernels]}
            for kernels in (True, False)
        ]
        groups[0]["weight_decay"] = config.optimizer.weight_decay
        settings = {"momentum": config.optimizer.momentum, "nesterov": config.optimizer.nesterov}
        self.optimizer = torch.optim.SGD(groups, lr=0.0, **settings)
        self.smoothing = config.label_smoothing

    def step(self, images, labels, rate):
        """Mean loss of the batch, before the update."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        out = self.model(nchw(images))
        labels = torch.from_numpy(np.array(labels)).long()
        loss = torch.nn.functional.cross_entropy(out, labels, label_smoothing=self.smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def accuracy(self, loader, normalized):
        """Share of a split that is right."""
        self.model.eval()
        right = count = 0
        for item in loader.evaluation():
            batch = fetch(loader.data, item)
            with torch.no_grad():
                found = self.model(nchw(normalized(batch["image"]))).argmax(1).numpy()
            mask = np.asarray(batch["mask"]) > 0
            right += (found == np.asarray(batch["label"]))[mask].sum()
            count += mask.sum()
        return right / count


def nchw(images):
    """(N, H, W, C) to PyTorch's (N, C, H, W), which lies in memory as it did."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="FILE.py:DATASET; --config.FIELD=VALUE may follow")
    args, overrides = parser.parse_known_args()
    try:
        config = read_config(args.config, overrides)
        if config.optimizer.name != "sgd" or config.optimizer.rules:
            parser.error("only optimizer.name=sgd without rules has its like here")
        config.model.dtype = "float32"
        task = task_from(config)
        tx, schedule = config_lib.optimizer_from(config, task.spans)
    except ClassicCNNsError as error:
        parser.error(str(error))
    mean, std = task.dataset.preprocess.mean, task.dataset.preprocess.std
    state = task.state(tx)
    peer = Peer(task, jax.device_get(state.variables))
    loaders = config_lib.loaders_from(config, task.dataset, task.mesh)
    evaluate = create_evaluate(task.model, mean=mean, std=std)
    normalized = jax.jit(lambda images: normalize(images, mean, std))
    drawn = jax.jit(lambda batch, i: augmented(batch, task.augment, config.seed, i))
    step = jax.jit(task.step(tx))
    losses, total, every = [], task.spans.total, task.spans.eval_every
    for i in range(1, total + 1):
        batch = fetch(loaders["train"].data, loaders["train"].train(i - 1))
        seen = drawn(batch, i - 1)
        theirs = peer.step(normalized(seen["image"]), batch["label"], float(schedule(i - 1)))
        state, out = step(state, batch)
        losses.append((float(out["loss"].mean()), theirs))
        if i in (1, 2, 3, 10, 30, 100):
            ours, theirs = losses[-1]
            print(f"step {i:4}  loss {ours:.6f} here, {theirs:.6f} in PyTorch", flush=True)
        split = "test" if i == total and "test" in loaders else "val"
        if i in (total, next_event(i - 1, every)):
            ours = evaluate(state, loaders[split])["accuracy"]
            theirs = peer.accuracy(loaders[split], normalized)
            mean_losses = np.mean(losses[-int(every) :], axis=0)
            print(
                f"step {i:4}  {split} accuracy {ours:.4f} here, {theirs:.4f} in PyTorch; mean "
                f"loss {mean_losses[0]:.4f}, {mean_losses[1]:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
