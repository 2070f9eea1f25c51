"""What happened in each fault, and figures, collected while the tests run; `make faults` writes them into docs/reliability.md.

Rows are kept in build/faults.jsonl, so that tests that failed on a busy machine can be run again by themselves:
the last row of a fault counts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENT, ROWS = ROOT / "docs" / "reliability.md", ROOT / "build" / "faults.jsonl"
TABLE = os.environ.get("MEGASWIFT_FAULTS_TABLE") == "true"
HEADS = {"figures": ("what", "measured"), "faults": ("fault", "the run", "afterwards")}


def add(fault: str, what: str, after: str) -> None:
    """One line: the fault, how the run ended, what was found afterwards."""
    _append("faults", fault, what, after)


def figure(name: str, value: str) -> None:
    """One measured figure with its unit."""
    _append("figures", name, value)


def tested(name: str, outcome: str, seconds: float, reason: str = "") -> None:
    """One test: passed, failed or skipped."""
    _append("tests", name, outcome, seconds, reason)


def _append(kind: str, *cells: str | float) -> None:
    if TABLE:
        ROWS.parent.mkdir(exist_ok=True)
        with ROWS.open("a", encoding="utf-8") as file:  # several processes append whole lines
            file.write(json.dumps([kind, *cells]) + "\n")


def write() -> None:
    """Put the tables between their marks; one without rows stays as it is."""
    found: dict[str, dict[str, tuple[str, ...]]] = {"figures": {}, "faults": {}, "tests": {}}
    for line in ROWS.read_text(encoding="utf-8").splitlines():
        kind, *cells = json.loads(line)
        found[kind][cells[0]] = tuple(cells)
    text = DOCUMENT.read_text(encoding="utf-8")
    text = _put(text, "figures", sorted(found["figures"].values()), "")
    rows = sorted(found["faults"].values())
    rows += [
        (name, "**failed**" if outcome == "failed" else "not tried here", reason)
        for name, outcome, _, reason in sorted(found["tests"].values())
        if outcome != "passed"
    ]
    DOCUMENT.write_text(_put(text, "faults", rows, _summary(found["tests"])), encoding="utf-8")


def _summary(tests: dict[str, tuple[str, ...]]) -> str:
    outcomes = [outcome for _, outcome, *_ in tests.values()]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped"))
    minutes = sum(float(seconds) for _, _, seconds, _ in tests.values()) / 60
    return f"{len(tests)} tests, {minutes:.0f} minutes one after the other: {counts}."


def _put(text: str, name: str, rows: list[tuple[str, ...]], below: str) -> str:
    if not rows:
        return text
    begin, end = f"<!-- {name}: made by make faults -->", f"<!-- /{name} -->"
    before, rest = text.split(begin)
    lines = [HEADS[name], ("---",) * len(HEADS[name]), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return before + begin + "\n" + table + (f"\n{below}\n" if below else "") + end + rest.split(end)[1]
