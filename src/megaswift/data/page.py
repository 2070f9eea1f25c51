"""The HTML page of `swift data`: one file that needs nothing else, and lengths.png beside it."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megaswift.data.report import Dropped, remarks
from megaswift.errors import UserError

if TYPE_CHECKING:
    from megaswift.data.report import DataReport, DatasetReport

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
table { border-collapse: collapse } th, td { padding: .2rem .7rem; text-align: right }
th:first-child, td:first-child { text-align: left }
tr + tr { border-top: 1px solid #ddd } pre { white-space: pre-wrap; background: #f5f5f5; padding: .8rem; border-radius: 4px }
mark { background: #bfe8c5 } .bad { color: #9a4d00 } img { max-width: 100% }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 } pre { background: #242424 } tr + tr { border-color: #444 }
  mark { background: #1f5a2a; color: #eee } .bad { color: #e5a35b } }
"""


class Inspected(Protocol):
    """What the page shows beside the report."""

    @property
    def sizes(self) -> np.ndarray: ...

    @property
    def shown(self) -> list[list[tuple[str, bool]]]: ...


def write_page(directory: Path, report: DataReport, inspected: Inspected, lines: list[str]) -> Path:
    """Write index.html and lengths.png; returns the page. Raises UserError when the directory cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        picture = directory / "lengths.png"
        draw_lengths(inspected.sizes, report.max_length, picture)
        page = directory / "index.html"
        page.write_text(_page(report, inspected, lines, picture.read_bytes()), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the page cannot be written: {error.strerror}.", where=f"--output {directory}") from error
    return page


def draw_lengths(sizes: np.ndarray, max_length: int, path: Path) -> None:
    """A histogram of sample lengths as PNG, with max_length where it is near."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(sizes, bins=60, color="#3b7dd8")
    if 0 < max_length <= 2 * int(sizes.max()):
        axes.axvline(max_length, color="#c0392b", linewidth=1)
        axes.annotate(
            "max_length", (max_length, 1), xycoords=("data", "axes fraction"), xytext=(4, -12), textcoords="offset points"
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("samples")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _page(report: DataReport, inspected: Inspected, lines: list[str], picture: bytes) -> str:
    names = ("dataset", "rows", "usable", "train", "validation", "tokens", "with loss")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        _dataset_row(item.item, item.rows, item.usable, item.train, item.val, item.tokens, item.supervised)
        for item in report.datasets
    )
    dropped = "".join(_dropped(item, reason, entry) for item in report.datasets for reason, entry in item.dropped.items())
    dropped += "".join(_dropped(item, text, entry) for item in report.datasets for text, entry in item.notes.items())
    dropped += "".join(_dropped(item, text, Dropped(item.rows)) for item in report.datasets for text in item.files)
    dropped += "".join(_dropped(item, "too long", item.too_long) for item in report.datasets if item.too_long.count)
    dropped += "".join(_remark(item, *remark) for item in report.datasets for remark in remarks(item, report))
    examples = "".join(f"<pre>{''.join(_stretch(text, kept) for text, kept in example)}</pre>" for example in inspected.shown)
    facts = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Data</title><style>{STYLE}</style>'
        f"<h1>Data</h1><table><tr>{head}</tr>{body}</table><ul>{facts}</ul>"
        f'<img alt="histogram of lengths" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        f"{dropped}<h2>Examples</h2><p>Loss is on the <mark>marked</mark> text.</p>{examples}</html>\n"
    )


def _dataset_row(name: str, *numbers: int) -> str:
    return f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{number:,}</td>' for number in numbers)}</tr>"


def _stretch(text: str, kept: bool) -> str:
    return f"<mark>{html.escape(text)}</mark>" if kept else html.escape(text)


def _dropped(item: DatasetReport, reason: str, entry: Dropped) -> str:
    return _remark(item, f"{entry.count:,} rows, {reason}", entry.places)


def _remark(item: DatasetReport, text: str, places: list[str]) -> str:
    below = f"<pre>{html.escape(chr(10).join(places))}</pre>" if places else ""
    return f'<p class="bad">{html.escape(item.item)}: {html.escape(text)}</p>{below}'
