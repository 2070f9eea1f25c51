"""Checkpoints written while training goes on: the same bytes, never a name for an incomplete one, and little waiting."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megaswift.run.spec import Run
from tests.faults.conftest import ALL
from tests.faults.harness import FaultRun
from tests.runs import changed

POINTS = [
    "save.directory",
    "save.collected",
    "save.writing",
    "save.part_written",
    "save.before_index",
    "save.before_manifest",
    "save.before_rename",
    "save.renamed",
    "loop.step",
]


def slow_disk() -> None:
    """Each file takes a second longer."""
    from megaswift.weights.torch_dist import writer as torch_dist

    plain = torch_dist.write_file

    def write(*arguments: Any) -> Any:
        time.sleep(1.0)
        return plain(*arguments)

    torch_dist.write_file = write


def hashes(run_dir: Path, step: int) -> dict[str, str]:
    files = json.loads((run_dir / f"iter_{step:07d}" / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}


def test_the_bytes_are_those_of_the_step_that_was_saved(base: Run, straight: FaultRun, tmp_path: Path) -> None:
    """Training goes on for many steps while a slow disk writes: files are equal to those written at once."""
    case = FaultRun(changed(base, save_steps=3), tmp_path, in_background=True, total_limit=9)
    ended = case.run(prepare=slow_disk)
    assert ended.codes == [0, 0], ended.output
    assert hashes(case.run_dir, 3) == hashes(straight.run_dir, 3)
    assert hashes(case.run_dir, 4) == hashes(straight.run_dir, 4)
    assert case.losses() == straight.losses()


def write_after_two_more_steps() -> None:
    """The first file is not written before this rank has made two more steps: it would never be if training waited."""
    from megaswift.train.trainer import Trainer
    from megaswift.weights.torch_dist import writer as torch_dist

    plain, step, made, first = torch_dist.write_file, Trainer.step, [0], [True]

    def counted(self: Any, batches: Any) -> Any:
        result = step(self, batches)
        made[0] += 1
        return result

    def write(*arguments: Any) -> Any:
        if first[0]:
            first[0], target = False, made[0] + 2
            while made[0] < target:
                time.sleep(0.01)
        return plain(*arguments)

    Trainer.step, torch_dist.write_file = counted, write  # type: ignore[method-assign]


def test_training_goes_on_while_files_are_written(base: Run, tmp_path: Path) -> None:
    case = FaultRun(changed(base, save_steps=4, train_iters=8), tmp_path, in_background=True)
    ended = case.run(prepare=write_after_two_more_steps)
    assert ended.codes == [0, 0], ended.output
    rows = case.rows()
    place = next(k for k, row in enumerate(rows) if row.get("checkpoint") == "iter_0000004")
    assert rows[place]["save_waited_seconds"] < rows[place]["save_seconds"]
    assert rows[place - 1]["global_step/max_steps"] >= "6/8"
    assert case.newest() == 8


@pytest.mark.parametrize("kind", ["kill", "term"])
@pytest.mark.parametrize("point", POINTS if ALL else ["save.writing", "save.before_rename", "loop.step"])
def test_an_end_while_a_save_is_in_flight(point: str, kind: str, base: Run, straight: FaultRun, tmp_path: Path) -> None:
    case = FaultRun(base, tmp_path, in_background=True)
    hit = 2 if point == "loop.step" else 1  # the second step: the first one's checkpoint is in flight
    ended = case.run(f"{point}:{kind}:0:{hit}", prepare=slow_disk if point == "loop.step" else None)
    assert any(ended.codes) or case.newest() == 4
    assert case.newest() >= 2
    tracked = (case.run_dir / "latest_checkpointed_iteration.txt").read_text()
    assert int(tracked) <= case.newest()
    again = case.resume()
    assert again.codes == [0, 0], again.output
    assert case.losses() == straight.losses()


def test_an_error_in_the_background_reaches_every_rank(base: Run, tmp_path: Path) -> None:
    case = FaultRun(base, tmp_path, in_background=True)
    ended = case.run("save.writing:raise:1")
    assert ended.codes == [3, 3], ended.output
    assert "rank 1" in ended.reports[0]["what"]
    assert case.newest() == 2
