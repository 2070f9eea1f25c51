"""Streamed data on two ranks: a run that stops and goes on sees the rows, and has the losses, of one that does not stop."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megaswift.data.store import TokenRows
from megaswift.errors import UserError
from tests import training
from tests.ranks import RankPool
from tests.training import Trained, tiny_start, train, write_rows

STEPS, GLOBAL_BATCH = 6, 8


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and a packed file with more rows than the run needs; the last lines are no JSON at all."""
    root = tmp_path_factory.mktemp("streaming")
    plain = write_rows(root / "rows.jsonl", 700)
    packed = root / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes() + b"this is never read\n" * 5))
    return tiny_start(root), packed


def streamed(
    pool: RankPool, start: tuple[Path, Path], output: Path, world: int, **more: Any
) -> tuple[Trained, dict[int, list[int]]]:
    """A streamed run, and the rows that all its ranks saw in each step."""
    options = dict(
        resume_from_checkpoint=str(start[0]), dataset=[str(start[1])], model_type="tiny-chat", streaming=True,
        max_steps=STEPS, save_steps=3, eval_steps=100, gradient_accumulation_steps=GLOBAL_BATCH // world, dataset_test_ratio=0.0,
    ) | more  # fmt: skip
    with mock.patch.object(training, "run_job", run_and_note):
        run = train(pool, output, world, **options)
    rows: dict[int, list[int]] = {}
    for path in run.directory.glob("seen-*.json"):
        for step, ids in json.loads(path.read_text()).items():
            rows[int(step)] = sorted(rows.get(int(step), []) + ids)
    return run, rows


def run_and_note(path: str) -> None:
    """The loop of one rank, which writes down the rows of its micro batches for each step."""
    from megatron.core.parallel_state import is_pipeline_first_stage

    from megaswift.run.spec import Run
    from megaswift.train.loop import train
    from megaswift.train.trainer import Trainer

    job, real = Run.read(Path(path)), Trainer.step
    seen: dict[int, list[int]] = {}

    def step(self: Trainer, batches: list[Any]) -> Any:
        rows = [row for batch in batches for row in batch.sample_ids]
        seen[job.schedule.first_step + len(seen) + 1] = (
            rows if is_pipeline_first_stage() else []
        )  # every stage is given the same
        return real(self, batches)

    with mock.patch.object(Trainer, "step", step):
        train(job)
    (Path(path).parent / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def whole(start: tuple[Path, Path], pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return streamed(pool, start, tmp_path_factory.mktemp("whole"), 2)


def half(run: Trained, output: Path) -> None:
    """A copy of the run as it was after its third step, under another --output_dir."""
    copy = output / run.directory.parent.name / run.directory.name
    shutil.copytree(run.directory, copy)
    shutil.rmtree(copy / "iter_0000006")
    for path in copy.glob("seen-*.json"):
        path.unlink()
    (copy / "latest_checkpointed_iteration.txt").write_text("3")


def test_only_the_front_of_the_data_is_read(whole: Any) -> None:
    run, rows = whole
    plan = json.loads((run.directory / "plan.json").read_text(encoding="utf-8"))
    assert plan["train_rows"] == STEPS * GLOBAL_BATCH
    assert sorted(row for ids in rows.values() for row in ids) == list(range(STEPS * GLOBAL_BATCH)), "each row once"
    assert len(run.losses) == STEPS and run.losses[-1] < run.losses[0]


@pytest.mark.parametrize(("world", "layout"), [(2, {}), (1, {}), (2, {"pp": 2})], ids=str)
def test_it_goes_on_where_it_stopped(
    world: int, layout: dict[str, int], whole: Any, start: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    run, rows = whole
    half(run, tmp_path)
    again, rows_again = streamed(pool, start, tmp_path, world, resume=True, **layout)
    assert rows_again == {step: ids for step, ids in rows.items() if step > 3}
    exact = world == 2 and not layout
    assert again.losses == (run.losses if exact else pytest.approx(run.losses, abs=1e-5))


def test_rows_are_those_of_the_file(whole: Any, start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """The streamed rows are the first of the file: reading them with #N gives the same tokens."""
    run, _ = whole
    named = (start[0], Path(f"{start[1]}#{STEPS * GLOBAL_BATCH}"))
    with pytest.raises(UserError, match="max_steps"):
        streamed(pool, start, tmp_path / "none", 2, max_steps=-1)
    counted, _ = streamed(pool, named, tmp_path / "counted", 2)
    first, second = (
        TokenRows.open(json.loads((item.directory / "run.json").read_text())["data"]["train"]) for item in (run, counted)
    )
    assert [first[row][0].tolist() for row in range(len(first))] == [second[row][0].tolist() for row in range(len(second))]
    assert counted.losses == run.losses


def test_another_number_of_steps_is_refused_by_name(
    whole: Any, start: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    run, _ = whole
    half(run, tmp_path)
    with pytest.raises(UserError, match="--max_steps was 6 and is 8, and the order of streamed rows is drawn over all"):
        streamed(pool, start, tmp_path, 2, resume=True, max_steps=8)
