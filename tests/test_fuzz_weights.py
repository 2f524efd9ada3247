"""Mutated weight files of every format: an error of one line or arrays, never anything else.

    python tests/test_fuzz_weights.py [SECONDS] [SEED]

Each batch of files is read in a child whose memory and time are limited, so that a crash of a
library is found too. Prints how many files were read and what was found; files that show something
are kept in fuzz-finds/.
"""

import io
import json
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np
import pytest
from torch_files import Tensor, program, write_legacy, write_zip

from classic_cnns.errors import DataError
from classic_cnns.weights.files import read_weights
from classic_cnns.weights.program import MAX_STEPS, run

REAL = Path(__file__).parents[2] / "shared" / "data" / "weights"
ROOM = 400 << 20  # bytes that a child may grow by: steps and values of a program take some
SECONDS = 10  # of processor time for a file

# What damage alone rarely makes.
WORDS = (
    *(b"\xff" * 4, b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 3, b"\x01\x00\x00\x00"),
    *(b"h\x00", b"q\x00", b"q\x01h\x01", b"\x86", b"]", b"}", b"(", b"t", b"s", b"u", b"a", b"e"),
    *(b"R", b"Q", b"b", b".", b"N", b"K\x01", b"\x8a\x08" + b"\x7f" * 8, b"\x94", b"\x93"),
    *(b"cposix\nsystem\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n"),
    *(b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x89HDF", b"TREE", b"SNOD", b"OHDR", b"HEAP"),
    *(b'"shape":[', b'"data_offsets":[', b"9999999999", b"-1", b"[[[[", b"|O", b"<f8", b"{"),
)


def seeds(folder):
    """Small good files of every format, and the real ones if they are here."""
    rng = np.random.default_rng(0)
    arrays = {f"layer{i}.conv.weight": rng.random((4, 3, 3, 3), np.float32) for i in range(3)}
    value = {"state_dict": OrderedDict(), "epoch": 3, "names": ["a", ("b", 2.5, None, True)]}
    for i, (key, array) in enumerate(arrays.items()):
        value["state_dict"][key] = Tensor(str(i), array.size, array.shape)
    storages = {str(i): array.tobytes() for i, array in enumerate(arrays.values())}
    write_zip(folder / "zip.pt", value, storages)
    write_legacy(folder / "legacy.pt", value, storages)
    write_zip(folder / "protocol4.pt", program(value, 4), storages)
    np.savez(folder / "stored.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **arrays)
    from safetensors.numpy import save_file

    save_file(arrays, folder / "x.safetensors")
    for name, library in (("old", "earliest"), ("new", "latest")):
        with h5py.File(folder / f"{name}.weights.h5", "w", libver=library) as file:
            for i, array in enumerate(arrays.values()):
                group = file.create_group(f"layers/conv{i}/vars")
                group.attrs["name"] = f"conv{i}"
                group["0"], group["1"] = array.transpose(2, 3, 1, 0), array[:, 0, 0, 0]
    with h5py.File(folder / "keras2.h5", "w") as file:
        for i, array in enumerate(arrays.values()):
            file[f"model_weights/conv{i}/conv{i}/kernel:0"] = array
    import zipfile

    with zipfile.ZipFile(folder / "x.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.write(folder / "new.weights.h5", "model.weights.h5")
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return files | {path.name: path.read_bytes() for path in sorted(REAL.glob("*.th"))[:1]}


def mutate(data, rng):
    """1 to 8 changes, most of them where the structure is: at the ends."""
    data = bytearray(data)

    def place():
        near = min(len(data), 3000)
        return rng.choice(
            (rng.randrange(len(data) + 1), rng.randrange(near + 1), len(data) - rng.randrange(near))
        )

    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        at = min(max(place(), 0), max(len(data) - 1, 0))
        match rng.randrange(9):
            case 0 | 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b"x"
            case 3:
                word = rng.choice(WORDS)
                data[at : at + len(word)] = word
            case 4:
                data[at:at] = rng.choice(WORDS)
            case 5:
                del data[at : at + rng.choice((1, 2, 8, 100))]
            case 6:
                begin = max(place(), 0)
                part = data[begin : begin + rng.choice((4, 30, 300))]
                data[at : at + rng.choice((0, len(part)))] = part
            case 7:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice((0, 1, 255, rng.getrandbits(8 * size), (1 << 8 * size) - 1))
                data[at : at + size] = (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            case 8:
                del data[rng.choice((at, len(data) - rng.randrange(1, 50))) :]
        if not data:
            data += b"\x80"
    return bytes(data)


def check(path, data):
    """Reads one file; an AssertionError or whatever the reader lets through is a find."""
    path.write_bytes(data)
    try:
        for key, array in read_weights(path).items():
            assert key.isprintable()
            assert array.size * array.itemsize <= 20 * len(data)
            float(array.sum(dtype=np.float64))
    except DataError as error:
        if not str(error).isprintable() or len(str(error)) > 1000:
            raise AssertionError(f"the message {error}") from error
    try:  # the interpreter alone, where a zip file would have been refused
        start = data.find(b"\x80\x02")
        run(io.BytesIO(data[max(start, 0) :][: 2 * MAX_STEPS]))
    except ValueError:
        pass


def batch(files, seed, count, folder):
    """In a child: reads `count` mutants; the number it was at is in the file `at`."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))
    cases = open(folder / "at", "w")  # noqa: SIM115
    for i in range(count):
        spent = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS + 1))
        cases.seek(0)
        cases.write(f"{i:9}")
        cases.flush()
        rng = random.Random(f"{seed}/{i}")
        name = rng.choice(sorted(files))
        check(folder / "case", mutate(files[name], rng))


def fuzz(seconds, seed, keep=None, count=500):
    """Runs batches for a time; returns how many files were read and what was found."""
    finds, done, end = [], 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "seeds").mkdir()
        files = seeds(folder / "seeds")
        number = 0
        while time.monotonic() < end:
            child = os.fork()
            if not child:
                code = 1
                try:
                    warnings.simplefilter("ignore")
                    batch(files, f"{seed}/{number}", count, folder)
                    code = 0
                except BaseException as error:
                    (folder / "why").write_text(f"{type(error).__name__}: {str(error)!a}")
                finally:
                    os._exit(code)
            status = os.waitpid(child, 0)[1]
            at = int((folder / "at").read_text())
            done += at + 1
            if status:
                why = (folder / "why").read_text() if status == 256 else f"signal {status & 127}"
                finds.append({"seed": f"{seed}/{number}/{at}", "why": why})
                print(json.dumps(finds[-1]), flush=True)
                if keep:
                    keep.mkdir(exist_ok=True)
                    (keep / f"{seed}-{number}-{at}").write_bytes((folder / "case").read_bytes())
            number += 1
    return done, finds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads
def test_mutated_files():
    done, finds = fuzz(60, seed=time.time_ns())
    assert not finds
    assert done > 500


if __name__ == "__main__":
    seconds, seed = (int(sys.argv[i]) if len(sys.argv) > i else 1 for i in (1, 2))
    count, found = fuzz(seconds, seed, keep=Path("fuzz-finds"))
    print(f"{count:,} files read in {seconds} s, {len(found)} finds")
