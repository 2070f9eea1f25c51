"""NaN, infinity and spikes on one rank: no rank updates, the rows are written down, and statistics stay clean."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megaswift.run.spec import Run
from megaswift.train.spikes import FEWEST, NormHistory
from megaswift.train.step_guard import StepGuard
from tests.faults.conftest import make_base
from tests.faults.harness import FaultRun
from tests.runs import changed, resolved_run


def poison(step: int, rank: int, factor: float, gradient_only: bool) -> None:
    """In this process: multiply gradients and loss of a step counted from 1; `gradient_only`: set one gradient, leave the loss."""
    import os

    from megaswift.train.trainer import Trainer

    plain, steps = Trainer.gradients, [0]

    def bad(self: Any, batches: Any) -> Any:
        sums = plain(self, batches)
        steps[0] += 1
        if steps[0] != step:
            return sums
        if int(os.environ["RANK"]) == rank:
            for parameter in self.bare_model.parameters():
                if gradient_only:
                    parameter.main_grad.view(-1)[0] = factor
                    break
                parameter.main_grad.mul_(factor)
        return sums if gradient_only else sums * sums.new_tensor([factor, 1.0, 1.0])

    Trainer.gradients = bad  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("rank", "factor", "gradient_only"),
    [
        (1, math.nan, False),
        (0, math.nan, True),
        (1, math.inf, False),
        (0, math.inf, True),
        (1, 1e30, True),
    ],  # whose square overflows
)
def test_a_nan_stops_every_rank_before_the_update(
    rank: int, factor: float, gradient_only: bool, base: Run, straight: FaultRun, tmp_path: Path
) -> None:
    case = FaultRun(base, tmp_path)
    ended = case.run(prepare=partial(poison, 2, rank, factor, gradient_only))  # its second step is the run's fourth
    assert ended.codes == [4, 4], ended.output
    assert ended.reports[0]["what"] == ended.reports[1]["what"]
    assert "at step 4 are not both finite; the weights were not touched" in ended.reports[0]["what"]
    dumped = json.loads((case.run_dir / "nonfinite_step_4.json").read_text())
    assert len(dumped["rows"]) == 16
    assert case.newest() == 3
    again = case.resume()
    assert again.codes == [0, 0], again.output
    assert case.losses() == straight.losses()


def leave_out(place: int) -> None:
    """The stream of batches without one of them."""
    from megaswift.data.batches import Batches

    plain_step, plain_ids = Batches.step, Batches.sample_ids

    def later(step: int) -> int:
        return step + (step >= place)

    Batches.sample_ids = lambda self, step: plain_ids(self, step)  # type: ignore[method-assign]
    Batches.step = lambda self, step: plain_step(self, later(step))  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def constant(start: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run at one learning rate, so that steps can be compared across runs of different numbers of steps."""
    return make_base(
        start,
        tmp_path_factory.mktemp("constant"),
        pp=2,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        eval_steps=100,
        save_steps=100,
    )


@pytest.mark.parametrize(
    ("factor", "gradient_only", "skip_spikes", "clip"),
    [(1e6, False, 20.0, 1.0), (math.nan, False, 20.0, 1.0), (math.inf, True, 0.0, 1.0), (1e30, True, 0.0, 0.0)],
)
def test_a_skipped_step_leaves_no_trace(
    factor: float, gradient_only: bool, skip_spikes: float, clip: float, constant: Run, tmp_path: Path
) -> None:
    """Later losses are those of a run that never had that batch, and one NaN does not make every later step an outlier."""
    last = FEWEST + 6
    bad = FEWEST + 1  # counted in this process, which begins after two steps
    case = FaultRun(
        changed(constant, max_grad_norm=clip, train_iters=last), tmp_path / "bad", nonfinite="skip", skip_spikes=skip_spikes
    )
    ended = case.run(prepare=partial(poison, bad, 1, factor, gradient_only))
    assert ended.codes == [0, 0], ended.output
    other = FaultRun(changed(constant, max_grad_norm=clip, train_iters=last - 1), tmp_path / "without")
    assert other.run(prepare=partial(leave_out, bad + 1)).codes == [0, 0]
    skipped, clean = [row for row in case.rows() if "loss" in row], [row for row in other.rows() if "loss" in row]
    at = next(k for k, row in enumerate(skipped) if row["skipped_steps"])
    assert skipped[at]["loss"] is None
    assert sum(row["skipped_steps"] for row in skipped) == 1
    assert [row["loss"] for row in skipped[at + 1 :]] == [row["loss"] for row in clean[at:]]
    assert list(case.run_dir.glob("spike_step_*.json" if factor == 1e6 else "nonfinite_step_*.json"))


def test_too_many_skipped_steps_stop_the_run(constant: Run, tmp_path: Path) -> None:
    case = FaultRun(constant, tmp_path, nonfinite="skip", max_skipped_steps=0)
    ended = case.run(prepare=partial(poison, 1, 1, math.nan, False))
    assert ended.codes == [4, 4]
    assert "more than --max_skipped_steps 0 were skipped" in ended.reports[0]["what"]


def test_the_bound_knows_only_good_steps() -> None:
    history = NormHistory(3.0)
    assert history.limit == math.inf
    for _ in range(FEWEST):
        history.add(2.0)
    assert history.limit == 6.0
    for norm in (5.0, math.nan):  # one that is large, and one that is none
        history.add(norm)
        assert history.limit == 6.0
    assert NormHistory(3.0, history.values).limit == 6.0
    assert NormHistory(0.0, history.values).limit == math.inf


def test_norms_and_skipped_steps_of_before_count_after_a_resume(tmp_path: Path) -> None:
    """A run that is requeued at each break would otherwise never come to --max_skipped_steps, and take any norm at first."""
    nothing: Any = SimpleNamespace(plan=None, is_first=False)
    extra = {"norms": [2.0] * FEWEST, "skipped": 3}
    guards = resolved_run(skip_spikes=3.0).guards
    run = StepGuard(guards, nothing, nothing, tmp_path, nothing, extra, last=9, before_the_end=lambda: None, active=False)
    assert (run.skipped, run.norms.limit) == (3, 6.0)
