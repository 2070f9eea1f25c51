"""Every named point crossed with {an error, SIGKILL, SIGSTOP}: all ranks end, nothing is lost, the run goes on to the same end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megaswift.run.spec import Run
from megaswift.store.faults import POINTS
from megaswift.store.manifest import quick_check
from megaswift.store.paths import candidates
from tests.faults import table
from tests.faults.conftest import ALL
from tests.faults.harness import GONE_S, FaultRun

SOURCE = Path(__file__).parent.parent.parent / "src" / "megaswift"
ONE_PROCESS = {
    "save.before_index",
    "save.before_manifest",
    "save.before_rename",
    "save.renamed",
    "keep.before_trash",
    "keep.trashed",
}
# In `make test`: each stage of a save is killed once; one error, one stop and one signal of each sort.
SOME = {
    "save.directory:kill:1", "save.writing:kill:0", "save.part_written:kill:1", "save.before_manifest:kill:0", "save.before_rename:kill:0",
    "save.renamed:kill:0", "keep.trashed:kill:0", "load.weights_read:kill:1", "loop.step:kill:0", "save.writing:raise:1", "save.before_index:raise:0",
    "loop.step:stop:1", "save.part_written:stop:0",
}  # fmt: skip


def every() -> list[str]:
    found = []
    for point in POINTS:
        for kind in ("raise", "kill", "stop"):
            found += [f"{point}:{kind}:{rank}" for rank in ((0,) if point in ONE_PROCESS else (0, 1))]
    return found


CASES = every() if ALL else [fault for fault in every() if fault in SOME]


def test_every_point_is_known() -> None:
    """The list of points is the list of calls in the source, so a new point is tested without a new test."""
    called = {
        name
        for path in SOURCE.rglob("*.py")
        for name in re.findall(r"fault_point\(\"([a-z_.]+)\"\)", path.read_text(encoding="utf-8"))
    }
    assert called - {"save.part_written.example", "exchange.meet"} == set(POINTS)  # that one is of swift doctor, and of no run


@pytest.mark.parametrize("fault", CASES)
def test_nothing_is_lost(fault: str, base: Run, straight: FaultRun, tmp_path: Path) -> None:
    point, kind, rank = fault.split(":")
    case = FaultRun(base, tmp_path)
    before = (case.run_dir / "iter_0000002" / "manifest.json").read_bytes()
    ended = case.run(fault)
    assert ended.seconds < GONE_S, ended
    assert any(ended.codes), "the fault did not happen"
    if kind == "kill":
        assert ended.codes[int(rank)] == -9
    if kind == "stop":
        assert set(ended.codes) <= {5, -9}, ended
        assert ended.stacks == 2, ended.output
        assert "stood still" in ended.own[0]["what"]
    if kind == "raise" and point.startswith("save.") and point != "save.published":
        assert ended.codes == [3, 3], ended.output
        assert ended.reports[0]["what"] == ended.reports[1]["what"]
        assert f"rank {rank}" in ended.reports[0]["what"]
    kept = case.run_dir / "iter_0000002"
    if kept.exists():
        assert (kept / "manifest.json").read_bytes() == before
    problems = [quick_check(path) for path in candidates(case.run_dir)]
    assert problems == [None] * len(problems), "a name of a checkpoint stands for something that is not whole"
    newest = case.newest()
    again = case.resume()
    assert again.codes == [0, 0], again.output
    assert case.newest() == 4
    assert case.losses() == straight.losses()
    assert not [path.name for path in case.run_dir.iterdir() if "tmp" in path.name or "trash" in path.name]
    table.add(
        f"{point}, {kind}, rank {rank}",
        f"ended after {ended.seconds:.0f} s, exit codes {ended.codes[0]} and {ended.codes[1]}",
        f"went on from step {newest}; losses equal",
    )


def skip_a_collective() -> None:
    """Rank 1 leaves out one agreement at a step boundary: from there on the ranks wait for different things."""
    import os

    import torch
    import torch.distributed as dist

    plain, calls = dist.all_reduce, [0]

    def all_reduce(tensor: torch.Tensor, *arguments: object, **more: object) -> object:
        if tensor.shape == (2,) and tensor.dtype == torch.float32:
            calls[0] += 1
            if calls[0] == 2 and os.environ["RANK"] == "1":
                return None
        return plain(tensor, *arguments, **more)  # type: ignore[arg-type]

    dist.all_reduce = all_reduce


def test_a_rank_that_leaves_out_a_collective(base: Run, straight: FaultRun, tmp_path: Path) -> None:
    case = FaultRun(base, tmp_path)
    ended = case.run(prepare=skip_a_collective, hangs=True)
    assert ended.seconds < GONE_S, ended
    assert all(ended.codes), ended.codes
    assert ended.own, ended.output
    newest = case.newest()
    assert newest >= 2
    again = case.resume()
    assert again.codes == [0, 0], again.output
    assert case.losses() == straight.losses()
    table.add(
        "rank 1 leaves out one collective",
        f"ended after {ended.seconds:.0f} s, exit codes {ended.codes[0]} and {ended.codes[1]}",
        f"went on from step {newest}; losses equal",
    )
