"""Cases 35 to 49: folders and image files that are not what one expects."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import classic_cnns
from classic_cnns.data import create_dataset, folder
from classic_cnns.data.checks import check_folder
from classic_cnns.data.decode import ImageFile
from classic_cnns.data.preprocess import decode_image
from classic_cnns.errors import DataError
from classic_cnns.plots import batch_labels, plot_batch

ROOT = Path(__file__).resolve().parents[2]


def fill(directory, names, count=4):
    """A folder for each name with pictures of one colour, which tells the class: its place."""
    for place, name in enumerate(names):
        (directory / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (place, 0, i)).save(directory / name / f"{i}.png")
    return directory


def read(directory):
    return create_dataset("folder", dir=str(directory), image_size=8, val_fraction=0.3)


def splits(data):
    return [split for split in (data.train, data.val, data.test) if split is not None]


def labels(directory):
    """Class name → label, as the pixels tell; every image must agree."""
    data = read(directory)
    places = data.train.images[:, 0, 0, 0].tolist()
    return [places[data.train.labels.tolist().index(i)] for i in range(data.num_classes)], data


def kinds(directory):
    """Kind of finding → what it is about."""
    found = {}
    for finding in check_folder(directory, find_copies=False).findings:
        found.setdefault(finding.kind, []).extend(name for name, _ in finding.files)
    return found


def test_case35_labels_go_by_code_points_in_whatever_order_names_are_listed(tmp_path, monkeypatch):
    # As documented, and as in torchvision: not by language, not by number.
    names = ["10", "2", "Cat", "Dog", "cat", "class10", "class2", "dog ", "Äpfel", "äpfel"]
    shuffled = list(enumerate(names))
    random.Random(3).shuffle(shuffled)
    fill(tmp_path, [name for _, name in shuffled])
    expected = [[name for _, name in shuffled].index(name) for name in names]
    assert sorted(names) == names
    listed = os.scandir

    class Backwards:
        def __init__(self, path):
            with listed(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    plain, data = labels(tmp_path)
    assert (plain, list(data.classes)) == (expected, names)
    monkeypatch.setattr(os, "scandir", Backwards)
    backwards, again = labels(tmp_path)
    assert (backwards, list(again.classes)) == (expected, names)
    assert again.fingerprint == data.fingerprint


def test_case35_names_that_differ_in_case_or_space_only_are_a_warning(tmp_path):
    fill(tmp_path, ["Cat", "cat", "dog", "dog ", "bird", "birds"])
    assert kinds(tmp_path)["class names that look alike"] == ["Cat", "cat", "dog", "dog "]


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints", ".DS_Store", "._0.png", ".git", ".Trash-1000", "__MACOSX", "@eaDir",
     "lost+found", "$RECYCLE.BIN", "System Volume Information"],
)  # fmt: skip
def test_case36_hidden_and_junk_folders_are_no_class_and_counted(name, tmp_path):
    fill(tmp_path, ["cat", "dog", name])
    fill(tmp_path / "cat", [name])
    assert {c: len(paths) for c, paths in folder.scan(tmp_path)["all"].items()} == {
        "cat": 4,
        "dog": 4,
    }
    assert sorted(kinds(tmp_path)["hidden entries"]) == sorted([name, f"cat/{name}"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("._1.png", "hidden entries"), (".DS_Store", "hidden entries"),
     ("Thumbs.db", "other files and folders"), ("desktop.ini", "other files and folders")],
)  # fmt: skip
def test_case36_hidden_and_junk_files_are_no_image_and_counted(name, kind, tmp_path):
    fill(tmp_path, ["cat", "dog"])
    (tmp_path / "cat" / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert len(folder.scan(tmp_path)["all"]["cat"]) == 4
    found = kinds(tmp_path)
    assert found[kind] == [f"cat/{name}"]
    assert "files that cannot be decoded" not in found


def test_case39_loops_of_folders_end_and_files_are_read_once(tmp_path):
    fill(tmp_path, ["cat", "dog"])
    (tmp_path / "cat" / "up").symlink_to("..")
    (tmp_path / "cat" / "self").symlink_to(".")
    (tmp_path / "dog" / "cat").symlink_to("../cat")
    assert check_folder(tmp_path).counts == {"all": {"cat": 4, "dog": 4}}
    assert kinds(tmp_path)["folders inside classes"] == ["cat/self", "cat/up", "dog/cat"]
    assert sum(len(s) for s in splits(read(tmp_path))) == 8
    (tmp_path / "loop").symlink_to(".")  # beside the classes it is one, without images
    with pytest.raises(DataError, match="classes without images in all: loop"):
        folder.scan(tmp_path)


@pytest.mark.parametrize("name", ["train/fox", "val"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_case39_a_folder_that_is_a_dangling_link_is_not_left_out_in_silence(name, target, tmp_path):
    fill(tmp_path / "train", ["cat", "dog"])
    folder.scan(tmp_path)
    link = tmp_path / name
    link.symlink_to(link if target == "itself" else target)
    with pytest.raises(DataError, match=f"{name}: a link that leads nowhere.* Fix: "):
        folder.scan(tmp_path)
    assert name in check_folder(tmp_path).findings[0].text


def test_case39_dangling_and_looping_files_are_counted_and_named(tmp_path):
    fill(tmp_path, ["cat", "dog"])
    (tmp_path / "cat" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "cat" / "loop.png").symlink_to("loop.png")
    assert check_folder(tmp_path).counts["all"]["cat"] == 6
    assert kinds(tmp_path)["files that cannot be decoded"] == ["cat/gone.png", "cat/loop.png"]
    with pytest.raises(DataError, match=r"2 of 10 files(.|\n)*gone.png(.|\n)*loop.png"):
        read(tmp_path)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_case43_gray_with_alpha_and_one_bit():
    shades = np.array([[[100, 255], [100, 0]], [[100, 51], [0, 255]]], np.uint8)
    clear = encoded(Image.fromarray(shades, "LA"), "PNG")
    assert decode_image(clear, 2, 2)[..., 0].tolist() == [[100, 255], [224, 0]]
    assert decode_image(clear, 2, 2, 1)[..., 0].tolist() == [[100, 255], [224, 0]]
    bits = Image.fromarray(np.array([[True, False], [False, True]]))
    for format in ("PNG", "TIFF", "BMP", "PPM"):
        data = encoded(bits, format)
        assert ImageFile(data).image.mode == "1"
        for channels in (1, 3):
            out = decode_image(data, 2, 2, channels)
            assert out.tolist() == [[[255] * channels, [0] * channels],
                                    [[0] * channels, [255] * channels]]  # fmt: skip


@pytest.mark.parametrize("format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_case45_the_first_of_several_frames_counts(format, tmp_path):
    first, *others = (Image.new("RGB", (9, 6), c) for c in ("red", "lime", "blue"))
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(first, format, save_all=True, append_images=others, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (decode_image(data, 6, 9) == (255, 0, 0)).all()
    fill(tmp_path, ["cat", "dog"])
    name = f"moving.{format.lower()}"
    (tmp_path / "cat" / name).write_bytes(data)
    assert kinds(tmp_path)["several pictures in a file"] == [f"cat/{name}"]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bombs(side):
    """Files of some bytes that claim to be side × side pixels, or hold a huge text."""
    web = min(side, 16_383)
    tags = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (278, side), (279, 9)]
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags))
    tiff += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    vp8x = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (web - 1).to_bytes(3, "little") * 2
    vp8 = b"\x30\1\0\x9d\1\x2a" + struct.pack("<HH", web, web) + bytes(30)
    lossy = b"VP8 " + struct.pack("<I", len(vp8)) + vp8
    gif = struct.pack("<6sHHBBB", b"GIF89a", side, side, 0x80, 0, 0) + bytes(6)
    gif += struct.pack("<cHHHHB", b",", 0, 0, side, side, 0) + b"\2\2\x4c\1\0;"
    text = b"Comment\0\0" + zlib.compress(bytes(80 << 20), 9)
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(9 * 8))) + chunk(b"IEND", b"")
    wide = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    bmp = struct.pack("<2sIII", b"BM", 60, 0, 54)
    bmp += struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(6)
    yield "TIFF", tiff
    yield "WebP", b"RIFF" + struct.pack("<I", 4 + len(lossy)) + b"WEBP" + lossy
    yield (
        "WebP, extended",
        (b"RIFF" + struct.pack("<I", 4 + len(vp8x + lossy)) + b"WEBP" + vp8x + lossy),
    )
    yield "GIF", gif
    yield "PPM", b"P6\n%d %d\n255\n" % (side, side) + bytes(30)
    yield "PGM, plain", b"P2\n%d %d\n255\n1 2 3" % (side, side)
    yield "BMP", bmp
    yield "PNG", header[:8] + wide + pixels
    yield "PNG, zTXt", header + chunk(b"zTXt", text) + pixels
    yield "PNG, iCCP", header + chunk(b"iCCP", text) + pixels


@pytest.mark.parametrize("side", [10_000, 60_000])  # within and beyond Pillow's own limit
def test_case47_bombs_of_every_format_are_refused_at_once(side, tmp_path):
    names = []
    for name, data in bombs(side):
        assert len(data) < 100_000
        names.append(name)
        (tmp_path / name).write_bytes(data)
    script = """
