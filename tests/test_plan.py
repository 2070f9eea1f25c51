"""Layouts and numbers that cannot work give one UserError with the nearest legal values, before any process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megaswift.config.options import SftArguments
from megaswift.errors import DataError, UserError
from megaswift.run.plan import Plan, check_layout, make_plan, padded_vocab, parameter_count, usable_length
from tests import tiny


def plan(**changes: Any) -> Plan:
    facts: dict[str, Any] = dict(model_type="tiny", dtype="fp32", world_size=4, train_rows=100, val_rows=3, load="a", save="b")
    config = changes.pop("config", tiny.tiny_config("llama"))
    facts.update({name: changes.pop(name) for name in list(changes) if name in facts})
    return make_plan(SftArguments(max_length=64, **changes), config, **facts)


@pytest.mark.parametrize(
    ("tp", "pp", "world", "message", "fix"),
    [
        (3, 1, None, "--tp 3 does not divide the model's 8 attention heads", "1, 2, 4"),
        (8, 1, None, "--tp 8 does not divide the model's 4 key/value heads", "1, 2, 4"),
        (1, 5, None, "--pp 5 is more than the model's 4 layers", "at most 4"),
        (2, 2, 6, "6 processes cannot hold tp 2 x pp 2", "NPROC_PER_NODE=4"),
        (0, 1, None, "must be at least 1", ""),
    ],
)
def test_bad_layouts(tp: int, pp: int, world: int | None, message: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        check_layout(tiny.tiny_config("llama"), tp, pp, world)
    assert message in caught.value.what
    assert fix in caught.value.fix


def test_feed_forward_size_and_sequence_parallel() -> None:
    with pytest.raises(UserError, match="feed-forward"):
        check_layout(tiny.tiny_config("llama", intermediate_size=98), 4, 1)
    with pytest.raises(UserError, match="needs --tp above 1"):
        check_layout(tiny.tiny_config("llama"), 1, 1, sequence_parallel=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch_size 0"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0"),
        ({"learning_rate": 1e-5, "min_lr": 1e-4}, "--min_lr"),
        ({"warmup_ratio": 1.5}, "--warmup_ratio"),
        ({"save_total_limit": 0}, "--save_total_limit 0"),
        ({"num_train_epochs": 0}, "no step"),
        ({"step_timeout": 0}, "--step_timeout 0 is not above 0"),
        ({"step_timeout": float("nan")}, "--step_timeout nan is not above 0"),
        ({"start_timeout": -1}, "--start_timeout -1 is not above 0"),
    ],
)
def test_bad_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(**options)
    assert message in caught.value.what


def test_no_row_is_an_error() -> None:
    with pytest.raises(DataError, match="no row is left"):
        plan(train_rows=0)


def test_lengths() -> None:
    config = tiny.tiny_config("llama")
    assert usable_length(config, -1) == config.max_position_embeddings
    assert usable_length(config, 32) == 32
    with pytest.raises(UserError, match="max_position_embeddings"):
        usable_length(config, config.max_position_embeddings + 1)
    window = tiny.tiny_config("mistral", sliding_window=16)
    assert usable_length(window, -1) == 16
    with pytest.raises(UserError, match="sliding window"):
        usable_length(window, 17)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 94])
@pytest.mark.parametrize("style", ["cosine", "linear", "warmup_stable_decay"])
def test_the_last_step_has_the_smallest_rate(steps: int, style: str) -> None:
    """Any number of steps works, the rate peaks at the end of warm-up, and min_lr comes at the last step, not before."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megaswift.train.trainer import schedule

    class Optimizer:
        param_groups = [{"params": [], "lr": 0.0, "weight_decay": 0.0}]

    made = plan(max_steps=steps, lr_scheduler_type=style, learning_rate=1e-3)
    scheduler = schedule(Optimizer(), made)
    assert isinstance(scheduler, OptimizerParamScheduler)
    rates = []
    for _ in range(steps):
        scheduler.step(increment=1)
        rates.append(Optimizer.param_groups[0]["lr"])
    assert max(rates) == pytest.approx(1e-3)
    assert all(rate > 0 for rate in rates)
    if steps > 1:
        assert rates[-1] == pytest.approx(1e-4)
        assert all(rate > 1.001e-4 for rate in rates[:-1])


def test_bytes_and_vocabulary() -> None:
    config = tiny.tiny_config("qwen2")
    model = tiny.tiny_model("qwen2")
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    made = plan(config=config, world_size=1)
    assert made.rank_bytes["weights"] == 4 * parameter_count(config)
    assert [padded_vocab(131, tp) for tp in (1, 2, 4)] == [131, 132, 132]


def test_plan_file(tmp_path: Path) -> None:
    made = plan(tp=2, pp=2)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert (made.dp, made.micro_batches, made.global_batch) == (1, 16, 16)
