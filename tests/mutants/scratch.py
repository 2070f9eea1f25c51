"""A copy of the tree in which faults are planted one at a time, and pytest runs in it that leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from tests.mutants import mother
from tests.mutants.catalogue import Mutant

COPIED = ("src", "tests", "docs", "examples", "benchmarks")  # and every file beside them: tests read the documents, too
MARK = "MEGASWIFT_MUTANTS_RUN"  # in the environment of a run and of all that it starts


@dataclass
class Outcome:
    """What a run of pytest came to.

    Attributes:
        code: its exit code; None where it was ended at the time limit.
        passed, failed: node ids; errors of fixtures count as failures.
        seconds: of the whole run.
        tail: the last lines of its output.
    """

    code: int | None
    seconds: float
    tail: str
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Scratch:
    """One copy of the tree.

    Args:
        root: the tree.
        directory: an empty directory for the copy.
        preload: packages that are imported once for all runs.
    """

    def __init__(self, root: Path, directory: Path, preload: Sequence[str] = ()) -> None:
        self.directory, self.mark, self.session, self.preload = directory, "", 0, preload
        self.orders: Connection | None = None
        self.tree = directory / "tree"
        self.tree.mkdir(parents=True)
        unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
        for path in root.iterdir():
            if path.name in COPIED:
                shutil.copytree(path, self.tree / path.name, ignore=unwanted)
            elif path.is_file() and path.name != ".git":
                shutil.copy2(path, self.tree / path.name)
        code = "import megaswift, tests; print(megaswift.__file__, tests.__file__, sep='\\n')"
        places = subprocess.run(
            [sys.executable, "-c", code], cwd=self.tree, env=self._environment(), capture_output=True, text=True, check=True
        ).stdout.splitlines()
        if not all(Path(place).is_relative_to(self.tree) for place in places):
            raise RuntimeError(f"the copy is not what is imported there, but {places}")

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """The tree with one fault in it."""
        path = self.tree / mutant.path
        text = path.read_text(encoding="utf-8")
        try:
            self._write(path, mutant.planted(text))
            yield
        finally:
            self._write(path, text)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):  # told by second and size alone, it would live on
            compiled.unlink()

    def pytest(self, tests: list[str], limit: float, first_failure: bool) -> Outcome:
        """Run tests in the copy, with a cache and a temporary directory of their own.

        Args:
            limit: seconds after which the run is ended.
            first_failure: whether the first failure ends it.
        """
        own = self.directory / "run"
        own.mkdir()
        report = own / "report.xml"
        mark = self.mark = secrets.token_hex(8)
        words = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
        words += ["-x"] if first_failure else []
        environment = self._environment() | {MARK: mark, "TMPDIR": str(own), "MEGASWIFT_CACHE": str(own / "cache")}
        began = time.monotonic()
        try:
            orders = self._mother()
            orders.send(([*words, *tests], environment, str(own / "output")))
            self.session = orders.recv()
            ended = orders.poll(limit)
            seconds = time.monotonic() - began
            _end_all(mark, self.session)
            code = orders.recv()
            output = own / "output"
            tail = (
                "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]) if output.is_file() else ""
            )
            outcome = Outcome(code if ended else None, seconds, tail)
            if ended and report.is_file():
                _read_report(report, outcome, self.tree)
            return outcome
        finally:
            _end_all(mark, self.session)
            shutil.rmtree(own, ignore_errors=True)

    def _mother(self) -> Connection:
        """The way to the process that forks the runs; it ends when this one does."""
        if self.orders is None:
            self.orders, theirs = Pipe()
            words = [sys.executable, mother.__file__, str(theirs.fileno()), *self.preload]
            subprocess.Popen(
                words, cwd=self.tree, env=self._environment(), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            theirs.close()
        return self.orders

    def stop(self) -> None:
        """End what runs in the copy, from another thread."""
        if self.mark:
            _end_all(self.mark, self.session)

    def _environment(self) -> dict[str, str]:
        """Machine and settings of `make test`; nothing that would let a test find another tree."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MEGASWIFT_"))}
        return own | {"PYTHONPATH": str(self.tree / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _read_report(report: Path, outcome: Outcome, tree: Path) -> None:
    """Fill in which tests passed and failed, from pytest's JUnit file."""
    for case in ElementTree.parse(report).iter("testcase"):
        place = case.get("classname", "").replace(".", "/")
        name = f"{place}.py::{case.get('name')}" if (tree / f"{place}.py").is_file() else str(case.get("name"))
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(name)
        elif case.find("skipped") is None:
            outcome.passed.append(name)


def _end_all(mark: str, session: int) -> None:
    """End whatever a run left: planted faults of launching and signals leave processes in groups of their own.

    Args:
        mark: what its processes have in their environment, unless they are forks that never became another program.
        session: theirs, where they made none of their own; 0 where the run did not begin.
    """
    wanted = f"{MARK}={mark}".encode()
    for _ in range(20):
        left = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _is_of(path, wanted, session)]
        if not left:
            return
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.1)


def _is_of(process: Path, mark: bytes, session: int) -> bool:
    """Whether a process is alive and has the mark in its environment, or is of the session."""
    try:
        state, _, _, own = (process / "stat").read_text(errors="replace").rpartition(") ")[2].split()[:4]
        if state == "Z":
            return False  # ended, and waits for its parent alone
        return int(own) == session != 0 or mark in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
