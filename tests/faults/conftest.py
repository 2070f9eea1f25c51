"""The run that faults are tried on, and the table that `make faults` writes from what happened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megaswift.commands import sft
from megaswift.config.options import SftArguments
from megaswift.run.spec import Run
from tests.faults import table
from tests.faults.harness import PATIENCE_S, FaultRun, run_ranks
from tests.faults.live import Live
from tests.runs import changed
from tests.training import tiny_start, write_rows

ALL = os.environ.get("MEGASWIFT_FAULTS") == "all"  # every point and case; else a part of them


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model as Megatron weights, and rows."""
    root = tmp_path_factory.mktemp("faults")
    return tiny_start(root), write_rows(root / "rows.jsonl")


@pytest.fixture(scope="session")
def base(start: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of four steps on two pipeline stages, stopped after the second, whose checkpoint is saved."""
    return make_base(start, tmp_path_factory.mktemp("base"), pp=2)


def make_base(start: tuple[Path, Path], root: Path, world_size: int = 2, **options: Any) -> Run:
    """Do what `swift sft` does before it starts ranks, then two of the steps."""
    from unittest import mock

    found: list[Run] = []
    values = dict(
        resume_from_checkpoint=str(start[0]), dataset=[str(start[1])], max_steps=4, save_steps=1, eval_steps=2, dataset_test_ratio=0.1,
        logging_steps=1, learning_rate=1e-3, max_length=128, output_dir=str(root), save_total_limit=2, dataloader_num_workers=0,
        start_timeout=PATIENCE_S, step_timeout=PATIENCE_S,
    )  # fmt: skip
    with mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(world_size)}):
        with mock.patch.object(sft, "_start", lambda run_dir, job, place, stop: found.append(job)):
            sft.sft_main(SftArguments(**{**values, **options}))
    job = found[0]
    ended = run_ranks(changed(job, train_iters=2), root / "work")
    assert ended.codes == [0] * world_size, ended.output
    run_dir = Path(job.saving.run_dir)
    rows = (run_dir / "logging.jsonl").read_text(encoding="utf-8").replace('/2"', '/4"')
    (run_dir / "logging.jsonl").write_text(rows, encoding="utf-8")
    return job


@pytest.fixture(scope="session")
def straight(base: Run, tmp_path_factory: pytest.TempPathFactory) -> FaultRun:
    """The same run without a fault."""
    case = FaultRun(base, tmp_path_factory.mktemp("straight"))
    ended = case.run()
    assert ended.codes == [0, 0], ended.output
    return case


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """`make faults` notes every test; with several workers only their controller hears of all."""
    if not table.TABLE or "PYTEST_XDIST_WORKER" in os.environ:
        return
    name = report.nodeid.removeprefix("tests/")
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        table.tested(name, "skipped", 0.0, reason.removeprefix("Skipped: "))
    elif report.failed:
        table.tested(name, "failed", report.duration, "the test did not pass")
    elif report.when == "call":
        table.tested(name, "passed", report.duration)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if table.TABLE and not hasattr(session.config, "workerinput"):
        table.write()


@pytest.fixture
def live(start: tuple[Path, Path], tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Start runs that end with the test."""
    runs: list[Live] = []

    def begin(*words: str, **more: Any) -> Live:
        runs.append(Live(start, tmp_path / "output", *words, **more))
        return runs[-1]

    yield begin
    for run in runs:
        run.stop()
