"""check-data: every planted fault is found and named, a clean folder has none, nothing changes."""

import hashlib
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classic_cnns import cli
from classic_cnns.check_data import check_data
from classic_cnns.data import advise, duplicates
from classic_cnns.data.checks import check_folder
from classic_cnns.data.decode import ImageFile
from classic_cnns.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]


def picture(seed, height=60, width=80):
    """Smooth blobs of colour: no two seeds look alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def fill(directory, splits=("train", "val"), classes=("cat", "dog"), count=12):
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            place = directory / split / name
            place.mkdir(parents=True)
            for i in range(count):
                picture(1000 * s + 100 * c + i).save(place / f"{i}.jpg", quality=95)
    return directory


def tree(directory):
    """Every name, kind, time of change and content below a folder."""
    out = {}
    for path in sorted(directory.rglob("*")):
        stat = path.lstat()
        regular = path.is_file() and not path.is_symlink()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if regular else ""
        out[str(path)] = (stat.st_mode, stat.st_mtime_ns, stat.st_size, content)
    return out


def test_a_clean_folder_has_no_findings(tmp_path, capsys):
    report = check_data(fill(tmp_path / "photos"))
    assert report.findings == report.copies == ()
    assert not report.refused
    assert report.counts == {s: {"cat": 12, "dog": 12} for s in ("train", "val")}
    assert report.images == 48
    assert report.widths == (80, 80, 80)
    assert report.heights == (60, 60, 60)
    assert report.formats == {"JPEG": 48}
    assert report.modes == {"RGB": 48}
    assert report.aspects["3:4 to 4:3"] == 48
    assert "Nothing is wrong with this folder." in capsys.readouterr().out
    assert cli.main(["check-data", str(tmp_path / "photos")]) == 0


def plant(directory):
    """Faults, and for each the kind of finding with the path that it must name."""
    train, val = directory / "train", directory / "val"
    cat, dog = train / "cat", train / "dog"
    (cat / "empty.jpg").touch()
    (cat / "page.jpg").write_text("<html>404</html>")
    data = (cat / "3.jpg").read_bytes()
    (cat / "cut.jpg").write_bytes(data[: len(data) // 2])
    os.mkfifo(cat / "pipe.jpg")
    (cat / "dangling.jpg").symlink_to("nowhere.jpg")
    (cat / "loop.jpg").symlink_to("loop.jpg")
    picture(50).save(dog / "really_a_png.jpg", format="PNG")
    frames = [picture(i, 40, 40) for i in (60, 61)]
    frames[0].save(dog / "moving.gif", save_all=True, append_images=frames[1:])
    clear = picture(62)
    clear.putalpha(100)
    clear.save(dog / "clear.png")
    (dog / "more").mkdir()
    picture(51).save(dog / "more" / "a.jpg")
    (dog / "album.jpg").mkdir()
    picture(52).save(dog / "no_name", format="PNG")
    (dog / "notes.txt").write_text("notes")
    (dog / ".hidden.jpg").write_bytes(data)
    picture(53).save(train / "stray.jpg")
    outside = directory.parent / "elsewhere.jpg"
    picture(54).save(outside)
    (dog / "link.jpg").symlink_to(outside)
    (dog / "like_a_cat.jpg").write_bytes((cat / "4.jpg").read_bytes())
    picture(5).resize((40, 30)).save(val / "cat" / "small.png")  # train/cat/5.jpg, half the size
    (cat / "twice.jpg").write_bytes((cat / "6.jpg").read_bytes())
    for seed, name in ((55, "bird"), (56, "Dog ")):
        (val / name).mkdir()
        picture(seed).save(val / name / "0.jpg")
    (train / "empty").mkdir()
    (directory / "test_old").mkdir()
    (train / "cat\n2").mkdir()
    (train / "cat\n2" / "1.jpg").write_bytes(data[:-30])
    for i in range(9):
        picture(70 + i, 20, 90).save(cat / f"wide{i}.jpg")
    return {
        "empty files": "train/cat/empty.jpg",
        "files that cannot be decoded": (
            "train/cat/page.jpg", "train/cat/cut.jpg", "train/cat/pipe.jpg",
            "train/cat/dangling.jpg", "train/cat/loop.jpg", "train/cat\n2/1.jpg",
        ),
        "names of another format": "train/dog/really_a_png.jpg",
        "several pictures in a file": "train/dog/moving.gif",
        "transparency": "train/dog/clear.png",
        "folders inside classes": "train/dog/more",
        "folders named like images": "train/dog/album.jpg",
        "images without the name of one": "train/dog/no_name",
        "other files and folders": ("train/dog/notes.txt", "test_old"),
        "hidden entries": "train/dog/.hidden.jpg",
        "images outside the classes": "train/stray.jpg",
        "links out of the folder": "train/dog/link.jpg",
        "the same picture with different labels": ("train/cat/4.jpg", "train/dog/like_a_cat.jpg"),
        "the same picture in several splits": ("train/cat/5.jpg", "val/cat/small.png"),
        "the same picture twice in a class": ("train/cat/6.jpg", "train/cat/twice.jpg"),
        "class names that look alike": ("train/dog", "val/Dog ", "val/dog"),
        "class names with invisible characters": "train/cat\n2",
        "small classes": "cat\n2",
        "imbalance": "cat\n2",
        "extreme shapes": (),
    }  # fmt: skip


def test_every_planted_fault_is_found_and_named(tmp_path):
    directory = fill(tmp_path / "photos")
    expected = plant(directory)
    before = tree(directory)
    report = check_data(directory, json_file=tmp_path / "r.json", html_file=tmp_path / "r.html")
    assert tree(directory) == before
    found = {finding.kind: finding for finding in report.findings}
    assert set(found) == {*expected, "layout"}
    for kind, names in expected.items():
        names = (names,) if isinstance(names, str) else names
        named = [name for name, _ in found[kind].files]
        if kind != "imbalance":
            assert sorted(named) == sorted(names), kind
        else:
            assert set(names) < set(named)
    layout = found["layout"].text
    assert "classes in val that train lacks: 'Dog ', bird;" in layout
    assert "classes without images in train: empty" in layout
    reasons = dict(found["files that cannot be decoded"].files)
    assert reasons["train/cat/page.jpg"] == "not an image of a supported format"
    assert reasons["train/cat/pipe.jpg"] == "not a regular file"
    assert reasons["train/cat/dangling.jpg"] == "No such file or directory"
    assert reasons["train/cat/loop.jpg"] == "Too many levels of symbolic links"
    assert "runcated" in reasons["train/cat/cut.jpg"]
    kinds = [(c.exact, c.labels, c.splits) for c in report.copies]
    assert kinds == [(True, 2, 1), (False, 1, 2), (True, 1, 1)]
    levels = [finding.level for finding in report.findings]
    assert levels == sorted(levels, key=("error", "warning", "advice").index)
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["refused"]
    assert saved["images"] == report.images
    assert len(saved["findings"]) == len(report.findings)


def test_exit_code_is_3_where_training_refuses(tmp_path, capsys):
    directory = fill(tmp_path / "photos")
    (directory / "train" / "cat" / "empty.jpg").touch()
    assert cli.main(["check-data", str(directory), "--no-duplicates"]) == 3
    assert "train/cat/empty.jpg" in capsys.readouterr().out
    assert cli.main(["check-data", str(tmp_path / "nothing")]) == 3
    assert "is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(("splits", "least"), [(("",), 3), (("train",), 2), (("train", "val"), 1)])
def test_the_fewest_images_that_can_be_split(splits, least, tmp_path):
    from classic_cnns.data import create_dataset

    for count in range(1, 4):
        directory = fill(tmp_path / str(count), splits, count=count)
        assert check_folder(directory).refused == (count < least)
        if count < least:
            with pytest.raises(DataError):
                create_dataset("folder", dir=str(directory), image_size=8)
        else:
            create_dataset("folder", dir=str(directory), image_size=8)


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def test_names_cannot_change_the_page_or_the_terminal(tmp_path, capsys):
    bad = "<img src=x onerror=alert(1)>\"'&amp;\x1b[31m\n\u202e"
    directory = fill(tmp_path / bad, classes=(bad, "dog"))
    (directory / "train" / bad / f"{bad}.jpg").write_text("junk")
    os.close(os.open(os.fsencode(directory) + b"/train/dog/\xff\xfe.jpg", os.O_CREAT | os.O_WRONLY))
    check_data(directory, html_file=tmp_path / "page.html", json_file=tmp_path / "r.json")
    page = (tmp_path / "page.html").read_text()
    parsed = Tags(page)
    assert set(parsed.tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "div", "span", "b", "i",
        "p", "figure", "figcaption", "img", "table", "tr", "td", "th",
    }  # fmt: skip
    names = {name for name, _ in parsed.attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "class", "style", "alt",
                     "src"}  # fmt: skip
    sources = [value for name, value in parsed.attributes if name == "src"]
    assert len(sources) == 16
    assert all(value.startswith("data:image/jpeg;base64,") for value in sources)
    assert any("onerror=alert(1)" in word for word in parsed.words)  # shown as text
    for text in (page, capsys.readouterr().out):
        assert not set(text) & {"\x1b", "\u202e"}
        assert text.isprintable() or {c for c in text if not c.isprintable()} == {"\n"}


def test_nothing_is_written_into_the_folder(tmp_path):
    directory = fill(tmp_path / "photos")
    for name in ("report.json", "train/report.json"):
        with pytest.raises(ConfigError, match="in the folder to check"):
            check_data(directory, json_file=directory / name)
    with pytest.raises(ConfigError, match="is not a directory"):
        check_data(directory, html_file=tmp_path / "none" / "report.html")


def bits(data):
    image = ImageFile(data)
    return duplicates.picture_bits(image.pixels(3, image.divisor(27, 27)))


def test_copies_look_the_same_and_others_do_not(tmp_path):
    originals = [picture(seed, 240, 320) for seed in range(20)]
    all_bits = []
    for image in originals:
        image.save(tmp_path / "a.png")
        first = bits(tmp_path / "a.png")
        all_bits.append(first)
        image.save(tmp_path / "b.jpg", quality=30)
        image.resize((160, 120)).save(tmp_path / "c.png")
        image.resize((200, 200)).save(tmp_path / "d.png")
        image.convert("L").save(tmp_path / "e.png")
        for name in ("b.jpg", "c.png", "d.png", "e.png"):
            assert np.bitwise_count(first ^ bits(tmp_path / name)).sum() <= duplicates.BOUND
    assert len(duplicates.similar_pairs(np.stack(all_bits))) == 0
    assert duplicates.picture_bits(np.full((50, 50, 3), 255, np.uint8)) is None


def test_all_similar_pairs_are_found_and_no_others():
    rng = np.random.default_rng(0)
    some = rng.integers(0, 1 << 63, (400, 2), np.uint64)
    some[:, 0] &= np.uint64(0xFFFF)  # large buckets
    for i in range(300):  # copies with 0 to 11 flipped bits
        copy = some[i].copy()
        for place in rng.choice(128, i % 12, replace=False).tolist():
            copy[place // 64] ^= np.uint64(1 << (place % 64))
        some = np.concatenate([some, copy[None]])
    some = np.unique(some, axis=0)
    apart = np.bitwise_count(some[:, None] ^ some[None]).sum(2)
    expected = np.argwhere(np.triu(apart <= 7, 1))
    assert len(expected) > 100
    np.testing.assert_array_equal(duplicates.similar_pairs(some), expected)


def test_groups_join_copies_of_copies():
    keys = np.array([0, 1, 0, 2, 3, 4])
    found = duplicates.groups(keys, np.array([[1, 2], [2, 4]]))
    assert [group.tolist() for group in found] == [[0, 2], [1, 3, 5]]


def test_shapes_at_the_edges_of_ranges():
    histogram = advise.aspects(np.array([0.2, 0.4, 0.6, 0.76, 1.0, 1.3, 1.9, 2.9, 3.1]))
    assert list(histogram.values()) == [1, 1, 1, 3, 1, 1, 1]


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    directory = fill(tmp_path / "photos", classes=("a", "b", "c", "d"), count=1500)
    script = (
        "import resource, sys; from classic_cnns import cli; code = cli.main(sys.argv[1:]);"
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", script, "check-data", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    code, megabytes = done.stdout.splitlines()[-1].split()
    assert code == "0"
    assert int(megabytes) < 250


def test_the_command_needs_no_jax(tmp_path):
    script = (
        "import sys; from classic_cnns.cli import main;"
        f"main(['check-data', {str(tmp_path)!r}]); print('jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "False"
