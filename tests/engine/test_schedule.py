"""The learning rate of every step: Megatron-Core's own scheduler, as the engine sets it up, against closed formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megaswift.config.options import SftArguments
from megaswift.parity.reference import learning_rate
from megaswift.run.spec import Schedule
from megaswift.train.trainer import schedule
from tests.runs import resolved_run

STYLES = ("constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay")


def rates(**options: Any) -> tuple[list[float], Schedule]:
    """The rate that Megatron-Core's OptimizerParamScheduler sets before each update, and the schedule that it came from."""
    run = resolved_run(world_size=1, train_rows=64, **options)
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.1}])
    scheduler = schedule(optimizer, run.schedule, run.optimizer.weight_decay)
    found = []
    for _ in range(run.schedule.train_iters):
        scheduler.step(increment=1)  # as Trainer.update does it
        found.append(float(optimizer.param_groups[0]["lr"]))
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
    return found, run.schedule


@pytest.mark.parametrize("steps", [1, 2, 37])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("style", STYLES)
def test_every_step_has_the_rate_of_the_formula(style: str, warmup: int, steps: int) -> None:
    options: dict[str, Any] = dict(
        lr_scheduler_type=style, learning_rate=3e-4, min_lr=2e-5, max_steps=steps, warmup_steps=warmup, warmup_ratio=0.0
    )
    found, made = rates(**options)
    used = made.warmup_iters
    assert used == min(warmup, steps)
    wanted = [learning_rate(SftArguments(**options), step, steps, used) for step in range(1, steps + 1)]
    assert found == pytest.approx(wanted, rel=1e-12)
    if style in ("linear", "cosine", "warmup_stable_decay") and steps > used:
        assert found[-1] == pytest.approx(2e-5, rel=1e-9)


def test_landmarks_of_each_style() -> None:
    """Numbers that anybody can check by hand: 40 steps, 10 of them warm-up, peak 1, floor 0.1."""
    landmarks = {
        "constant": {5: 0.5, 10: 1.0, 40: 1.0},
        "linear": {5: 0.5, 10: 1.0, 25: 0.55, 40: 0.1},
        "cosine": {5: 0.5, 10: 1.0, 25: 0.55, 40: 0.1},
        "inverse_sqrt": {5: 0.5, 10: 1.0, 40: 0.5},
        "warmup_stable_decay": {5: 0.5, 10: 1.0, 37: 1.0, 40: 0.1},
    }
    for style, wanted in landmarks.items():
        found, _ = rates(lr_scheduler_type=style, learning_rate=1.0, min_lr=0.1, max_steps=40, warmup_steps=10)
        assert {step: found[step - 1] for step in wanted} == pytest.approx(wanted), style
