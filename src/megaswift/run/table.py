"""The table between MegatronArguments and SftArguments, one row a line, as `swift sft` prints it of a Run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megaswift.run.spec import Run

_FLASH = {"fastest": None, "flash": True, "plain": False}


@dataclass(frozen=True)
class Row:
    """One line of the table: Megatron's names, the expression on our side, and what a run has there."""

    megatron: tuple[str, ...]
    sft: str
    value: Callable[[Run], Any]


TABLE = (
    Row(("optimizer",), "optim", lambda run: run.optimizer.name),
    Row(("lr_decay_style",), "lr_scheduler_type", lambda run: run.schedule.decay_style),
    Row(("weight_decay",), "weight_decay", lambda run: run.optimizer.weight_decay),
    Row(("clip_grad",), "max_grad_norm", lambda run: run.optimizer.max_grad_norm),
    Row(("adam_beta1",), "adam_beta1", lambda run: run.optimizer.beta1),
    Row(("adam_beta2",), "adam_beta2", lambda run: run.optimizer.beta2),
    Row(("adam_eps",), "adam_epsilon", lambda run: run.optimizer.epsilon),
    Row(("lr",), "learning_rate", lambda run: run.schedule.learning_rate),
    Row(("min_lr",), "min_lr", lambda run: run.schedule.min_lr),
    Row(("fp16", "apply_query_key_layer_scaling"), "fp16", lambda run: run.precision.dtype == "fp16"),
    Row(("bf16",), "bf16", lambda run: run.precision.dtype == "bf16"),
    Row(("tensor_model_parallel_size",), "tp", lambda run: run.parallel.tp),
    Row(("pipeline_model_parallel_size",), "pp", lambda run: run.parallel.pp),
    Row(("seed",), "seed", lambda run: run.seed),
    Row(("load",), "resume_from_checkpoint", lambda run: run.model.named),
    Row(("save",), "output_dir", lambda run: run.saving.run_dir),
    Row(("tensorboard_dir",), "logging_dir", lambda run: run.saving.logging_dir),
    Row(("log_interval",), "logging_steps", lambda run: run.saving.logging_steps),
    Row(("eval_interval",), "eval_steps", lambda run: run.saving.eval_steps),
    Row(("save_interval",), "save_steps", lambda run: run.saving.save_steps),
    Row(("micro_batch_size",), "batch_size", lambda run: run.batch.micro_batch_size),
    Row(
        ("global_batch_size",),
        "batch_size * gradient_accumulation_steps * world_size",
        lambda run: run.batch.global_batch_size,
    ),
    Row(("sequence_parallel",), "sequence_parallel", lambda run: run.parallel.sequence_parallel),
    Row(("num_workers",), "dataloader_num_workers", lambda run: run.batch.workers),
    Row(("use_flash_attn",), "use_flash_attn", lambda run: _FLASH[run.precision.attention]),
    Row(
        ("train_iters",),
        "int(math.ceil(len(train_dataset) * num_train_epochs / global_batch_size))",
        lambda run: run.schedule.train_iters,
    ),
    Row(
        ("eval_iters",),
        "int(math.ceil(len(val_dataset) / global_batch_size))",
        lambda run: math.ceil(run.data.val_rows / run.batch.global_batch_size),
    ),
    Row(
        ("lr_warmup_iters",),
        "warmup_steps if warmup_steps > 0 else math.ceil(train_iters * warmup_ratio)",
        lambda run: run.schedule.warmup_iters,
    ),
    Row(("no_save_optim", "no_save_rng"), "save_only_model", lambda run: run.saving.only_model),
)


# What the original has no row for; told where it is used.
FURTHER = (Row(("virtual_pipeline_model_parallel_size",), "vpp", lambda run: run.parallel.vpp),)


def megatron_names() -> dict[str, str]:
    """Option -> Megatron-Core's names for it."""
    return {row.sft: ", ".join(row.megatron) for row in TABLE + FURTHER if row.sft.isidentifier()}


def megatron_arguments(run: Run) -> dict[str, Any]:
    """The filled table: Megatron's name -> value."""
    return {name: row.value(run) for row in TABLE for name in row.megatron}


def filled_rows(run: Run) -> list[tuple[str, str, str]]:
    """The table as text for people: Megatron's names, our expression, the value."""
    expressions: dict[tuple[str, ...], str] = {("train_iters",): "max_steps"} if run.schedule.epochs is None else {}
    if run.schedule.tokens is not None:
        expressions["train_iters",] = "math.ceil(train_tokens / (global_batch_size * max_length))"
    if run.batch.of_earlier_run:
        expressions["global_batch_size",] = "that of the run, which goes on"
    rows = [*TABLE, *(row for row in FURTHER if row.value(run) > 1)]
    return [(", ".join(row.megatron), expressions.get(row.megatron, row.sft), _text(row.value(run))) for row in rows]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
