"""Weight files that are damaged, hostile or something else: one line each, nothing executed, no
memory beyond the file's own size.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_files import Call, Stub, Tensor, program, write_legacy, write_zip

from classic_cnns.errors import DataError
from classic_cnns.weights import hdf5
from classic_cnns.weights.files import read_weights
from classic_cnns.weights.torch_file import read_torch

ROOT = Path(__file__).parents[1]
NUMBERS = np.arange(24, dtype=np.float32)

HOSTILE = {
    "os.system": Call(Stub("posix", "system"), "touch HACKED"),
    "eval": Call(Stub("builtins", "eval"), "open('HACKED', 'w')"),
    "getattr": Call(Stub("builtins", "getattr"), Stub("os", "path"), "join"),
    "a module": Stub("torch.nn.modules.linear", "Linear"),
    "numpy": Call(Stub("numpy.core.multiarray", "_reconstruct"), 1),
    "torch.load": Call(Stub("torch.serialization", "load"), "x"),
    "a call of a storage": Call(Stub("torch", "FloatStorage"), 10**12),
    "a call of a dict": Call({}, 1),
    "a bare name": Stub("collections", "OrderedDict"),
    "a set": {1, 2},
    "a huge shape": Tensor("0", 24, (10**6, 10**6)),
    "an expanded view": Tensor("0", 24, (10**9,), (0,)),
    "a negative offset": Tensor("0", 24, (2,), offset=-1),
    "a negative stride": Tensor("0", 24, (2,), (-1,)),
    "beyond the end": Tensor("0", 24, (25,)),
    "another storage": Tensor("9", 24, (2,)),
    "strides that do not match": Tensor("0", 24, (2, 3), (1,)),
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_refused(name, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "x.pt", {"w": HOSTILE[name]}, {"0": NUMBERS.tobytes()})
    with pytest.raises(DataError, match=r"x\.pt: .*Fix: another file"):
        read_torch(path)
    assert os.listdir(tmp_path) == ["x.pt"]


def test_refused_names_are_told(tmp_path):
    path = write_zip(tmp_path / "x.pt", {"w": HOSTILE["os.system"]}, {})
    with pytest.raises(DataError, match=r"refers to 'posix\.system', which is refused"):
        read_torch(path)


DOUBLED = [1]
for _ in range(40):
    DOUBLED = [DOUBLED, DOUBLED]
# Pairs of pairs of … to whose hash or text there is no end.
TUPLES = b"K\x01" + b"q\x00h\x00\x86" * 64
# A dict of 1,000 pairs, made 2,000 times from one list.
PAIRS = b"ccollections\nOrderedDict\nq\x01]q\x00("
PAIRS += b"".join(b"M" + i.to_bytes(2, "little") + b"K\x00\x86" for i in range(1000)) + b"e0"
PAIRS = PAIRS.removesuffix(b"0") + b"(" + b"h\x01h\x00\x85R" * 2000 + b"t."


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (
            b"\x80\x02}q\x00(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.",
            "the key 'a' is there twice",
        ),
        (
            b"\x80\x02}q\x00r\xff\xff\xff\xffh\x07.",
            "not there",
        ),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "expected"),  # a string of 2 GB in 9 bytes
        (b"\x80\x02K\x01", "not a readable"),
        (b"\x80\x02(((((", "not a readable"),
        (b"\x80\x02c__builtin__\nexec\n.", "exec', which is refused"),
        (b"\x80\x02i__builtin__\nexec\n.", "opcode INST"),
        (b"\x80\x02I1\n.", "opcode INT"),
        (b"\x80\x02F" + b"x" * 5000 + b"\n.", "could not convert"),
        (b"\x80\x02]q\x00h\x00a.", "nested deeper than 50"),  # a list in itself
        (b"\x80\x02}q\x00K\x01h\x00s.", "nested deeper"),  # a dict in itself
        (b"\x80\x02" + b"]" * 60 + b"a" * 59 + b".", "nested deeper"),
        (program(DOUBLED), "more than 1,000,000 values"),
        (b"\x80\x02}" + TUPLES + b"K\x01s.", "a key that is not a plain value"),
        (b"\x80\x04" + TUPLES + b"\x8c\x01a\x93.", "name is not text"),
        (b"\x80\x02" + TUPLES + b"Q.", "not a storage"),
        (b"\x80\x02\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b".", "bits"),
        (b"\x80\x02" + b"N" * 10**6 + b".", "more than 1,000,000 steps"),
        (b"\x80\x02" + PAIRS, "more than 1,000,000 steps"),
        (b"\x80\x02\x8c\x05\x1b[2Ja\x8c\x01b\x93.", r"to '\\x1b\[2Ja.b', which"),
        (b"\x80\x02ctorch\nSize\n(" + b"K\x01" * 33 + b"t\x85R.", "up to 32 numbers"),
        (b"\x80\x02ctorch\nSize\nG" + b"\x7f" * 8 + b"\x85\x85R.", "impossible shape"),
    ],
)
def test_malformed_programs(raw, text, tmp_path):
    with pytest.raises(DataError, match=text) as info:
        read_torch(write_zip(tmp_path / "x.pt", raw, {}))
    assert len(str(info.value)) < 600 + len(str(tmp_path))
    with pytest.raises(DataError):
        read_torch(write_legacy(tmp_path / "y.pt", raw, {}))


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    bomb = write_zip(
        tmp_path / "bomb.pt",
        {"w": Tensor("0", 10**6, (10**6,))},
        {"0": bytes(4 * 10**6)},
        zipfile.ZIP_DEFLATED,
    )
    assert bomb.stat().st_size < 20_000
    (tmp_path / "dir.pt").mkdir()
    for name, text in (
        ("text.pt", "neither a zip file nor a pickle"),
        ("empty.pt", "neither"),
        ("bomb.pt", "compressed, which torch.save never does"),
        ("dir.pt", "no such file"),
        ("none.pt", "no such file"),
    ):
        with pytest.raises(DataError, match=text):
            read_torch(tmp_path / name)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_every_truncation_is_an_error(write, tmp_path):
    path = write(tmp_path / "x.pt", {"w": Tensor("0", 24, (24,))}, {"0": NUMBERS.tobytes()})
    data = path.read_bytes()
    for length in range(0, len(data) - 1, 7):
        path.write_bytes(data[:length])
        with pytest.raises(DataError):
            read_torch(path)


def test_a_length_beyond_any_memory_is_an_error(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x02\x8e" + (2**62).to_bytes(8, "little") + b"abc.")
    with pytest.raises(DataError, match="x\\.pt"):
        read_torch(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of Python's own parser of opcodes
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_damage_is_an_error_or_a_value(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("fuzz")
    write = data.draw(st.sampled_from([write_zip, write_legacy]))
    path = write(
        directory / "x.pt", {"w": Tensor("0", 24, (4, 6)), "n": [1]}, {"0": NUMBERS.tobytes()}
    )
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with contextlib.suppress(DataError):
        read_torch(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_random_programs_are_errors_or_values(tmp_path_factory, body):
    path = write_zip(tmp_path_factory.mktemp("fuzz") / "x.pt", b"\x80\x02" + body + b".", {})
    with contextlib.suppress(DataError):
        read_torch(path)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_many_views_of_one_storage_take_no_memory(write, tmp_path):
    side = 700
    turned = {str(i): Tensor("0", side**2, (side, side), (1, side)) for i in range(100)}
    numbers = np.arange(side**2, dtype=np.float32)
    path = write(tmp_path / "x.pt", turned, {"0": numbers.tobytes()})
    tracemalloc.start()
    out = read_torch(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < numbers.nbytes
    np.testing.assert_array_equal(out["99"], numbers.reshape(side, side).T)


# ---- every format, read with little memory


def h5(path, write, **settings):
    with h5py.File(path, "w", **settings) as file:
        layer = file.create_group("layers/conv1/vars")
        layer["1"] = NUMBERS
        write(file, layer)


def h5_virtual(_, layer):
    layout = h5py.VirtualLayout((24,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (24,))
    layer.create_virtual_dataset("0", layout)


def h5_cycle(file, layer):
    del file["layers"]
    group = file.create_group("model_weights/conv1")
    group["again"] = group


def h5_doubled(file, layer):
    del file["layers"]
    group = file.create_group("model_weights/g0")
    for _ in range(9):
        below = group.create_group("a")
        group.update({str(j): below for j in range(9)})
        group = below


H5 = {
    "links outside": (
        lambda f, v: v.update({"0": h5py.ExternalLink("other.h5", "x")}),
        "links to other",
    ),
    "soft links": (lambda f, v: v.update({"0": h5py.SoftLink("/layers")}), "links to other"),
    "virtual": (h5_virtual, "in another file"),
    "data outside": (
        lambda f, v: v.create_dataset("0", (24,), "f4", external=[("secret", 0, 96)]),
        "in another file",
    ),
    "claims": (lambda f, v: v.create_dataset("0", (1 << 40,), "f4"), "larger than the file"),
    "claims chunks": (
        lambda f, v: v.create_dataset("0", (1 << 40,), "f4", chunks=(1 << 10,)),
        "larger than the file",
    ),
    "bomb": (
        lambda f, v: v.create_dataset("0", data=np.zeros(10**7, "f4"), compression="gzip"),
        "compressed",
    ),
    "text": (lambda f, v: v.update({"0": ["a", "b"]}), "not an array of numbers"),
    "a group": (lambda f, v: v.create_group("0"), "not an array of numbers"),
    "a third variable": (lambda f, v: v.update({"7": NUMBERS}), "other variables"),
    "a group in itself": (h5_cycle, "nested deeper"),
    "groups in many": (h5_doubled, "more than 20,000 groups"),
    "a name of control characters": (
        lambda f, v: (v.attrs.update(name="\x1b[2J"), v.update({"0": NUMBERS})),
        r"has the name '\\x1b\[2J",
    ),
    "a name that is a number": (
        lambda f, v: (v.attrs.update(name=7), v.update({"0": NUMBERS})),
        "is not text",
    ),
}


def safetensors(header, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (
        (len(text) if length is None else length).to_bytes(8, "little") + text + NUMBERS.tobytes()
    )


ENTRY = {"dtype": "F32", "shape": [24], "data_offsets": [0, 96]}
OVERLAP = {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]}
SAFETENSORS = {
    "length": safetensors({"a": ENTRY}, length=1 << 40),
    "not json": safetensors(b"{" + b"x" * 20),
    "deep json": safetensors(b'{"a":' * 5000),
    "shape": safetensors({"a": ENTRY | {"shape": [1 << 40]}}),
    "offsets": safetensors({"a": ENTRY | {"data_offsets": [0, 1 << 40]}}),
    "negative": safetensors({"a": ENTRY | {"shape": [-24]}}),
    "overlap": safetensors({"a": ENTRY, "b": OVERLAP}),
    "twice": safetensors(f'{{"a":{json.dumps(ENTRY)},"a":{json.dumps(OVERLAP)}}}'.encode()),
    "dtype": safetensors({"a": ENTRY | {"dtype": "F33"}}),
    "name": safetensors({"\x1b[2J": ENTRY}),
    "long name": safetensors({"a" * 5000: ENTRY}),
}


def npz(path, members, compression=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of equal names
        for name, content in members:
            archive.writestr(name, content)


def npy(array, shape=None):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue().replace(b"(24,), ", f"({shape or 24},), ".encode())


def write_all(directory):
    """All hostile files; what their errors must say, by name."""
    texts = {}
    for name, (write, text) in H5.items():
        h5(directory / name, write)
        texts[name] = text
    for name, content in SAFETENSORS.items():
        (directory / f"safetensors {name}").write_bytes(content)
        texts[f"safetensors {name}"] = "name" if "name" in name else "damaged"
    zips = {
        "npz of objects": ([("a.npy", npy(np.array([{}])))], "Object arrays cannot be loaded"),
        "npz of text": ([("a.npy", npy(np.array(["a"])))], "no number"),
        "npz of the same": ([("a.npy", npy(NUMBERS)), ("a.npy", npy(NUMBERS))], "the same name"),
        "npz that claims": ([("a.npy", npy(NUMBERS, 1 << 34))], "damaged"),
        "npz that claims more": ([("a.npy", npy(NUMBERS, 1 << 62))], "damaged"),
        "npz bomb": ([("a.npy", npy(np.zeros(10**8, np.int8)))], "compressed beyond belief"),
        "keras bomb": ([("model.weights.h5", bytes(10**8))], "compressed beyond belief"),
        "keras of text": ([("model.weights.h5", b"text")], "damaged"),
        "zip of text": ([("readme.txt", b"text")], "0 members are called data.pkl"),
    }
    for name, (members, text) in zips.items():
        compression = zipfile.ZIP_DEFLATED if "bomb" in name else zipfile.ZIP_STORED
        npz(directory / name, members, compression)
        texts[name] = text
    (directory / "a text").write_text("hello, this is a text")
    texts["a text"] = "neither a zip file nor a pickle"
    return texts


READ_ALL = """
import json, resource, sys
from pathlib import Path
from classic_cnns.errors import DataError
from classic_cnns.weights import hdf5
from classic_cnns.weights.files import read_weights

