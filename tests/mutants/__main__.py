"""Plant each fault of the list in a scratch copy and show the test that sees it: `python -m tests.mutants [NAME or ROOM ...]`.

Exit code 0 where every fault was seen, 1 where one survived or could not be judged, 2 where the list does not fit the code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.mutants.catalogue import REPOSITORY, SOURCE, Mutant, problems_of, read_mutants
from tests.mutants.mother import THIRD_PARTIES
from tests.mutants.scratch import Outcome, Scratch

RESULTS = REPOSITORY / "build" / "mutants.jsonl"


@dataclass(frozen=True)
class Verdict:
    """What became of one fault: "killed", "survived" or "not judged"; by which test, or why not; seconds of the run."""

    room: str
    name: str
    verdict: str
    by: str
    seconds: float


class Known:
    """What earlier runs found, one JSON line each; a finding counts while the code and the tests that it rests on are the same."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self.lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.found: dict[str, dict[str, Any]] = {}
        for line in lines:
            try:
                item = json.loads(line)
                self.found[item["digest"]] = item
            except (ValueError, KeyError):  # the line that an interrupted run was writing
                continue

    def add(self, digest: str, **values: Any) -> None:
        """Keep a finding."""
        item = {"digest": digest, **values}
        with self.lock, open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(item, ensure_ascii=False) + "\n")
            self.found[digest] = item


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("chosen", nargs="*", metavar="NAME or ROOM", help="faults or whole rooms; all without any")
    parser.add_argument("--list", action="store_true", help="show the faults and plant none")
    parser.add_argument("--jobs", type=int, default=1, help="scratch copies that are worked on side by side")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that the tests of one fault may take")
    parser.add_argument(
        "--resume", action="store_true", help="keep what an earlier run found, as far as code and tests are the same"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where findings are kept, a JSON line each")
    args = parser.parse_args(argv)
    try:
        mutants = chosen(read_mutants(), args.chosen)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    problems = [problem for mutant in mutants for problem in problems_of(mutant)]
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 2
    if args.list:
        for mutant in mutants:
            print(f"{mutant.room}/{mutant.name}  {mutant.path}\n    {mutant.seen}\n    {' '.join(mutant.tests)}")
        print(f"{len(mutants)} faults")
        return 0
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        judge = Judge(REPOSITORY, Known(args.results, args.resume), args.limit, THIRD_PARTIES)
        verdicts = judge.all(mutants, Path(directory), args.jobs)
    return show(verdicts)


def chosen(mutants: list[Mutant], words: list[str]) -> list[Mutant]:
    """The faults that the words name, each a fault or a room; all where there is no word. Raises ValueError for another word."""
    known = {mutant.name for mutant in mutants} | {mutant.room for mutant in mutants}
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(f"no fault and no room has the name {', '.join(unknown)}; --list shows them")
    return [mutant for mutant in mutants if not words or mutant.name in words or mutant.room in words]


@dataclass(frozen=True)
class Judge:
    """Runs the tests that faults name.

    Args:
        root: the tree whose copies get the faults.
        known: where findings are looked up and kept.
        limit: seconds that the tests of one fault may take.
        preload: packages that are imported once for all runs.
    """

    root: Path
    known: Known
    limit: float = 300.0
    preload: Sequence[str] = ()

    def all(self, mutants: list[Mutant], directory: Path, jobs: int = 1) -> list[Verdict]:
        """Run the named tests on the code as it is, then each fault's on the code with the fault, new ones first.

        Args:
            directory: for the scratch copies, `jobs` of them.
        """
        copies: queue.SimpleQueue[Scratch] = queue.SimpleQueue()
        made = [Scratch(self.root, directory / str(number), self.preload) for number in range(jobs)]
        for copy in made:
            copies.put(copy)

        def with_copy(work: Callable[[Scratch, Any], Any], item: Any) -> Any:
            copy = copies.get()
            try:
                return work(copy, item)
            finally:
                copies.put(copy)

        killed = {item["verdict"]["name"] for item in self.known.found.values() if "verdict" in item}
        mutants = sorted(mutants, key=lambda mutant: mutant.name in killed)  # so that a run cut short has judged the new ones
        rooms: dict[str, list[str]] = {}
        for mutant in mutants:
            if self.digest(mutant) not in self.known.found:
                tests = rooms.setdefault(mutant.room, [])
                tests += [test for test in mutant.tests if not self.passes(test) and test not in tests]
        with ThreadPoolExecutor(jobs) as workers:
            try:
                list(workers.map(lambda tests: with_copy(self.unchanged, tests), [tests for tests in rooms.values() if tests]))
                return list(workers.map(lambda mutant: with_copy(self.one, mutant), mutants))
            except BaseException:  # Ctrl-C and SIGTERM: what waits is given up, what runs is in sessions of its own
                workers.shutdown(wait=False, cancel_futures=True)
                for copy in made:
                    copy.stop()
                raise

    def unchanged(self, copy: Scratch, tests: list[str]) -> None:
        """Run the tests of a room once without a fault; a fault is judged by tests alone that passed here."""
        outcome = copy.pytest(tests, self.limit * 4, first_failure=False)
        for test in tests:
            passed = [name for name in outcome.passed if covers(test, name)]
            failed = [name for name in outcome.failed if covers(test, name)]
            if outcome.code in (0, 1) and passed and not failed:
                self.known.add(self.test_digest(test), test=test, passed=len(passed))
            else:
                print(f"without any fault, {test}: {failed or 'nothing passed'}\n{outcome.tail}", file=sys.stderr, flush=True)

    def one(self, copy: Scratch, mutant: Mutant) -> Verdict:
        """Whether one of its tests sees a fault."""
        digest = self.digest(mutant)
        if digest in self.known.found:
            return Verdict(**self.known.found[digest]["verdict"])
        unproven = [test for test in mutant.tests if not self.passes(test)]
        if unproven:
            verdict = Verdict(mutant.room, mutant.name, "not judged", f"does not pass without the fault: {unproven[0]}", 0.0)
        else:
            with copy.planted(mutant):
                outcome = copy.pytest(list(mutant.tests), self.limit, first_failure=True)
            verdict = Verdict(mutant.room, mutant.name, *what_it_means(outcome, self.limit), round(outcome.seconds, 1))
            if verdict.verdict == "killed":  # others are tried again with --resume: a new test may see them
                self.known.add(digest, verdict=asdict(verdict))
        print(f"{verdict.verdict:<10} {mutant.room}/{mutant.name}: {verdict.by} ({verdict.seconds:.0f} s)", flush=True)
        return verdict

    def passes(self, test: str) -> bool:
        """Whether a test is known to pass without any fault."""
        return self.test_digest(test) in self.known.found

    def digest(self, mutant: Mutant) -> str:
        """Changes with the fault, the source, and what its tests are."""
        return _digest([str(mutant.path), json.dumps(mutant.edits), *map(self.test_digest, mutant.tests)])

    def test_digest(self, test: str) -> str:
        """Changes with the source, the test's file, and what tests share."""
        return _digest([test, _file_digest(self.root / test.partition("::")[0]), _shared_digest(self.root)])


def what_it_means(outcome: Outcome, limit: float) -> tuple[str, str]:
    """(verdict, by which test or why) of a run with a fault. Code that cannot be imported is no fault that a test saw."""
    if outcome.code is None:
        return "not judged", f"no end within {limit:.0f} s: shorten its tests, or raise --limit"
    if outcome.code == 1 and outcome.failed:
        return "killed", outcome.failed[0]
    if outcome.code == 0 and outcome.passed:
        return "survived", f"{len(outcome.passed)} tests passed"
    return "not judged", f"pytest ended with {outcome.code}: {outcome.tail}"


def covers(test: str, name: str) -> bool:
    """Whether a test that ran is one of those that a node id names: itself, of its function, or of its file."""
    return name == test or name.startswith((f"{test}[", f"{test}::"))


def show(verdicts: list[Verdict]) -> int:
    """Print the table, what was not seen last; returns the exit code."""
    width = max((len(f"{verdict.room}/{verdict.name}") for verdict in verdicts), default=0)
    print(f"\n{'fault':<{width}}  {'s':>5}  killed by")
    for verdict in verdicts:
        if verdict.verdict == "killed":
            print(f"{verdict.room + '/' + verdict.name:<{width}}  {verdict.seconds:>5.0f}  {verdict.by}")
    open_ones = [verdict for verdict in verdicts if verdict.verdict != "killed"]
    for verdict in open_ones:
        print(f"{verdict.verdict.upper()}: {verdict.room}/{verdict.name}: {verdict.by}")
    print(f"{len(verdicts) - len(open_ones)} of {len(verdicts)} faults killed")
    return 1 if open_ones else 0


@lru_cache
def _shared_digest(root: Path) -> str:
    """Of the whole source, and of all in tests that is neither a test nor part of this command."""
    source = (path for path in (root / SOURCE).rglob("*") if path.suffix in (".py", ".json", ".jsonl"))
    shared = (
        path
        for path in (root / "tests").rglob("*")
        if path.suffix in (".py", ".json")
        and not path.name.startswith("test_")
        and "mutants" not in path.relative_to(root).parts
    )
    return _digest(part for path in sorted([*source, *shared]) for part in (str(path.relative_to(root)), _file_digest(path)))


@lru_cache
def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
