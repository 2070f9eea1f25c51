"""docs/reliability.md prints the messages that the code prints, and its exit codes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from megaswift.errors import ExitCode

ROOT = Path(__file__).parent.parent.parent
TABLE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split("## What happens when")[1].split("\n## ")[0]


def patterns() -> list[str]:
    """Every text of the sources as a pattern; a place that is filled in matches anything."""
    found = []
    for path in (ROOT / "src" / "megaswift").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(".*".join(re.escape(part.value) for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.escape(node.value))
    return [pattern for pattern in found if len(pattern) > 15]


def test_messages_are_real() -> None:
    known = patterns()
    messages = re.findall(r"`error: ([^`]+)`", TABLE)
    assert len(messages) > 15
    for message in messages:
        assert any(re.fullmatch(f".*{pattern}.*", message, re.DOTALL) for pattern in known), message


def test_exit_codes_are_real() -> None:
    codes = {int(row.rsplit("|", 2)[1]) for row in TABLE.splitlines() if re.search(r"`error: .*\| \d+ \|$", row)}
    assert codes <= {int(code) for code in ExitCode}
    assert {2, 3, 4, 5, 75} <= codes


def test_the_named_tests_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split("## Where it is tested")[1].split("\n## ")[0]
    named = re.findall(r"`([a-z_/]+(?:\.py|/))`", text)
    assert len(named) > 20
    assert [word for word in named if not (ROOT / "tests" / word).exists()] == []
    files = {path.name for path in (ROOT / "tests" / "faults").glob("test_*.py")} - {"test_document.py", "test_figures.py"}
    assert files <= {Path(word).name for word in named}, "a file of the fault suite is not in the table"
