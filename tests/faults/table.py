"""What happened in each fault, collected while the tests run; `make faults` writes it into docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: made by make faults -->", "<!-- /faults -->"
_rows: list[tuple[str, str, str]] = []


def add(fault: str, what: str, after: str) -> None:
    """One line: the fault, how the run ended, what was found afterwards."""
    _rows.append((fault, what, after))


def write() -> None:
    """Put the table between its marks."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    lines = ["| point, fault, rank | the run | afterwards |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in sorted(set(_rows))]
    DOCUMENT.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after, encoding="utf-8")
