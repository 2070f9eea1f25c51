"""What happened in each fault, and figures, collected while the tests run; `make faults` writes them into docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
_faults: list[tuple[str, ...]] = []
_figures: list[tuple[str, ...]] = []


def add(fault: str, what: str, after: str) -> None:
    """One line: the fault, how the run ended, what was found afterwards."""
    _faults.append((fault, what, after))


def figure(name: str, value: str) -> None:
    """One measured figure with its unit."""
    _figures.append((name, value))


def write() -> None:
    """Put both tables between their marks; one without rows stays as it is."""
    text = DOCUMENT.read_text(encoding="utf-8")
    text = _put(text, "figures", ("what", "measured"), _figures)
    DOCUMENT.write_text(_put(text, "faults", ("point, fault, rank", "the run", "afterwards"), _faults), encoding="utf-8")


def _put(text: str, name: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return text
    begin, end = f"<!-- {name}: made by make faults -->", f"<!-- /{name} -->"
    before, rest = text.split(begin)
    lines = [head, ("---",) * len(head), *sorted(set(rows))]
    return before + begin + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + end + rest.split(end)[1]
