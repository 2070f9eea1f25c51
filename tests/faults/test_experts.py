"""A run whose experts lie on two processes, killed and failing at its weak points: nothing is lost, and it goes on to the same end."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaswift.store.manifest import quick_check
from megaswift.store.paths import candidates
from tests.faults import table
from tests.faults.conftest import make_base
from tests.faults.harness import GONE_S, FaultRun
from tests.training import tiny_start, write_rows

FAULTS = ("loop.step:kill:1", "save.part_written:kill:1", "save.writing:raise:1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, FaultRun]:
    """A run of four steps with experts on two processes, stopped after the second; and the same without a fault."""
    root = tmp_path_factory.mktemp("experts")
    start = tiny_start(root, "qwen3_moe", num_hidden_layers=2), write_rows(root / "rows.jsonl")
    base = make_base(start, root / "base", ep=2)
    straight = FaultRun(base, root / "straight")
    ended = straight.run()
    assert ended.codes == [0, 0], ended.output
    return base, straight


@pytest.mark.parametrize("fault", FAULTS)
def test_experts_survive(fault: str, runs: tuple[object, FaultRun], tmp_path: Path) -> None:
    base, straight = runs
    case = FaultRun(base, tmp_path)  # type: ignore[arg-type]
    ended = case.run(fault)
    assert ended.seconds < GONE_S and any(ended.codes), ended
    assert [quick_check(path) for path in candidates(case.run_dir)] == [None] * len(candidates(case.run_dir))
    newest = case.newest()
    again = case.resume()
    assert again.codes == [0, 0], again.output
    assert case.newest() == 4 and case.losses() == straight.losses()
    table.add(
        f"experts at ep 2: {fault.replace(':', ', ')}",
        f"ended after {ended.seconds:.0f} s, exit codes {ended.codes[0]} and {ended.codes[1]}",
        f"went on from step {newest}; losses equal",
    )
