"""torchvision's published weights: which there are, and how to get them."""

from __future__ import annotations

from pathlib import Path

from classic_cnns.data.download import Download, fetch
from classic_cnns.data.sources import default_dir
from classic_cnns.errors import ConfigError, nearest
from classic_cnns.models import resolve_name

URL = "https://download.pytorch.org/models/"
V1, V2 = "torchvision:IMAGENET1K_V1", "torchvision:IMAGENET1K_V2"

# Tag → network → file; the last eight digits are the first of the file's SHA-256.
FILES = {
    V1: {
        "alexnet": "alexnet-owt-7be5be79.pth",
        "googlenet": "googlenet-1378be20.pth",
        "resnet18": "resnet18-f37072fd.pth",
        "resnet34": "resnet34-b627a593.pth",
        "resnet50": "resnet50-0676ba61.pth",
        "resnet101": "resnet101-63fe2227.pth",
        "resnet152": "resnet152-394f9c45.pth",
        "vgg11": "vgg11-8a719046.pth",
        "vgg13": "vgg13-19584684.pth",
        "vgg16": "vgg16-397923af.pth",
        "vgg19": "vgg19-dcbb9e9d.pth",
        "vgg11_bn": "vgg11_bn-6002323d.pth",
        "vgg13_bn": "vgg13_bn-abd245e5.pth",
        "vgg16_bn": "vgg16_bn-6c64b313.pth",
        "vgg19_bn": "vgg19_bn-c79401a0.pth",
    },
    V2: {
        "resnet50": "resnet50-11ad3fa6.pth",
        "resnet101": "resnet101-cd907fc2.pth",
        "resnet152": "resnet152-f82ba261.pth",
    },
}


def is_tag(source: str | Path) -> bool:
    """Whether this names published weights, and not a path."""
    return str(source).startswith("torchvision:")


def fetch_pretrained(model: str, tag: str, cache_dir: str | Path = "") -> Path:
    """The file of published weights: from the cache if it is there, else downloaded.

    Args:
        model: name of the network.
        tag: "torchvision:IMAGENET1K_V1" or "torchvision:IMAGENET1K_V2".
        cache_dir: where files are kept; "" = classic_cnns/weights in the user's cache directory.

    Raises:
        ConfigError: unknown tag, or no such weights of this network.
        DataError: see `fetch`.
    """
    name = resolve_name(model)
    if tag not in FILES:
        raise ConfigError(f'unknown weights "{tag}". Fix: {nearest(tag, FILES)}')
    if name not in FILES[tag]:
        raise ConfigError(f"{tag} has no {name}. Fix: one of {', '.join(FILES[tag])}")
    file = FILES[tag][name]
    digits = Path(file).stem.rsplit("-", 1)[1]
    directory = Path(cache_dir).expanduser() if cache_dir else default_dir("weights")
    return fetch(f"{tag} of {name}", Download(URL + file, digits), directory)
