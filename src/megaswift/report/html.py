"""The one kit for HTML pages: each page is one file without script, nothing is fetched, light and dark, on wide and narrow screens.

page("Data", heading("Examples"), table(["file", "rows"], [["a.jsonl", 3]], numbers={1}))
"""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_STYLE = """
:root { --text: #222; --back: #fff; --soft: #f3f4f6; --line: #ddd; --faint: #666; --good: #176b2c; --bad: #a02318; --warn: #8f4700;
  --mark: #bfe8c5; --loud: #fde8e8; --bar: #7aa5d8; --point: #1f5fa8; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --back: #17181b; --soft: #25272c; --line: #3a3d44; --faint: #a0a0a0;
  --good: #6fd08c; --bad: #ff8d80; --warn: #e5a35b; --mark: #1f5a2a; --loud: #3a1d1d; --bar: #3f6a9c; --point: #8fc0f5 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: var(--text);
  background: var(--back); overflow-wrap: anywhere }
h1, h2 { line-height: 1.2; text-wrap: balance }
.wide { overflow-x: auto; margin: .6rem 0 1.4rem }
table { border-collapse: collapse; overflow-wrap: normal } td, th { padding: .25rem .8rem; text-align: left; vertical-align: top }
td { border-top: 1px solid var(--line) }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre, code { background: var(--soft); border-radius: 4px } pre { white-space: pre-wrap; padding: .8rem } code { padding: 0 .25rem }
small { color: var(--faint) } mark { background: var(--mark); color: inherit } img { max-width: 100%; background: #fff }
.good { color: var(--good) } .bad { color: var(--bad) } .warn { color: var(--warn) }
.loud { background: var(--loud); border-left: .4rem solid var(--bad); padding: .6rem 1rem }
.bar { position: relative; width: 16rem; height: 1.1rem; margin: .2rem 0; background: var(--soft) }
.bar i, .bar b { position: absolute } .bar i { top: .45rem; height: .2rem; background: var(--bar) }
.bar b { top: .2rem; width: .25rem; height: .7rem; background: var(--point) }
@media (max-width: 40rem) { body { margin: 1rem auto; padding: 0 .7rem } td, th { padding: .2rem .5rem } .bar { width: 8rem } }
"""


class Markup(str):
    """HTML; every other text is escaped where it enters a page."""


def inside(*parts: Any) -> Markup:
    """Parts one after the other, those that are no Markup escaped."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts))


def element(tag: str, *parts: Any, kind: str = "", **attributes: Any) -> Markup:
    """An element around its parts.

    Args:
        kind: its class, one of those that the style knows: good, bad, warn, loud, n (a number), wide, bar.
        attributes: others by their names; those that are empty or None are left out.
    """
    given = {"class": kind, **attributes}
    words = "".join(f' {name}="{html.escape(str(value))}"' for name, value in given.items() if value)
    return Markup(f"<{tag}{words}>{inside(*parts)}</{tag}>")


def heading(text: str) -> Markup:
    """The heading of a part of a page."""
    return element("h2", text)


def paragraph(*parts: Any, kind: str = "") -> Markup:
    """A paragraph; `kind` as in `element`."""
    return element("p", *parts, kind=kind)


def listed(items: Iterable[Any]) -> Markup:
    """A list with a bullet before each item."""
    return element("ul", *(element("li", item) for item in items))


def details(head: str, *parts: Any) -> Markup:
    """What is shown once its head is clicked."""
    return element("details", element("summary", head), *parts)


def table(names: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Collection[int] = ()) -> Markup:
    """A table, which scrolls by itself where the screen is narrower.

    Args:
        names: of the columns; all empty: no head.
        rows: cells; the last one of a short row takes the columns that are left.
        numbers: columns that are set to the right.
    """

    def line(tag: str, row: Sequence[Any]) -> Markup:
        spans = [1] * (len(row) - 1) + [1 + len(names) - len(row)]
        kinds = ["n" if place in numbers and span == 1 else "" for place, span in enumerate(spans)]
        return element(
            "tr",
            *(element(tag, cell, kind=kind, colspan=span if span > 1 else "") for cell, kind, span in zip(row, kinds, spans)),
        )

    head = [line("th", names)] if any(names) else []
    return element("div", element("table", *head, *(line("td", row) for row in rows)), kind="wide")


def interval(low: float, high: float, value: float) -> Markup:
    """A bar from 0 to 1 with an interval and the value in it."""
    band = element("i", style=f"left:{low:.2%};width:{high - low:.2%}")
    return element("div", band, element("b", style=f"left:{value:.2%}"), kind="bar")


def picture(png: bytes, words: str) -> Markup:
    """A PNG picture within the page; `words` say what it shows."""
    return Markup(f'<img alt="{html.escape(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')


def page(title: str, *parts: Any) -> str:
    """A whole page with its title as heading."""
    head = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    top = f"{head}<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
    body = "\n".join(inside(part) for part in (element("h1", title), *parts))
    return f"{top}\n{body}\n</body></html>\n"
