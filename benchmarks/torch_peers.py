"""The same networks in PyTorch, from torchvision's where it has them."""

import torch
import torchvision
from torch import nn
from torchvision.models.googlenet import BasicConv2d
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from classic_cnns.models.alexnet import TABLES
from classic_cnns.models.resnet import TABLE


def torch_model(name, classes, side):
    """The peer of a network at this side in pixels; None for those that nobody has in PyTorch."""
    if name == "lenet5":
        return lenet5(classes) if side == 32 else None
    if name in ("lenet5_1998", "googlenet2014", "airbench94"):
        return None
    if name.startswith("alexnet"):
        variant = "column" if name == "alexnet" else "towers"
        return alexnet("cifar" if side < 63 else variant, classes)
    if name.endswith("_cifar"):
        return cifar_resnet((int(name[len("resnet") : -len("_cifar")]) - 2) // 6, classes)
    if name.startswith("vgg"):
        model = getattr(torchvision.models, name)(num_classes=classes, init_weights=False)
        if side < 64:
            model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, classes)
        return model
    if name == "googlenet":
        model = torchvision.models.googlenet(num_classes=classes, init_weights=False)
        if side < 64:
            model.conv1 = BasicConv2d(3, 192, kernel_size=3, padding=1)
            for part in ("maxpool1", "conv2", "conv3", "maxpool2"):
                setattr(model, part, nn.Identity())
        return model
    block, sizes = TABLE[name]
    model = ResNet(BasicBlock if block == "basic" else Bottleneck, list(sizes), classes)
    if side < 64:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def lenet5(classes):
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)),
    )


def alexnet(variant, classes):
    layers, inputs = [], 3
    for i, (outputs, kernel, stride, pad, groups, pooled) in enumerate(TABLES[variant]):
        if pad[0] != pad[1]:
            layers.append(nn.ZeroPad2d((*pad, *pad)))
        pad = pad[0] if pad[0] == pad[1] else 0
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups), nn.ReLU()]
        if variant == "towers" and i < 2:
            layers.append(nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0))
        if pooled:
            layers.append(nn.MaxPool2d(2 if variant == "cifar" else 3, 2))
        inputs = outputs
    if variant == "cifar":
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes)
        )
    return nn.Sequential(
        *(*layers, nn.AdaptiveAvgPool2d(6), nn.Flatten()),
        *(nn.Dropout(), nn.Linear(256 * 36, 4096), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, classes)),
    )


class Subsample(nn.Module):
    """Every second pixel, and channels of zeros on both sides (He et al., option A)."""

    def forward(self, x):
        extra = x.shape[1] // 2
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))


def cifar_resnet(blocks, classes):
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for features in (16, 32, 64):
        for j in range(blocks):
            if j == 0 and features > 16:
                layers.append(BasicBlock(features // 2, features, 2, Subsample()))
            else:
                layers.append(BasicBlock(features, features))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def torch_runner(model, images, labels, *, compiled, dtype, device):
    """A function of the number of steps: SGD with Nesterov momentum, channels_last.

    Args:
        model: a module; it is left where it is.
        images: (N, H, W, C) float32 NumPy array.
        labels: (N,) integers.
        compiled: through torch.compile.
        dtype: "float32", or "bfloat16" by autocast.
        device: "cpu" or "cuda".
    """
    torch.backends.cudnn.benchmark = True
    if compiled:  # it recompiles a forward method a few times only, then falls back to eager
        torch._dynamo.reset()
    model = model.to(device, memory_format=torch.channels_last)
    images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(labels).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
    forward = torch.compile(model) if compiled else model
    cross_entropy = nn.functional.cross_entropy

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                out = forward(images)
                main, *aux = [out] if isinstance(out, torch.Tensor) else out
                loss = cross_entropy(main, labels)
                loss = loss + sum(0.3 * cross_entropy(a, labels) for a in aux)
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run
