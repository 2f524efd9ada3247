"""classic-cnns check-data: what is wrong with a folder of images, as text, JSON or a page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from classic_cnns.data.check_page import page
from classic_cnns.data.checks import Report, check_folder
from classic_cnns.data.folder import images, visible
from classic_cnns.errors import ConfigError
from classic_cnns.progress import decoding_bar

SHOWN = 10  # files or classes of a kind in the text; JSON has all


def check_data(
    directory: Path,
    *,
    json_file: Path | None = None,
    html_file: Path | None = None,
    find_copies: bool = True,
) -> Report:
    """Checks a folder, prints what was found, and writes it to files.

    Args:
        directory: see `check_folder`. Nothing in it is changed.
        json_file: gets the whole report.
        html_file: gets a page with pictures that needs no other file.
        find_copies: whether to look for duplicates.

    Raises:
        DataError: not a directory.
        ConfigError: an output file that cannot be written, or is in the directory.
    """
    outputs = [path for path in (json_file, html_file) if path]
    for path in outputs:
        if directory.resolve() in path.resolve().parents:
            raise ConfigError(f"{path} is in the folder to check. Fix: write it somewhere else")
        if not path.parent.is_dir():
            raise ConfigError(f"{path.parent} is not a directory. Fix: make it")
    report = check_folder(directory, find_copies=find_copies, progress=decoding_bar)
    print("\n".join(text(report)))
    try:
        if json_file:
            json_file.write_text(json.dumps(as_json(report), indent=1))
        if html_file:
            html_file.write_text(page(report, directory), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}. Fix: another file") from error
    for path in outputs:
        print(f"written: {path}")
    return report


def as_json(report: Report) -> dict[str, object]:
    """The report with what follows from it. Bytes of names that are no UTF-8 are lone surrogates,
    as everywhere in Python.
    """
    return {
        "images": report.images,
        "refused": report.refused,
        **dataclasses.asdict(report),
    }


def text(report: Report) -> Iterator[str]:
    """Lines for people."""
    size = report.total_bytes / 1e6
    yield (
        f"{visible(report.directory)}: {images(report.images)}, {size:,.1f} MB, checked in "
        f"{report.seconds:.1f} s"
    )
    yield from _table(report.counts)
    yield f"width      {_spread(report.widths)}"
    yield f"height     {_spread(report.heights)}"
    yield f"w:h        {_counts(report.aspects)}"
    yield f"format     {_counts(report.formats)}"
    yield f"colour     {_counts(report.modes)}"
    for finding in report.findings:
        number = f" ({len(finding.files):,})" if finding.files else ""
        yield f"{finding.level.upper():<10} {finding.kind}{number}: {visible(finding.text)}"
        for name, why in finding.files[:SHOWN]:
            yield f"             {visible(name)}" + (f": {visible(why)}" if why else "")
        if len(finding.files) > SHOWN:
            yield f"             and {len(finding.files) - SHOWN:,} more"
    if report.refused:
        yield "Training refuses this folder until the errors are mended."
    elif not report.findings:
        yield "Nothing is wrong with this folder."
    else:
        yield "Training takes this folder as it is."


def _table(counts: dict[str, dict[str, int]]) -> Iterator[str]:
    classes = list(dict.fromkeys(name for listing in counts.values() for name in listing))
    rows = [(name, [counts[split].get(name, 0) for split in counts]) for name in classes]
    if len(rows) > 2 * SHOWN:
        rows.sort(key=lambda row: -row[1][0])
        middle: tuple[str, list[int]] = (f"… {len(rows) - 2 * SHOWN} more classes", [])
        rows = [*rows[:SHOWN], middle, *rows[-SHOWN:]]
    width = min(40, max((len(visible(name)) for name, _ in rows), default=0))
    yield f"{'':{width}}" + "".join(f"{split:>10}" for split in counts)
    for name, numbers in [
        *rows,
        ("total", [sum(listing.values()) for listing in counts.values()]),
    ]:
        yield f"{visible(name):{width}}" + "".join(f"{n:10,}" for n in numbers)


def _spread(values: tuple[int, int, int]) -> str:
    smallest, median, largest = values
    if smallest == largest:
        return f"{smallest:,} px"
    return f"{smallest:,} to {largest:,} px, median {median:,}"


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in numbers.items() if count) or "–"
