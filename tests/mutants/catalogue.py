"""The list of planted faults: one YAML file a room under `rooms/`, each fault a text that stands once and what replaces it.

models/rules.py:                  # the file, below src/megaswift: stated once for all of its faults in this room
  - name: gate-and-up-change-places # unique in all rooms
    old: torch.cat(parts, 0)        # stands exactly once in the file; `edits: [{old, new}, ...]` where one change is not enough
    new: torch.cat(parts[::-1], 0)
    tests: [convert/test_proof.py::test_right_conversions_pass]  # below tests; one of these must fail
    seen: The converted model computes other logits.             # what a user would meet, or not notice
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
SOURCE = Path("src") / "megaswift"


@dataclass(frozen=True)
class Mutant:
    """One planted fault.

    Attributes:
        room: stem of the YAML file that it stands in.
        path: the source file, from the repository's root.
        edits: (old text, new text), each old text found exactly once in the file as the edits before it left it.
        tests: pytest node ids from the repository's root, one of which must fail.
        seen: one sentence on what a user would meet.
    """

    room: str
    name: str
    path: Path
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]
    seen: str

    def planted(self, text: str) -> str:
        """The file's text with the fault in it. Raises ValueError where an old text does not stand exactly once."""
        for old, new in self.edits:
            count = text.count(old)
            if count != 1:
                raise ValueError(f"{self.room}/{self.name}: {self.path} has this text {count} times, not once: {old!r}")
            text = text.replace(old, new)
        return text


def read_mutants(directory: Path = HERE / "rooms") -> list[Mutant]:
    """All faults, by room. Raises ValueError for an entry that is not whole, and for a name that stands twice."""
    mutants = []
    for room in sorted(directory.glob("*.yaml")):
        for file, entries in yaml.safe_load(room.read_text(encoding="utf-8")).items():
            mutants += [_mutant(room.stem, file, entry) for entry in entries]
    names = [mutant.name for mutant in mutants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names that stand twice: {', '.join(twice)}")
    return mutants


def _mutant(room: str, file: str, entry: dict[str, Any]) -> Mutant:
    fields = {"name", "tests", "seen"} | ({"edits"} if "edits" in entry else {"old", "new"})
    if set(entry) != fields:
        raise ValueError(f"{room}: {entry.get('name', entry)} has the fields {sorted(entry)}, not {sorted(fields)}")
    edits = tuple((edit["old"], edit["new"]) for edit in entry.get("edits", [entry]))
    tests = tuple(f"tests/{test}" for test in entry["tests"])
    return Mutant(room, entry["name"], SOURCE / file, edits, tests, entry["seen"])


def problems_of(mutant: Mutant, root: Path = REPOSITORY) -> list[str]:
    """What is wrong with an entry as the code stands: its text moved, it changes nothing, a test that is not there."""
    found = []
    try:
        text = (root / mutant.path).read_text(encoding="utf-8")
        changed = mutant.planted(text)
        if ast.dump(ast.parse(changed)) == _tree(text):
            found.append(f"{mutant.room}/{mutant.name}: it changes no code")
    except (OSError, ValueError, SyntaxError) as error:
        found.append(f"{mutant.room}/{mutant.name}: {error}")
    for test in mutant.tests:
        file, _, function = test.partition("::")
        if not (root / file).is_file():
            found.append(f"{mutant.room}/{mutant.name}: there is no file {file}")
        elif function and function.partition("[")[0] not in _functions(root / file):
            found.append(f"{mutant.room}/{mutant.name}: {file} has no test {function}")
    if not mutant.tests:
        found.append(f"{mutant.room}/{mutant.name}: no test is named")
    return found


@lru_cache(maxsize=8)
def _tree(text: str) -> str:
    return ast.dump(ast.parse(text))


@lru_cache
def _functions(path: Path) -> frozenset[str]:
    return frozenset(
        node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    )
