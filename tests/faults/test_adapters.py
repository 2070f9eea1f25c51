"""A run with an adapter, dropout and all: ranks die while it saves and steps, files are torn, and it goes on to the same end."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaswift.run.spec import Run
from megaswift.store.manifest import quick_check
from megaswift.store.paths import candidates
from tests.faults import table
from tests.faults.conftest import ALL, make_base
from tests.faults.harness import GONE_S, FaultRun

CASES = ["save.part_written:kill:1", "save.before_rename:kill:0", "loop.step:kill:1"] if ALL else ["save.part_written:kill:1"]


@pytest.fixture(scope="module")
def adapted(start: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_base(start, tmp_path_factory.mktemp("adapted"), tp=2, sft_type="lora", lora_rank=4, lora_dropout=0.2)


@pytest.fixture(scope="module")
def end(adapted: Run, tmp_path_factory: pytest.TempPathFactory) -> FaultRun:
    case = FaultRun(adapted, tmp_path_factory.mktemp("end"))
    ended = case.run()
    assert ended.codes == [0, 0], ended.output
    return case


@pytest.mark.parametrize("fault", CASES)
def test_nothing_of_an_adapter_is_lost(fault: str, adapted: Run, end: FaultRun, tmp_path: Path) -> None:
    case = FaultRun(adapted, tmp_path)
    ended = case.run(fault)
    assert ended.seconds < GONE_S and ended.codes[int(fault.split(":")[2])] == -9, ended
    assert [quick_check(path) for path in candidates(case.run_dir)] == [None] * len(candidates(case.run_dir))
    newest = case.newest()
    again = case.resume()
    assert again.codes == [0, 0], again.output
    assert case.newest() == 4 and case.losses() == end.losses()
    table.add(
        f"an adapter's run: {fault.replace(':', ', ')}",
        f"exit codes {ended.codes[0]} and {ended.codes[1]}",
        f"went on from step {newest}; losses equal",
    )


def test_a_torn_save_of_an_adapter_is_passed_over(adapted: Run, end: FaultRun, tmp_path: Path) -> None:
    """The newest checkpoint lost the end of a file: the one before is taken, and the run ends as it would have."""
    case = FaultRun(adapted, tmp_path)
    assert case.run().codes == [0, 0] and case.newest() == 4
    torn = next((case.run_dir / "iter_0000004").glob("*.distcp"))
    torn.write_bytes(torn.read_bytes()[:-7])
    assert case.newest() == 3
    again = case.resume()
    assert again.codes == [0, 0], again.output
    assert case.newest() == 4 and case.losses()[-1] == end.losses()[-1]
    table.add(
        "an adapter's run: the newest checkpoint lost the end of a file", "passed over", "went on from step 3; losses equal"
    )
