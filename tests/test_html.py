"""The kit for HTML pages: everything is escaped once, nothing is fetched, tables scroll by themselves, and each page is well-formed."""

from __future__ import annotations

from html.parser import HTMLParser

from megaswift.report import html

NASTY = "<script>alert(\"1\")</script> & 'x'"
VOID = ("meta", "img", "br")


class Reader(HTMLParser):
    """Reads a page strictly: every element is closed by its own tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def read(page: str) -> Reader:
    """What stands in a page, which must be whole, without script, and fetch nothing."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    tags = [tag for tag, _ in reader.seen]
    assert not reader.open and page.startswith("<!doctype html>\n")
    assert not {"script", "link", "iframe", "object"} & set(tags) and "http" not in page and "@import" not in page
    assert all(str(attributes["src"]).startswith("data:") for tag, attributes in reader.seen if tag == "img")
    assert ("html", {"lang": "en"}) in reader.seen and tags.count("title") == tags.count("h1") == tags.count("style") == 1
    assert any(attributes.get("name") == "viewport" for _, attributes in reader.seen)
    style = next(text for text in reader.texts if "{" in text)
    assert "prefers-color-scheme: dark" in style and "max-width: 40rem" in style
    wide = [attributes for tag, attributes in reader.seen if tag == "div" and attributes.get("class") == "wide"]
    assert len(wide) == tags.count("table")
    return reader


def test_every_text_is_escaped_once_wherever_it_stands() -> None:
    parts = [
        html.heading(NASTY), html.paragraph(NASTY, kind="loud"), html.listed([NASTY]), html.details(NASTY, NASTY), NASTY,
        html.table([NASTY, "n"], [[NASTY, html.element("code", NASTY)]], {1}), html.picture(b"\x89PNG", NASTY),
    ]  # fmt: skip
    reader = read(html.page(NASTY, *parts))
    assert reader.texts.count(NASTY) == 11  # title, heading 1 and 2, paragraph, item, summary, details, bare, three cells
    assert [attributes["alt"] for tag, attributes in reader.seen if tag == "img"] == [NASTY]


def test_tables() -> None:
    made = html.table(["a", "b", "c"], [["x", 1, 2], ["y", "both"]], {1, 2})
    assert '<td>x</td><td class="n">1</td><td class="n">2</td>' in made and '<th class="n">b</th>' in made
    assert '<td>y</td><td colspan="2">both</td>' in made
    assert "<th>" not in html.table(["", ""], [["x", "y"]])


def test_an_interval_is_drawn_to_scale() -> None:
    assert html.interval(0.25, 0.75, 0.5) == (
        '<div class="bar"><i style="left:25.00%;width:50.00%"></i><b style="left:50.00%"></b></div>'
    )
