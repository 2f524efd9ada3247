"""What the names in a folder of images tell, right or wrong; no file is opened but those whose name
does not say what they are."""

from __future__ import annotations

import dataclasses
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from PIL import Image

from classic_cnns.data import folder
from classic_cnns.data.decode import FORMATS

Level = Literal["error", "warning", "advice"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to know about a folder.

    Attributes:
        level: "error": training refuses the folder; "warning": probably a mistake; "advice".
        kind: a few words that stay the same from folder to folder.
        text: a sentence that says what it means, and what to do.
        files: what it is about: (path inside the folder, perhaps why).
    """

    level: Level
    kind: str
    text: str
    files: tuple[tuple[str, str], ...] = ()


# What is odd about a path: how much it matters, and what to say.
ODDITIES: dict[str, tuple[Level, str]] = {
    "folders inside classes": (
        "warning",
        "They are not read. Fix: move their images up into the folder of the class.",
    ),
    "folders named like images": ("warning", "They are not read. Fix: rename or remove them."),
    "images outside the classes": (
        "warning",
        "They are not read. Fix: move them into the folder of a class.",
    ),
    "images without the name of one": (
        "warning",
        f"They are not read. Fix: names that end with {' '.join(folder.EXTENSIONS)}.",
    ),
    "links out of the folder": (
        "warning",
        "They are followed, and break when the folder is moved. Fix: copy what they lead to.",
    ),
    "other files and folders": ("advice", "They are passed over."),
    "hidden entries": ("advice", "They are passed over."),
}

Odd = dict[str, list[tuple[str, str]]]  # kind of `ODDITIES` → (path inside the folder, why)


def survey(directory: Path) -> tuple[dict[str, folder.Listing], list[Finding]]:
    """Lists a folder as training would, and what is odd about it.

    Returns:
        Paths by split ("all" if it has none) and class, and findings.

    Raises:
        DataError: it is not a directory.
    """
    splits, problems = folder.list_splits(directory)
    findings = [Finding("error", "layout", str(error)) for error in problems]
    odd: Odd = {kind: [] for kind in ODDITIES}
    roots = folder.find_splits(directory)
    for root in roots.values() if roots else [directory]:
        for entry in _shown(root, directory, odd):
            if folder.is_dir(entry):
                _look_into(entry, directory, odd)
            else:
                _look_at_file(entry, directory, odd, misplaced=True)
    if roots:
        read = {path.name for path in roots.values()}
        for entry in _shown(directory, directory, odd):
            if entry.name not in read:
                inside = _inside(entry.path) if folder.is_dir(entry) else ""
                odd["other files and folders"].append((entry.name, inside))
    findings += [
        Finding(level, kind, text, tuple(odd[kind]))
        for kind, (level, text) in ODDITIES.items()
        if odd[kind]
    ]
    return splits, [*findings, *_confusing(splits)]


def relative(path: str, directory: Path) -> str:
    """A path inside a folder, as it is written in findings."""
    return os.path.relpath(path, directory)


def _shown(root: str | Path, directory: Path, odd: Odd) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            found = sorted(entries, key=lambda e: e.name)
    except OSError:
        return  # `folder.list_splits` has said so
    for entry in found:
        if folder.hidden(entry.name):
            odd["hidden entries"].append((relative(entry.path, directory), ""))
        else:
            yield entry


def _look_into(parent: os.DirEntry[str], directory: Path, odd: Odd) -> None:
    """The folder of a class."""
    if parent.is_symlink():
        odd["links out of the folder"].append(
            (relative(parent.path, directory), os.readlink(parent.path))
        )
    for entry in _shown(parent.path, directory, odd):
        if folder.is_dir(entry):
            name = relative(entry.path, directory)
            if entry.name.lower().endswith(folder.EXTENSIONS):
                odd["folders named like images"].append((name, "a folder"))
            else:
                odd["folders inside classes"].append((name, _inside(entry.path)))
        else:
            _look_at_file(entry, directory, odd)


def _look_at_file(
    entry: os.DirEntry[str], directory: Path, odd: Odd, misplaced: bool = False
) -> None:
    name = relative(entry.path, directory)
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        if Path(directory).resolve() not in Path(target).parents:
            odd["links out of the folder"].append((name, os.readlink(entry.path)))
    if entry.name.lower().endswith(folder.EXTENSIONS):
        if misplaced:
            odd["images outside the classes"].append((name, ""))
    elif kind := _image_format(entry):
        odd["images without the name of one"].append((name, kind))
    else:
        odd["other files and folders"].append((name, ""))


def _image_format(entry: os.DirEntry[str]) -> str:
    """What kind of image a file is by its first bytes, or ""."""
    try:
        if not entry.is_file():
            return ""
        with Image.open(entry.path, formats=FORMATS) as image:
            return image.format or ""
    except Exception:  # Pillow raises many kinds for a file that is no image
        return ""


def _inside(directory: str) -> str:
    count = sum(
        name.lower().endswith(folder.EXTENSIONS) and not folder.hidden(name)
        for _, _, names in os.walk(directory)
        for name in names
    )
    return f"{folder.images(count)} inside"


def _confusing(splits: dict[str, folder.Listing]) -> Iterator[Finding]:
    """Names that a person would take for the same, or for a split."""
    by_form: dict[str, set[str]] = {}
    for listing in splits.values():
        for name in listing:
            by_form.setdefault(_form(name), set()).add(name)
    for names in by_form.values():
        if len(names) > 1:
            files = [
                (_place(split, name), folder.images(len(listing[name])))
                for split, listing in splits.items()
                for name in sorted(names & set(listing))
            ]
            text = "They differ only by case, spaces or the like, and count as different classes."
            fix = "Fix: one name for both."
            yield Finding("warning", "class names that look alike", f"{text} {fix}", tuple(files))
    alike = {name for names in folder.SPLIT_NAMES.values() for name in names} | {"training"}
    wrong = [name for name in splits.get("all", {}) if _form(name) in alike]
    if wrong:
        text = "They are taken for classes. Fix: call them train, val and test."
        yield Finding("warning", "classes named like splits", text, tuple((n, "") for n in wrong))
    unseen = [_place(s, n) for s, listing in splits.items() for n in listing if not n.isprintable()]
    if unseen:
        text = "They are hard to type and to show. Fix: rename the folders."
        yield Finding("warning", "class names with invisible characters", text,
                      tuple((name, "") for name in unseen))  # fmt: skip


def _form(name: str) -> str:
    words: Iterable[str] = unicodedata.normalize("NFKC", name).casefold().split()
    return " ".join(" ".join(words).replace("_", " ").replace("-", " ").split())


def _place(split: str, name: str) -> str:
    return name if split == "all" else f"{split}/{name}"
