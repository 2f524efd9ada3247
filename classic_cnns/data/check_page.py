"""The report on a folder of images as one HTML page with pictures.

The page needs no other file and runs no script; a browser would not load anything from elsewhere
either. Whatever comes from the folder goes through `_text`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg

from classic_cnns.data.checks import Report
from classic_cnns.data.decode import ImageFile, resize
from classic_cnns.data.duplicates import Copies
from classic_cnns.data.folder import visible
from classic_cnns.data.layout import Finding

SIDE = 96  # of thumbnails, in pixels
MOST_FILES = 24  # of a finding
MOST_GROUPS = 40  # of duplicates
MOST_IN_GROUP = 8
MOST_CLASSES = 40  # with example images
EXAMPLES = 8  # of a class

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bar: #4878b8;
  --error: #c62828; --warning: #b26a00; --advice: #2e7d32; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto;
  padding: 0 1.5em; }
h1 { font-size: 1.5em; margin: 0 0 .2em; overflow-wrap: anywhere; }
h2 { font-size: 1.15em; margin: 2em 0 .6em; }
.verdict { font-weight: 600; }
.error { --tone: var(--error); } .warning { --tone: var(--warning); }
.advice { --tone: var(--advice); }
.verdict, .level { color: var(--tone); }
.tiles { display: flex; flex-wrap: wrap; gap: .8em; margin: 1.2em 0; }
.tile { background: var(--soft); border-radius: 8px; padding: .6em 1em; min-width: 7em; }
.tile b { display: block; font-size: 1.35em; font-variant-numeric: tabular-nums; }
.tile span, .note { opacity: .7; font-size: .88em; }
.finding { border: 1px solid var(--line); border-left: 5px solid var(--tone); border-radius: 6px;
  padding: .6em 1em; margin: .7em 0; }
.finding h3 { margin: 0; font-size: 1em; } .finding p { margin: .2em 0 .5em; }
.pictures { display: flex; flex-wrap: wrap; gap: 10px; }
figure { margin: 0; width: 112px; font-size: 11px; line-height: 1.3; overflow-wrap: anywhere; }
figure img { width: 112px; height: 96px; object-fit: contain; background: var(--soft);
  border-radius: 4px; display: block; }
.name { font-size: .88em; overflow-wrap: anywhere; }
figcaption i { font-style: normal; opacity: .7; display: block; }
.group { border-top: 1px solid var(--line); padding: .6em 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: .15em .8em .15em 0; text-align: left; font-weight: normal;
  overflow-wrap: anywhere; }
td.number { text-align: right; width: 6em; } td.bars { width: 45%; }
.columns td.number { width: 4em; } .columns td.bars { width: 40%; }
.bar { background: var(--bar); height: .8em; border-radius: 2px; min-width: 1px; }
.columns th { white-space: nowrap; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 3em; }
.examples { display: flex; gap: 6px; flex-wrap: wrap; }
.examples figure, .examples img { width: auto; }
"""

TONES = ("error", "warning", "advice")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(report: Report, directory: Path) -> str:
    """The page; `directory` is read again for the pictures on it.

    Args:
        report: of the directory.
        directory: where the paths in the report start.
    """
    return "\n".join(_parts(report, directory))


def _parts(report: Report, directory: Path) -> Iterator[str]:
    levels: list[str] = [finding.level for finding in report.findings]
    verdict, tone = "Training takes this folder as it is.", "advice"
    if report.refused:
        verdict, tone = "Training refuses this folder until the errors are mended.", "error"
    elif "warning" in levels:
        tone = "warning"
    elif not levels:
        verdict = "Nothing is wrong with this folder."
    name = _text(directory.resolve().name)
    yield f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width"><title>{name}: check-data</title>