import json, resource, sys, time
from classic_cnns.data.preprocess import decode_image
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
out = {}
for path in sys.argv[1:]:
    start, before = time.perf_counter(), peak()
    try:
        reason = f"taken, {decode_image(path, 8, 8).shape}"
    except ValueError as error:
        reason = str(error)
    out[path.rsplit("/")[-1]] = reason, time.perf_counter() - start, peak() - before
print(json.dumps(out))
"""
    command = [sys.executable, "-c", script, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert list(found) == names
    for name, (reason, seconds, megabytes) in found.items():
        wanted = "too large" if name in ("PNG, zTXt", "PNG, iCCP") else "pixels"
        assert wanted in reason, name
        assert seconds < 1, name
        assert megabytes < 100, name


ODD = {
    "composed": unicodedata.normalize("NFC", "Käse"),
    "decomposed": unicodedata.normalize("NFD", "Käse"),
    "line break": "a\nb",
    "spaces": "  a b  ",
    "dash": "--help",
    "long": "x" * 200,
    "no UTF-8": os.fsdecode(b"\xff\xfe"),
    "escape": "\x1b]0;owned\x07\x1b[2J",
    "markup": "<script>alert(1)<!--",
    "mathtext": r"$\frac$ $x_$",
    "rich": "[bold red]x[blink]",
    "format": "{0} %s %(x)s",
    "quotes": "'\";$(id)`id`",
    "right to left": "\u202egnp",
}


def test_case49_odd_names_of_files_are_read_and_shown_on_one_line(tmp_path):
    fill(tmp_path, ["cat", "dog"])
    for place, name in enumerate(ODD.values()):
        Image.new("RGB", (8, 8), (place, 50, 0)).save(tmp_path / "cat" / "new.png")
        os.rename(tmp_path / "cat" / "new.png", tmp_path / "cat" / f"{name}.png")
    seen = [p for split in splits(read(tmp_path)) for p in split.images[:, 0, 0].tolist()]
    assert len(seen) == 8 + len(ODD)
    assert {p[0] for p in seen if p[1] == 50} == set(range(len(ODD)))
    for name in ODD.values():
        (tmp_path / "cat" / f"{name}.png").write_bytes(b"junk")
    with pytest.raises(DataError) as error:
        read(tmp_path)
    shown = str(error.value)
    assert f"{len(ODD)} of {8 + len(ODD)} files" in shown
    assert all(line.isprintable() for line in shown.splitlines())
    assert len(shown.splitlines()) <= len(ODD) + 2
    bad = kinds(tmp_path)["files that cannot be decoded"]
    assert sorted(bad) == sorted(f"cat/{name}.png" for name in ODD.values())


def test_case49_case60_odd_names_of_classes_reach_no_page_no_event_and_no_terminal(lab, tmp_path):
    fill(tmp_path / "photos", ODD.values())
    fields = {"data__dir": str(tmp_path / "photos"), "data__image_size": 32, "batch_size": 8}
    run = tmp_path / "run"
    code, output = lab.run(run, config="lenet5.py:folder", num_steps=2, log_every_steps=1, **fields)
    assert code == 0, output
    assert classic_cnns.load(run).classes == tuple(sorted(ODD.values()))
    assert "cannot be" not in output  # no warning of a file or figure
    assert not set(output) & {"\x1b", "\u202e", "\x07"}
    events = b"".join(p.read_bytes() for p in (run / "tensorboard").iterdir())
    assert b"train_loss" in events
    for name in ODD.values():
        assert os.fsencode(name) not in events
        assert name.isalnum() or f"\n{name}" not in output


def test_case60_class_names_are_no_formulas_in_figures(tmp_path):
    names = sorted(ODD.values())
    images = np.zeros((len(names), 8, 8, 3), np.uint8)
    labels = batch_labels({"label": np.arange(len(names))}, names)
    plot_batch(images, labels, tmp_path / "a.png", r"$\frac$")
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.width > 500
    assert all(label.isprintable() for label in labels)
    from matplotlib.figure import Figure

    figure = Figure()
    figure.suptitle(names[names.index(ODD["mathtext"])])
    with pytest.raises(ValueError, match="frac"):  # what it would be otherwise
        figure.savefig(tmp_path / "b.png")