now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20),) * 2)
errors = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        errors[path.name] = f"read: {list(read_weights(path))}"
    except DataError as error:
        errors[path.name] = str(error)
print(json.dumps(errors))
"""


def test_hostile_files_of_all_formats(tmp_path):
    """In a child whose memory may grow by 64 MiB."""
    folder = tmp_path / "files"
    folder.mkdir()
    texts = write_all(folder)
    child = [sys.executable, "-c", READ_ALL, str(folder)]
    out = subprocess.run(child, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert out.returncode == 0, out.stderr[-2000:]
    errors = json.loads(out.stdout)
    assert errors.keys() == texts.keys()
    for name, text in texts.items():
        assert errors[name].startswith(str(folder / name)), errors[name]
        assert re.search(text, errors[name]), errors[name]
        assert errors[name].isprintable(), name
        assert len(errors[name]) < 600, name


def test_what_the_hostile_files_are_made_of_is_read(tmp_path):
    """The same makers with nothing wrong."""
    h5(tmp_path / "h5", lambda f, v: v.update({"0": NUMBERS}))
    (tmp_path / "st").write_bytes(safetensors({"a": ENTRY}))
    npz(tmp_path / "npz", [("a.npy", npy(NUMBERS))], zipfile.ZIP_DEFLATED)
    npz(tmp_path / "keras", [("model.weights.h5", (tmp_path / "h5").read_bytes())])
    for name, keys in {"h5": 2, "st": 1, "npz": 1, "keras": 2}.items():
        arrays = read_weights(tmp_path / name)
        assert len(arrays) == keys
        for array in arrays.values():
            np.testing.assert_array_equal(array, NUMBERS)


def test_a_file_that_the_hdf5_library_finds_no_end_of(tmp_path, monkeypatch):
    """Found by test_fuzz_weights.py: an object of no size in the heap of texts."""
    path = tmp_path / "x.h5"
    h5(path, lambda f, v: (v.attrs.update(name="conv"), v.update({"0": NUMBERS})))
    assert list(read_weights(path)) == ["conv/kernel", "conv/bias"]
    data = bytearray(path.read_bytes())
    size = data.index(b"GCOL") + 24
    assert data[size] == len("conv")
    data[size] = 0
    path.write_bytes(data)
    monkeypatch.setattr(hdf5, "_MAX_SECONDS", 2)
    with pytest.raises(DataError, match="the HDF5 library finds no end of it"):
        read_weights(path)
    # Under a limit of the user's own that is shorter, the child cannot set another.
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/sh\nulimit -t 1\nexec {sys.executable} "$@"\n')
    limited.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(limited))
    with pytest.raises(DataError, match="the HDF5 library finds no end of it"):
        read_weights(path)
