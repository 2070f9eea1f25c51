"""The list of planted faults fits the code as it stands, and the command that plants them tells what it finds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.__main__ import Judge, Known, chosen, show
from tests.mutants.catalogue import Mutant, problems_of, read_mutants

ROOMS = 12
FAULTS = 200


def test_each_fault_stands_in_the_code_and_its_tests_exist() -> None:
    mutants = read_mutants()
    assert [problem for mutant in mutants for problem in problems_of(mutant)] == []
    assert len(mutants) >= FAULTS and len({mutant.room for mutant in mutants}) >= ROOMS
    assert all(mutant.seen.endswith(".") for mutant in mutants)


def fault(name: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("room", name, Path("src/megaswift/toy.py"), ((old, new),), tests or ("tests/test_toy.py",), "Something.")


def test_an_entry_that_does_not_fit_is_named(tree: Path) -> None:
    assert problems_of(fault("good", "a + b", "a - b"), tree) == []
    for mutant, problem in (
        (fault("moved", "a * b", "a"), "0 times, not once: 'a * b'"),
        (fault("twice", "def ", "def _"), "2 times, not once"),
        (fault("nothing", "a + b", "(a + b)"), "it changes no code"),
        (fault("broken", "a + b", "a +"), "invalid syntax"),
        (fault("file", "a + b", "a", "tests/test_gone.py"), "there is no file tests/test_gone.py"),
        (fault("test", "a + b", "a", "tests/test_toy.py::test_gone[1]"), "has no test test_gone"),
    ):
        (found,) = problems_of(mutant, tree)
        assert problem in found and f"room/{mutant.name}" in found


def test_names_and_fields(tmp_path: Path) -> None:
    entry = "toy.py:\n  - {name: one, old: a, new: b, tests: [test_toy.py], seen: Something.}\n"
    (tmp_path / "a.yaml").write_text(entry)
    (one,) = read_mutants(tmp_path)
    assert one.edits == (("a", "b"),) and one.tests == ("tests/test_toy.py",) and one.path == Path("src/megaswift/toy.py")
    assert chosen([one], ["a"]) == chosen([one], ["one"]) == chosen([one], []) == [one]
    with pytest.raises(ValueError, match="two"):
        chosen([one], ["two"])
    (tmp_path / "b.yaml").write_text(entry)
    with pytest.raises(ValueError, match="twice: one"):
        read_mutants(tmp_path)
    (tmp_path / "b.yaml").write_text(entry.replace("seen: Something.", "sene: Something."))
    with pytest.raises(ValueError, match="sene"):
        read_mutants(tmp_path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tiny product with tests of its own, one of which leaves a process behind."""
    root = tmp_path / "tree"
    files = {
        "src/megaswift/__init__.py": "",
        "src/megaswift/toy.py": "def add(a, b):\n    return a + b\n\n\ndef unseen():\n    return 1\n",
        "tests/__init__.py": "",
        "tests/test_ranks.py": """import multiprocessing
import os
from megaswift.toy import add

def answer(pipe):  # as tests.ranks.RankPool does it
    pipe.send((add(1, 1), os.getsid(0)))

def test_forks_of_a_server():
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs,))
    process.start()
    assert ours.poll(60) and ours.recv() == (2, os.getsid(0))
    process.join()
    assert process.exitcode == 0
""",
        "tests/test_toy.py": f"""import subprocess
from pathlib import Path
from megaswift.toy import add

def test_zero():
    assert add(1, 0) == 1

def test_two():
    process = subprocess.Popen(["sleep", "100"], start_new_session=True)
    Path({str(tmp_path / "left")!r}).write_text(str(process.pid))
    assert add(1, 1) == 2

def test_wrong():
    assert add(1, 1) == 3
""",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def ended(process: str) -> bool:
    """Whether a process is gone, or waits for its parent alone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def test_what_is_killed_survives_and_cannot_be_judged(tree: Path, tmp_path: Path, capfd: Any) -> None:
    good = ("tests/test_toy.py::test_zero", "tests/test_toy.py::test_two")
    mutants = [
        fault("seen", "a + b", "a - b", *good),
        fault("unseen", "return 1", "return 2", *good),
        fault("no-import", "def add(", "def subtract(", *good),
        fault("wrong-test", "a + b", "a - b", *good, "tests/test_toy.py::test_wrong"),
    ]
    known = Known(tmp_path / "found.jsonl", resume=False)
    verdicts = Judge(tree, known).all(mutants, tmp_path / "copies")
    assert [verdict.verdict for verdict in verdicts] == ["killed", "survived", *["not judged"] * 2]
    assert verdicts[0].by == "tests/test_toy.py::test_two" and verdicts[1].by == "2 tests passed"
    assert "ImportError" in verdicts[2].by and "test_wrong" in verdicts[3].by
    assert show(verdicts) == 1 and show(verdicts[:1]) == 0
    out = capfd.readouterr().out
    assert "SURVIVED: room/unseen" in out and "1 of 4 faults killed" in out and "1 of 1 faults killed" in out
    assert ended((tmp_path / "left").read_text())
    assert (tree / "src/megaswift/toy.py").read_text().count("a + b") == 1

    ranks = fault("in-a-rank", "a + b", "a - b", "tests/test_ranks.py")
    with tempfile.TemporaryDirectory() as short:  # the name of a socket has a hundred letters at most
        (verdict,) = Judge(tree, known).all([ranks], Path(short) / "ranks")
    assert (verdict.verdict, verdict.by) == ("killed", "tests/test_ranks.py::test_forks_of_a_server")

    endless = fault("no-end", "return a + b", "while True:\n        pass", *good)
    (verdict,) = Judge(tree, known, limit=2).all([endless], tmp_path / "endless")
    assert (verdict.verdict, verdict.by[:18]) == ("not judged", "no end within 2 s:")

    (tmp_path / "left").unlink()
    again = Judge(tree, Known(tmp_path / "found.jsonl", resume=True)).all(mutants[:1], tmp_path / "again")
    assert again == verdicts[:1] and not (tmp_path / "left").exists()  # nothing was run
