"""The HTML page of `swift data`: one file that needs nothing else, and lengths.png beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megaswift.data.report import Dropped, remarks
from megaswift.errors import UserError
from megaswift.report import html
from megaswift.report.html import Markup

if TYPE_CHECKING:
    from megaswift.data.report import DataReport, DatasetReport


class Inspected(Protocol):
    """What the page shows beside the report."""

    @property
    def sizes(self) -> np.ndarray: ...

    @property
    def shown(self) -> list[list[tuple[str, float]]]: ...

    @property
    def titles(self) -> list[str]: ...


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
    names = ["dataset", "rows", "usable", "train", "validation", "tokens", "with loss"]
    rows = [
        [
            item.item,
            *(f"{n:,}" for n in (item.rows, item.usable, item.train, item.val, item.tokens, item.supervised)),
        ]
        for item in report.datasets
    ]
    told = [_dropped(item, reason, entry) for item in report.datasets for reason, entry in item.dropped.items()]
    told += [_dropped(item, text, entry) for item in report.datasets for text, entry in item.notes.items()]
    told += [_dropped(item, text, Dropped(item.rows)) for item in report.datasets for text in item.files]
    told += [_dropped(item, "too long", item.too_long) for item in report.datasets if item.too_long.count]
    told += [_remark(item, *remark) for item in report.datasets for remark in remarks(item, report)]
    return html.page(
        "Data",
        html.table(names, rows, range(1, len(names))),
        html.listed(lines),
        html.picture(picture, "histogram of lengths"),
        *told,
        html.heading("Examples"),
        html.paragraph("Loss is on the ", html.element("mark", "marked"), " text; a weight other than 1 stands before it."),
        *(
            html.inside(html.paragraph(title), html.element("pre", *(_stretch(text, weight) for text, weight in example)))
            for title, example in zip(inspected.titles, inspected.shown, strict=True)
        ),
    )


def _stretch(text: str, weight: float) -> str:
    if weight in (0.0, 1.0):
        return html.element("mark", text) if weight else text
    return html.element("mark", html.element("b", f"{weight:g} x "), text)


def _dropped(item: DatasetReport, reason: str, entry: Dropped) -> Markup:
    return _remark(item, f"{entry.count:,} rows, {reason}", entry.places)


def _remark(item: DatasetReport, text: str, places: list[str]) -> Markup:
    told = html.paragraph(f"{item.item}: {text}", kind="warn")
    return html.inside(told, html.element("pre", "\n".join(places))) if places else told
