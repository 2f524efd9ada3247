"""The official archives of CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST, read without TensorFlow.

A file is looked for in the data directory as it is in the archive, then gzipped, then inside the
archive; what is still missing is downloaded, checked and moved into place in one step. Every byte
that is returned has been compared with a known size and, where the authors' files were at hand,
SHA-256.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np

from classic_cnns.data.download import Download, fetch
from classic_cnns.errors import DataError


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of an archive: its name, size in bytes and SHA-256 ("" when only the archive's is
    known).
    """

    name: str
    size: int
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Archive:
    """A dataset: members, the folder they have inside a tar ("" = each gzipped by
    itself), and where they come from."""

    members: tuple[Member, ...]
    downloads: tuple[Download, ...]
    folder: str = ""


_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
_MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"


def _idx(url: str, *hashes: str) -> Archive:
    """MNIST's four files; for each the SHA-256 of its content and of its gzip file."""
    sizes = {
        "train-images-idx3-ubyte": 47_040_016,
        "train-labels-idx1-ubyte": 60_008,
        "t10k-images-idx3-ubyte": 7_840_016,
        "t10k-labels-idx1-ubyte": 10_008,
    }
    return Archive(
        members=tuple(
            Member(n, size, sha) for (n, size), sha in zip(sizes.items(), hashes[::2], strict=True)
        ),
        downloads=tuple(
            Download(f"{url}{n}.gz", sha) for n, sha in zip(sizes, hashes[1::2], strict=True)
        ),
    )


ARCHIVES = {
    "cifar10": Archive(
        folder="cifar-10-batches-bin",
        members=tuple(
            Member(f"{name}.bin", 30_730_000, sha)
            for name, sha in {
                "data_batch_1": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
                "data_batch_2": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
                "data_batch_3": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
                "data_batch_4": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
                "data_batch_5": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
                "test_batch": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
            }.items()
        ),
        downloads=(
            Download(
                _CIFAR_URL + "cifar-10-binary.tar.gz",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
    ),
    "cifar100": Archive(
        folder="cifar-100-binary",
        members=(Member("train.bin", 153_700_000), Member("test.bin", 30_740_000)),
        downloads=(
            Download(
                _CIFAR_URL + "cifar-100-binary.tar.gz",
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
    ),
    "mnist": _idx(
        _MNIST_URL,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "fashion_mnist": _idx(
        _FASHION_URL,
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}


def read_members(name: str, archive: Archive, directory: Path) -> dict[str, bytes]:
    """All members of an archive, verified; downloads what the directory does not have.

    Args:
        name: of the dataset, for messages.
        archive: what to read.
        directory: where files are looked for and kept. Existing files are never changed.

    Raises:
        DataError: a file is damaged, or missing and not to be had from the network.
    """
    found = {m.name: _find(m, archive.folder, directory) for m in archive.members}
    if not all(found.values()):
        for download in archive.downloads:
            missing = [m for m in archive.members if not found[m.name]]
            if not archive.folder and not any(download.filename == m.name + ".gz" for m in missing):
                continue
            path = fetch(name, download, directory)
            if archive.folder:
                _extract(name, path, archive, directory)
        found = {m.name: _find(m, archive.folder, directory) for m in archive.members}
    problems, out = [], {}
    for member in archive.members:
        file = found[member.name]
        if file is None:
            problems.append(f"{member.name}: not in {directory}")
            continue
        try:
            data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            problems.append(f"{file}: {error}")
            continue
        if len(data) != member.size:
            problems.append(f"{file}: {len(data):,} bytes, {member.size:,} expected")
        elif member.sha256 and hashlib.sha256(data).hexdigest() != member.sha256:
            problems.append(f"{file}: SHA-256 differs from the original's")
        out[member.name] = data
    if problems:
        raise DataError(
            f"{name}: damaged files: {'; '.join(problems)}. Fix: delete them, or set data.dir "
            "elsewhere"
        )
    return out


def _find(member: Member, folder: str, directory: Path) -> Path | None:
    for name in (member.name, member.name + ".gz"):
        for path in (directory / name, directory / folder / name):
            if path.is_file():
                return path
    return None


def _extract(name: str, path: Path, archive: Archive, directory: Path) -> None:
    """Writes the wanted members of a tar; names inside the tar never become paths."""
    wanted = {f"{archive.folder}/{m.name}": m for m in archive.members}
    target = directory / archive.folder
    try:
        target.mkdir(exist_ok=True)
        with tarfile.open(path) as tar:
            for info in tar:
                member = wanted.get(info.name.removeprefix("./"))
                if member is None or not info.isfile() or info.size != member.size:
                    continue
                source = tar.extractfile(info)
                assert source is not None
                temporary = target / f".{member.name}.{os.getpid()}"
                temporary.write_bytes(source.read())
                os.replace(temporary, target / member.name)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: {path}: {error}. Fix: delete it") from error


def parse_cifar(blocks: list[bytes], label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of `label_bytes` labels (the last one counts) and 3072 bytes of planar RGB.

    Returns:
        Images (N, 32, 32, 3) uint8 and labels (N,) int32.
    """
    records = np.frombuffer(b"".join(blocks), np.uint8).reshape(-1, label_bytes + 3072)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, label_bytes - 1].astype(np.int32)


def parse_idx(images: bytes, labels: bytes) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's idx files: images (N, 28, 28, 1) uint8 and labels (N,) int32."""
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1)
    return pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int32)