<style>{STYLE}</style></head><body>
<h1>{name}</h1><div class="verdict {tone}">{verdict}</div>"""
    classes = list(dict.fromkeys(c for listing in report.counts.values() for c in listing))
    yield '<div class="tiles">'
    for value, what in (
        (f"{report.images:,}", "images"),
        (f"{len(classes):,}", "classes"),
        (f"{report.total_bytes / 1e6:,.1f} MB", "on disk"),
        (f"{report.widths[1]:,} × {report.heights[1]:,}", "median width × height, px"),
        (" · ".join(str(levels.count(n)) for n in TONES), "errors · warnings · advice"),
    ):
        yield f'<div class="tile"><b>{value}</b><span>{what}</span></div>'
    yield "</div>"
    if report.findings:
        yield "<h2>Findings</h2>"
    for finding in report.findings:
        yield from _finding(finding, directory)
    if report.copies:
        yield from _copies(report.copies, directory)
    yield "<h2>Images of each class</h2>"
    yield from _counts(report.counts, classes)
    yield '<div class="columns">'
    for title, numbers in (
        ("Width : height", report.aspects),
        ("File format", report.formats),
        ("Colour", report.modes),
    ):
        yield f"<div><h2>{title}</h2>"
        rows = [(name, [count]) for name, count in numbers.items()]
        yield from _bars(rows)
        yield "</div>"
    yield "</div><h2>Examples</h2>"
    yield from _examples(report, directory, classes)
    yield f'<p class="note">classic-cnns check-data, {report.seconds:.1f} s</p></body></html>'


def _finding(finding: Finding, directory: Path) -> Iterator[str]:
    count = f" ({len(finding.files):,})" if finding.files else ""
    yield (
        f'<div class="finding {finding.level}"><h3><span class="level">{finding.level}</span> · '
        f"{_text(finding.kind)}{count}</h3><p>{_text(finding.text)}</p>"
    )
    if finding.files and not finding.kind.startswith("the same picture"):
        yield from _pictures(finding.files[:MOST_FILES], directory)
        yield _more(len(finding.files) - MOST_FILES)
    yield "</div>"


def _pictures(files: Iterable[tuple[str, str]], directory: Path) -> Iterator[str]:
    """Thumbnails with names, then the names of what has no picture."""
    sources = {name: _thumbnail(directory / name) for name, _ in files}
    yield '<div class="pictures">'
    for name, why in files:
        if sources[name]:
            reason = f"<i>{_text(why)}</i>" if why else ""
            caption = f"<figcaption>{_text(name)}{reason}</figcaption>"
            yield f'<figure><img alt="" src="{sources[name]}">{caption}</figure>'
    yield "</div>"
    for name, why in files:
        if not sources[name]:
            reason = f' <span class="note">{_text(why)}</span>' if why else ""
            yield f'<div class="name">{_text(name)}{reason}</div>'


def _copies(copies: Iterable[Copies], directory: Path) -> Iterator[str]:
    copies = list(copies)
    yield "<h2>Duplicates</h2>"
    for group in copies[:MOST_GROUPS]:
        facts = ["same bytes" if group.exact else "look the same"]
        if group.labels > 1:
            facts.append("different labels")
        if group.splits > 1:
            facts.append("several splits")
        tone = "warning" if len(facts) > 1 else "advice"
        yield f'<div class="group {tone}"><span class="level">{", ".join(facts)}</span>'
        shown = [(name, "") for *_, name in group.files[:MOST_IN_GROUP]]
        yield from _pictures(shown, directory)
        yield _more(len(group.files) - MOST_IN_GROUP) + "</div>"
    yield _more(len(copies) - MOST_GROUPS, "groups")


def _counts(counts: dict[str, dict[str, int]], classes: list[str]) -> Iterator[str]:
    rows = [(name, [listing.get(name, 0) for listing in counts.values()]) for name in classes]
    yield from _bars(rows, list(counts) if list(counts) != ["all"] else None)


def _bars(rows: list[tuple[str, list[int]]], head: list[str] | None = None) -> Iterator[str]:
    """A table of numbers with a bar for the first."""
    largest = max((numbers[0] for _, numbers in rows), default=0) or 1
    yield "<table>"
    if head:
        yield f"<tr><th></th>{''.join(f'<td class=number>{_text(h)}</td>' for h in head)}</tr>"
    for name, numbers in rows:
        cells = "".join(f'<td class="number">{n:,}</td>' for n in numbers)
        width = 100 * numbers[0] / largest
        bar = f'<div class="bar" style="width: {width:.1f}%"></div>' if numbers[0] else ""
        yield f'<tr><th>{_text(name)}</th>{cells}<td class="bars">{bar}</td></tr>'
    yield "</table>"


def _examples(report: Report, directory: Path, classes: list[str]) -> Iterator[str]:
    for name in classes[:MOST_CLASSES]:
        files = report.examples.get(name, ())
        yield f'<p>{_text(name)}</p><div class="examples">'
        for file in files[:EXAMPLES]:
            source = _thumbnail(directory / file)
            if source:
                yield f'<figure><img alt="" src="{source}"></figure>'
        yield "</div>"
    yield _more(len(classes) - MOST_CLASSES, "classes")


def _thumbnail(path: Path) -> str:
    """A small JPEG as a data URI, or "" for what is no image."""
    try:
        image = ImageFile(path)
        pixels = image.pixels(3, image.divisor(SIDE, SIDE))
    except (ValueError, OSError):
        return ""
    scale = min(1.0, SIDE / max(pixels.shape[:2]))
    height, width = (max(1, round(scale * side)) for side in pixels.shape[:2])
    small = np.ascontiguousarray(resize(pixels, height, width))
    data = simplejpeg.encode_jpeg(small, quality=80, colorspace="RGB")
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _more(count: int, what: str = "files") -> str:
    return f'<p class="note">and {count:,} more {what}</p>' if count > 0 else ""


def _text(text: str) -> str:
    return html.escape(visible(text))
