"""The mapping table: the seed's 29 rows by their names there, and each row's value."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megaswift.config.options import SftArguments
from megaswift.run.resolve import World, resolve, warmup_note
from megaswift.run.spec import DataRef, Run
from megaswift.run.table import TABLE, filled_rows, megatron_arguments
from tests import tiny
from tests.runs import source_of

# The table of the seed document, both columns by their names.
SEED = [
    ("optimizer", "optim"),
    ("lr_decay_style", "lr_scheduler_type"),
    ("weight_decay", "weight_decay"),
    ("clip_grad", "max_grad_norm"),
    ("adam_beta1", "adam_beta1"),
    ("adam_beta2", "adam_beta2"),
    ("adam_eps", "adam_epsilon"),
    ("lr", "learning_rate"),
    ("min_lr", "min_lr"),
    ("fp16 apply_query_key_layer_scaling", "fp16"),
    ("bf16", "bf16"),
    ("tensor_model_parallel_size", "tp"),
    ("pipeline_model_parallel_size", "pp"),
    ("seed", "seed"),
    ("load", "resume_from_checkpoint"),
    ("save", "output_dir"),
    ("tensorboard_dir", "logging_dir"),
    ("log_interval", "logging_steps"),
    ("eval_interval", "eval_steps"),
    ("save_interval", "save_steps"),
    ("micro_batch_size", "batch_size"),
    ("global_batch_size", "batch_size * gradient_accumulation_steps * world_size"),
    ("sequence_parallel", "sequence_parallel"),
    ("num_workers", "dataloader_num_workers"),
    ("use_flash_attn", "use_flash_attn"),
    ("train_iters", "int(math.ceil(len(train_dataset) * num_train_epochs / global_batch_size))"),
    ("eval_iters", "int(math.ceil(len(val_dataset) / global_batch_size))"),
    ("lr_warmup_iters", "warmup_steps if warmup_steps > 0 else math.ceil(train_iters * warmup_ratio)"),
    ("no_save_optim no_save_rng", "save_only_model"),
]


def run(dtype: str = "bf16", **options: Any) -> Run:
    """The seed's run of 4 processes, 1,490 training and 10 validation rows; it is not judged."""
    source, data = source_of(tiny.tiny_config("llama"), dtype, "start"), DataRef(train="rows", train_rows=1490, val_rows=10)
    return resolve(SftArguments(**options), source, World(4), data, run_dir="run")


def test_the_table_is_the_seeds_table() -> None:
    assert [(" ".join(row.megatron), row.sft) for row in TABLE] == SEED
    assert len(TABLE) == 29


