"""Layouts and numbers that cannot work give one UserError with the nearest legal values, before any process group."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megaswift.errors import DataError, UserError
from megaswift.models.family import padded_vocab
from megaswift.run.memory import estimate, parameter_count
from megaswift.run.plan import plan_of
from megaswift.run.problems import layout_problems, problems, refuse, usable_length
from megaswift.run.spec import Parallel, Run
from tests import tiny
from tests.runs import changed, resolved_run


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
        refuse(layout_problems(tiny.tiny_config("llama"), Parallel(tp=tp, pp=pp, world_size=world or tp * pp)))
    assert message in caught.value.what
    assert fix in caught.value.fix


def test_feed_forward_size_and_sequence_parallel() -> None:
    with pytest.raises(UserError, match="feed-forward"):
        refuse(layout_problems(tiny.tiny_config("llama", intermediate_size=98), Parallel(tp=4, world_size=4)))
    with pytest.raises(UserError, match="needs --tp above 1"):
        refuse(layout_problems(tiny.tiny_config("llama"), Parallel(sequence_parallel=True)))


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
        resolved_run(**options)
    assert message in caught.value.what


def test_no_row_is_an_error() -> None:
    with pytest.raises(DataError, match="no row is left"):
        resolved_run(train_rows=0)


def test_lengths() -> None:
    config = tiny.tiny_config("llama")
    assert usable_length(config, -1) == config.max_position_embeddings
    assert usable_length(config, 32) == 32
    with pytest.raises(UserError, match="max_position_embeddings"):
        usable_length(config, config.max_position_embeddings + 1)
    every = ["sliding_attention"] * 4
    window = tiny.tiny_config("smollm3", sliding_window=16, use_sliding_window=True, layer_types=every)
    assert usable_length(window, -1) == 16
    with pytest.raises(UserError, match="sliding window"):
        usable_length(window, 17)
    assert usable_length(tiny.tiny_config("mistral", sliding_window=16), -1) == 256, "its layers have the window themselves"


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 94])
@pytest.mark.parametrize("style", ["cosine", "linear", "warmup_stable_decay"])
def test_the_last_step_has_the_smallest_rate(steps: int, style: str) -> None:
    """Any number of steps works, the rate peaks at the end of warm-up, and min_lr comes at the last step, not before."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megaswift.train.trainer import schedule

    class Optimizer:
        param_groups = [{"params": [], "lr": 0.0, "weight_decay": 0.0}]

    made = resolved_run(max_steps=steps, lr_scheduler_type=style, learning_rate=1e-3)
    scheduler = schedule(Optimizer(), made.schedule, made.optimizer.weight_decay)
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
    made = estimate(resolved_run(config=config, world_size=1), config)
    assert made.device["weights"] == 4 * parameter_count(config)
    assert [padded_vocab(131, tp) for tp in (1, 2, 4)] == [131, 132, 132]


def test_files_of_a_run(tmp_path: Path) -> None:
    """run.json comes back as it was, and plan.json has the same numbers for people."""
    config = tiny.tiny_config("llama")
    made = changed(resolved_run(tp=2, pp=2), other_dtypes={"a": "F32"})
    made.write(tmp_path / "run.json")
    assert Run.read(tmp_path / "run.json") == made
    told = plan_of(made, config, estimate(made, config))
    assert (told["dp"], told["micro_batches"], told["megatron"]["global_batch_size"], told["stages"]) == (1, 16, 16, [2, 2])
    values = json.loads((tmp_path / "run.json").read_text())
    values["parallel"]["ep_size"] = 2
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(TypeError, match="ep_size"):  # a value that no part knows is no value to pass over
        Run.read(tmp_path / "run.json")


def test_all_problems_are_told() -> None:
    """A planner hears everything at once, of a run that could not even be built, and nothing is raised."""
    config = tiny.tiny_config("llama")
    run = changed(resolved_run(), tp=3, pp=9, world_size=10, learning_rate=1e-9, train_iters=0, offloaded_layers=7)
    found = [(problem.where, problem.fix) for problem in problems(run, config)]
    wheres = [where for where, _ in found]
    for where in (
        "--min_lr",
        "--tp",
        "--pp",
        "NPROC_PER_NODE x NNODES",
        "--cpu_offloading_num_layers",
        "--num_train_epochs, --max_steps",
    ):
        assert where in wheres, where
    assert ("--tp", "nearest legal values: 2, 4, 1") in found or any("nearest legal values" in fix for _, fix in found)


def test_the_flash_kernel_by_name_needs_layers_that_it_knows() -> None:
    short = dataclasses.replace(
        resolved_run(use_flash_attn=True), batch=dataclasses.replace(resolved_run().batch, max_length=9)
    )
    for name, run, message in (
        ("gemma3_text", resolved_run(use_flash_attn=True), "a window of 9 tokens"),
        ("gemma2", short, "a cap of the scores"),
        ("gemma3_text", short, ""),
        ("llama", resolved_run(use_flash_attn=True), ""),
    ):
        found = [problem.what for problem in problems(run, tiny.tiny_config(name)) if "kernel" in problem.what]
        assert [message in what for what in found] == [True] * bool(message), name
