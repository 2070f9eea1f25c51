"""SIGTERM and SIGINT: the run is saved at a step boundary and ends with 75, wherever it was; the same command goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megaswift.commands.sft import sft_main
from megaswift.errors import Stopped
from megaswift.run.spec import Run
from tests.faults.conftest import ALL
from tests.faults.harness import FaultRun, signalled
from tests.runs import changed

WHERE = {
    "loop.start": 2,
    "loop.step": 3,
    "loop.boundary": 3,
    "loop.evaluate": 4,
    "save.writing": 3,
    "save.published": 3,
    "load.done": 2,
}
CASES = [(point, rank) for point in WHERE for rank in ("0", "1", "all")]
SOME = [("loop.start", "1"), ("loop.step", "0"), ("loop.evaluate", "1"), ("save.writing", "all")]


@pytest.mark.parametrize(("point", "rank"), CASES if ALL else SOME)
@pytest.mark.parametrize("background", [False, True] if ALL else [False])
def test_the_first_signal_saves_and_stops(
    point: str, rank: str, background: bool, base: Run, straight: FaultRun, tmp_path: Path
) -> None:
    case = FaultRun(base, tmp_path, in_background=background)
    ended = case.run(f"{point}:term:{rank}")
    if point == "loop.evaluate":  # the evaluation is that of the last step: the run is over anyway
        assert ended.codes == [0, 0], ended.output
    else:
        assert (set(ended.codes) <= {75, 0} and 75 in ended.codes) or case.newest() == 4, ended.output
    assert case.newest() >= WHERE[point]
    again = case.resume()
    assert again.codes == [0, 0], again.output
    assert case.losses() == straight.losses()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_of_a_long_run_is_told_to_stop(rank: int, base: Run, tmp_path: Path) -> None:
    """As when one machine of several is preempted: all ranks end with 75, and the checkpoint is of that step, not the last."""
    case = FaultRun(base, tmp_path)
    case.job = changed(case.job, train_iters=150, save_steps=1000)
    ended = case.run(f"loop.step:term:{rank}:2")  # before the run's fourth step
    assert ended.codes == [75, 75], ended.output
    assert 4 <= case.newest() < 100
    said = [report["what"].split(" after step")[0] for report in ended.reports]
    assert said[rank] == "stopped by SIGTERM" and said[1 - rank] == "stopped by a signal to another rank"
    assert len(case.losses()) == case.newest()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_signal_that_a_library_takes_for_its_own_error(
    processes: str, start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives while a library imports something that it can do without, say: it is obeyed all the same."""

    def swallow(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:
            pass

    monkeypatch.setenv("NPROC_PER_NODE", processes)
    monkeypatch.setattr("megaswift.commands.sft._print_plan", swallow)
    words = [
        "--resume_from_checkpoint",
        str(start[0]),
        "--dataset",
        str(start[1]),
        "--output_dir",
        str(tmp_path),
        "--max_steps",
        "50",
    ]
    with pytest.raises(Stopped, match="stopped by SIGTERM before training began"):
        sft_main([*words, "--pp", processes])
    assert not list(tmp_path.rglob("logging.jsonl"))


def test_the_second_signal_ends_a_rank_that_waits(base: Run, tmp_path: Path) -> None:
    """Rank 1 is stopped, rank 0 waits for it inside a collective, where no Python code runs: it still ends at once."""

    def twice(processes: list[Any]) -> None:
        log, deadline = tmp_path / "run" / "iter_0000003", time.monotonic() + 60
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert signalled(processes[1], signal.SIGSTOP), "the run was over before the signals"
        time.sleep(0.5)
        began = time.monotonic()
        signalled(processes[0], signal.SIGTERM)
        while processes[0].is_alive() and time.monotonic() - began < 10:  # one that comes before the first is counted is lost
            time.sleep(0.3)
            signalled(processes[0], signal.SIGTERM)
        processes[0].join(10)
        processes[1].kill()
        assert processes[0].exitcode == 128 + signal.SIGTERM

    case = FaultRun(base, tmp_path)
    case.job = changed(case.job, train_iters=400)
    case.run(watch=twice)
    assert case.newest() >= 3
