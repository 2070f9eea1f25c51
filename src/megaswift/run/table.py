"""The table between MegatronArguments and SftArguments, one row a line: what `swift sft` prints, saves and obeys.

The engine reads its values from the filled table, so a row that is wrong here trains wrong: there is no second copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megaswift.config.options import SftArguments

OPTIMIZERS = {"adamw_torch": "adam", "adamw_torch_fused": "adam", "adamw_bf16": "adam", "adamw_8bit": "adam"}
MOMENTS = {"adamw_bf16": "bf16", "adamw_8bit": "8bit"}  # how the moments are kept where not in fp32
DECAY_STYLES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse-square-root",
    "warmup_stable_decay": "WSD",
}


@dataclass(frozen=True)
class Facts:
    """What a row needs beyond the options."""

    world_size: int
    train_rows: int
    val_rows: int
    dtype: str  # fp32, bf16 or fp16: --dtype with AUTO resolved
    load: str  # directory whose weights training starts from
    save: str  # directory of this run
    kept_batch: int | None = None  # the global batch of the run that goes on; None: a new run, the options tell


@dataclass(frozen=True)
class Row:
    """One line of the table: Megatron's names, the expression on our side, and that expression as code."""

    megatron: tuple[str, ...]
    sft: str
    value: Callable[[SftArguments, Facts], Any]


def min_lr(args: SftArguments) -> float:
    """The learning rate of the last step, by default a tenth of the largest."""
    return 0.1 * args.learning_rate if args.min_lr is None else args.min_lr


def accumulation(args: SftArguments, world_size: int) -> int:
    """gradient_accumulation_steps, by default ceil(16 / batch_size / world_size)."""
    return args.gradient_accumulation_steps or math.ceil(16 / args.batch_size / world_size)


def global_batch_size(args: SftArguments, facts: Facts) -> int:
    """Rows in one step: those of a run that goes on. Else the world size counts all processes: tp, pp and cp multiply it too."""
    return facts.kept_batch or args.batch_size * accumulation(args, facts.world_size) * facts.world_size


def train_iters(args: SftArguments, facts: Facts) -> int:
    """Steps of the run."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(facts.train_rows * args.num_train_epochs / global_batch_size(args, facts))


def asked_warmup(args: SftArguments, steps: int) -> int:
    """Steps of warm-up that the options ask for, in a run of so many steps."""
    return args.warmup_steps if args.warmup_steps > 0 else math.ceil(steps * args.warmup_ratio)


def warmup_iters(args: SftArguments, facts: Facts) -> int:
    """Steps in which the learning rate rises; never more than the run has."""
    steps = train_iters(args, facts)
    return min(asked_warmup(args, steps), steps)


def warmup_note(args: SftArguments, steps: int) -> str:
    """A sentence on a warm-up that leaves no step at the full learning rate, else nothing."""
    asked = asked_warmup(args, steps)
    if asked < steps or steps <= 1:
        return ""
    given = f"--warmup_steps {asked}" if args.warmup_steps > 0 else f"--warmup_ratio {args.warmup_ratio:g}"
    what = f"is longer than the run: it is cut to {steps} steps" if asked > steps else "is the whole run"
    return f"the warm-up ({given}) {what}, and the learning rate rises until the last one and never falls."


TABLE = (
    Row(("optimizer",), "optim", lambda a, f: OPTIMIZERS[a.optim]),
    Row(("lr_decay_style",), "lr_scheduler_type", lambda a, f: DECAY_STYLES[a.lr_scheduler_type]),
    Row(("weight_decay",), "weight_decay", lambda a, f: a.weight_decay),
    Row(("clip_grad",), "max_grad_norm", lambda a, f: a.max_grad_norm),
    Row(("adam_beta1",), "adam_beta1", lambda a, f: a.adam_beta1),
    Row(("adam_beta2",), "adam_beta2", lambda a, f: a.adam_beta2),
    Row(("adam_eps",), "adam_epsilon", lambda a, f: a.adam_epsilon),
    Row(("lr",), "learning_rate", lambda a, f: a.learning_rate),
    Row(("min_lr",), "min_lr", lambda a, f: min_lr(a)),
    Row(("fp16", "apply_query_key_layer_scaling"), "fp16", lambda a, f: f.dtype == "fp16"),
    Row(("bf16",), "bf16", lambda a, f: f.dtype == "bf16"),
    Row(("tensor_model_parallel_size",), "tp", lambda a, f: a.tp),
    Row(("pipeline_model_parallel_size",), "pp", lambda a, f: a.pp),
    Row(("virtual_pipeline_model_parallel_size",), "vpp", lambda a, f: a.vpp if a.vpp > 1 else None),
    Row(("seed",), "seed", lambda a, f: a.seed),
    Row(("load",), "resume_from_checkpoint", lambda a, f: f.load),
    Row(("save",), "output_dir", lambda a, f: f.save),
    Row(("tensorboard_dir",), "logging_dir", lambda a, f: a.logging_dir or f"{f.save}/runs"),
    Row(("log_interval",), "logging_steps", lambda a, f: a.logging_steps),
    Row(("eval_interval",), "eval_steps", lambda a, f: a.eval_steps),
    Row(("save_interval",), "save_steps", lambda a, f: a.eval_steps if a.save_steps is None else a.save_steps),
    Row(("micro_batch_size",), "batch_size", lambda a, f: a.batch_size),
    Row(("global_batch_size",), "batch_size * gradient_accumulation_steps * world_size", global_batch_size),
    Row(("sequence_parallel",), "sequence_parallel", lambda a, f: a.sequence_parallel),
    Row(("num_workers",), "dataloader_num_workers", lambda a, f: a.dataloader_num_workers),
    Row(("use_flash_attn",), "use_flash_attn", lambda a, f: a.use_flash_attn),
    Row(("train_iters",), "int(math.ceil(len(train_dataset) * num_train_epochs / global_batch_size))", train_iters),
    Row(
        ("eval_iters",),
        "int(math.ceil(len(val_dataset) / global_batch_size))",
        lambda a, f: math.ceil(f.val_rows / global_batch_size(a, f)),
    ),
    Row(("lr_warmup_iters",), "warmup_steps if warmup_steps > 0 else math.ceil(train_iters * warmup_ratio)", warmup_iters),
    Row(("no_save_optim", "no_save_rng"), "save_only_model", lambda a, f: a.save_only_model),
)


def megatron_names() -> dict[str, str]:
    """Option -> Megatron-Core's names for it."""
    return {row.sft: ", ".join(row.megatron) for row in TABLE if row.sft.isidentifier()}


def megatron_arguments(args: SftArguments, facts: Facts) -> dict[str, Any]:
    """The filled table: Megatron's name -> value."""
    return {name: row.value(args, facts) for row in TABLE for name in row.megatron}


def filled_rows(args: SftArguments, facts: Facts) -> list[tuple[str, str, str]]:
    """The table as text for people: Megatron's names, our expression, the value."""
    expressions: dict[tuple[str, ...], str] = {("train_iters",): "max_steps"} if args.max_steps > 0 else {}
    if facts.kept_batch:
        expressions["global_batch_size",] = "that of the run, which goes on"
    return [(", ".join(row.megatron), expressions.get(row.megatron, row.sft), _text(row.value(args, facts))) for row in TABLE]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