# One case a row: options that differ from the default, and what Megatron must be told.
ROWS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"optim": "adamw_torch_fused"}, {"optimizer": "adam"}),
    ({"lr_scheduler_type": "inverse_sqrt"}, {"lr_decay_style": "inverse-square-root"}),
    ({"lr_scheduler_type": "warmup_stable_decay"}, {"lr_decay_style": "WSD"}),
    ({"lr_scheduler_type": "linear"}, {"lr_decay_style": "linear"}),
    ({"lr_scheduler_type": "constant"}, {"lr_decay_style": "constant"}),
    ({"weight_decay": 0.01}, {"weight_decay": 0.01}),
    ({"max_grad_norm": 0.5}, {"clip_grad": 0.5}),
    ({"adam_beta1": 0.8}, {"adam_beta1": 0.8}),
    ({"adam_beta2": 0.999}, {"adam_beta2": 0.999}),
    ({"adam_epsilon": 1e-6}, {"adam_eps": 1e-6}),
    ({"learning_rate": 3e-5}, {"lr": 3e-5, "min_lr": pytest.approx(3e-6)}),
    ({"min_lr": 1e-7}, {"min_lr": 1e-7}),
    ({"tp": 2}, {"tensor_model_parallel_size": 2}),
    ({"pp": 2}, {"pipeline_model_parallel_size": 2}),
    ({"seed": 7}, {"seed": 7}),
    ({}, {"load": "start", "save": "run", "tensorboard_dir": "run/runs"}),
    ({"logging_dir": "board"}, {"tensorboard_dir": "board"}),
    ({"logging_steps": 3}, {"log_interval": 3}),
    ({"eval_steps": 9}, {"eval_interval": 9, "save_interval": 9}),
    ({"save_steps": 11}, {"save_interval": 11, "eval_interval": 200}),
    ({"batch_size": 2}, {"micro_batch_size": 2, "global_batch_size": 16}),
    ({"batch_size": 3}, {"global_batch_size": 3 * math.ceil(16 / 3 / 4) * 4}),
    ({"gradient_accumulation_steps": 5}, {"global_batch_size": 20, "train_iters": 75, "eval_iters": 1}),
    ({"sequence_parallel": True}, {"sequence_parallel": True}),
    ({"dataloader_num_workers": 0}, {"num_workers": 0}),
    ({"use_flash_attn": True}, {"use_flash_attn": True}),
    ({"num_train_epochs": 2}, {"train_iters": 187}),
    ({"max_steps": 3}, {"train_iters": 3, "lr_warmup_iters": 1}),
    ({"warmup_steps": 12}, {"lr_warmup_iters": 12}),
    ({"warmup_steps": 500}, {"lr_warmup_iters": 94}),
    ({"warmup_ratio": 0.1}, {"lr_warmup_iters": 10}),
    ({"save_only_model": True}, {"no_save_optim": True, "no_save_rng": True}),
]


@pytest.mark.parametrize(("options", "expected"), ROWS, ids=[str(options) for options, _ in ROWS])
def test_row(options: dict[str, Any], expected: dict[str, Any]) -> None:
    filled = megatron_arguments(run(**options))
    assert {name: filled[name] for name in expected} == expected


@pytest.mark.parametrize(("dtype", "fp16", "bf16"), [("fp16", True, False), ("bf16", False, True), ("fp32", False, False)])
def test_precision_rows(dtype: str, fp16: bool, bf16: bool) -> None:
    filled = megatron_arguments(run(dtype))
    assert (filled["fp16"], filled["apply_query_key_layer_scaling"], filled["bf16"]) == (fp16, fp16, bf16)


def test_the_seeds_own_example() -> None:
    """4 GPUs, tp 2, 1490 training and 10 validation rows: the numbers of the seed's run."""
    filled = megatron_arguments(run(learning_rate=2e-6, tp=2))
    wanted = {"global_batch_size": 16, "train_iters": 94, "eval_iters": 1, "lr_warmup_iters": 5, "lr": 2e-6, "min_lr": 2e-7}
    assert {name: filled[name] for name in wanted} == wanted


def test_filled_rows_are_text_in_the_tables_order() -> None:
    rows = filled_rows(run())
    assert len(rows) == 29
    assert rows[0] == ("optimizer", "optim", "adam")
    assert all(isinstance(cell, str) for row in rows for cell in row)


@pytest.mark.parametrize(
    ("options", "steps", "words"),
    [
        ({"warmup_steps": 500}, 94, "the warm-up (--warmup_steps 500) is longer than the run: it is cut to 94 steps, and the"),
        (
            {"warmup_steps": 94},
            94,
            "the warm-up (--warmup_steps 94) is the whole run, and the learning rate rises until the last",
        ),
        ({"warmup_ratio": 0.99}, 94, "the warm-up (--warmup_ratio 0.99) is the whole run"),
        ({"warmup_steps": 93}, 94, ""),
        ({"warmup_ratio": 0.9}, 94, ""),
        ({}, 94, ""),
        ({}, 1, ""),  # one step is one of warm-up, whatever the ratio: nobody asked for that
    ],
)
def test_a_warm_up_without_an_end_is_told(options: dict[str, Any], steps: int, words: str) -> None:
    said = warmup_note(SftArguments(**options), steps)
    assert said.startswith(words) and bool(said) == bool(words)
