"""The time of a step beside what was measured. The constants were chosen with these figures in view: this holds them together."""

from __future__ import annotations

import pytest

from megaswift.run.cards import cards
from megaswift.run.memory import estimate
from megaswift.run.speed import speed_of
from tests.plan.measured import MEASURED, Measured
from tests.plan.shapes import run_of


@pytest.mark.parametrize("one", [one for one in MEASURED if one.speed], ids=lambda one: one.name)
def test_tokens_a_second(one: Measured) -> None:
    run, config = run_of(one.shape, **one.options)
    found = speed_of(run, config, estimate(run, config), cards()[one.card])
    assert found.per_gpu == pytest.approx(one.speed, rel=0.15)


def test_flops_of_a_step() -> None:
    """6 x parameters in products + causal attention, as docs/performance.md counts; adapters 4 x; layers again a third more."""
    run, config = run_of("1.5b", batch_size=4)
    found = speed_of(run, config, estimate(run, config), cards()["H100"])
    biases_and_norms = 28 * (2048 + 2 * 1536) + 1536
    parameters = 1543714304 - biases_and_norms
    assert found.flops == pytest.approx(16384 * (6 * parameters + 6 * 28 * 1536 * 4096))
    assert found.done == found.flops and found.tokens == 16384
    again, config = run_of("1.5b", batch_size=4, gradient_checkpointing=True)
    more = speed_of(again, config, estimate(again, config), cards()["H100"])
    assert more.flops == found.flops and 1.2 < more.done / more.flops < 1.35
    lora, config = run_of("7b", lora=("all-linear",))
    made = speed_of(lora, config, estimate(lora, config), cards()["H200"])
    assert made.flops == pytest.approx(4096 * (4 * (6525288448 + 152064 * 3584) + 6 * 28 * 3584 * 4096), rel=1e-3)


def test_experts_cost_what_is_chosen() -> None:
    run, config = run_of("moe-8")
    found = speed_of(run, config, estimate(run, config), cards()["H200"])
    active = 8 * (18874368 + 2048 * 128 + 8 * 3 * 2048 * 768) + 151936 * 2048
    assert found.flops == pytest.approx(4096 * (6 * active + 6 * 8 * 4096 * 4096))


def test_pipelines_wait_and_small_models_are_launched() -> None:
    run, config = run_of("7b", gpus=4, pp=4, gradient_accumulation_steps=1)
    found = speed_of(run, config, estimate(run, config), cards()["H200"])
    assert found.seconds["bubble"] == pytest.approx(
        sum(v for k, v in found.seconds.items() if k not in ("bubble", "update", "adding gradients")) * 3 / 4
    )
    small, config = run_of("0.5b", gpus=2, tp=2, max_length=256)
    assert speed_of(small, config, estimate(small, config), cards()["H200"]).launching
