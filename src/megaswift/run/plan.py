"""What a run will do, worked out before any process group exists: layout, batches, steps, bytes.

Everything that can be wrong with a layout is found here, with the nearest values that would be right. Needs the model's
config and the number of processes; no GPU, no weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.config.options import SftArguments
from megaswift.errors import DataError, UserError
from megaswift.models import parameters_of
from megaswift.models.family import sizes_of, trained_length
from megaswift.models.stages import stage_layers, stage_weights
from megaswift.run import table
from megaswift.run.method import LORA, adapter_of, frozen_parameters, packed_share, trainable_of_rank, trained_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.models.adapters import Lora
    from megaswift.models.parameters import Parameter

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PACKED_BYTES = 0.5 + 4 / 64  # a value in 4 bits, and its part of an fp32 scale
FP8_MULTIPLE = 16  # torch multiplies FP8 matrices whose sides are multiples of this


@dataclass(frozen=True)
class Plan:
    """A run in numbers; plan.json holds it and every rank reads it from there."""

    model_type: str
    dtype: str
    world_size: int
    tp: int
    pp: int
    dp: int
    cp: int
    padded_vocab: int
    max_length: int
    pad_multiple: int  # sequence lengths are multiples of this
    micro_batches: int  # micro batches of one data-parallel rank in one step
    gradient_accumulation_steps: int | None  # None: a run goes on whose global batch is no multiple of rows x processes
    train_rows: int
    val_rows: int
    decay_steps: int
    wsd_decay_steps: int
    moments: str  # how the optimizer keeps them: fp32, bf16 or 8bit
    rank_bytes: dict[str, int]  # on the fullest rank's device: weights, gradients, optimizer
    checkpoint_bytes: int
    megatron: dict[str, Any]  # the filled table of table.py
    table: list[tuple[str, str, str]] = field(default_factory=list)
    optimizer_cpu_offload: bool = False
    cpu_offloading_num_layers: int = 0
    host_bytes: dict[str, int] = field(
        default_factory=dict
    )  # in the fullest rank's host memory: optimizer, activations at most
    stages: list[int] = field(default_factory=list)  # layers of each pipeline stage
    parameters: int = 0  # of the whole model, tied weights counted once
    trainable: int = 0  # what is trained: these, or an adapter's

    @property
    def train_iters(self) -> int:
        return int(self.megatron["train_iters"])

    @property
    def global_batch(self) -> int:
        return int(self.megatron["global_batch_size"])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Plan:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["table"] = [tuple(row) for row in values["table"]]
        return cls(**{"cp": 1, **values})


def check_layout(
    config: PreTrainedConfig, tp: int, pp: int, world_size: int | None = None, sequence_parallel: bool = False, cp: int = 1
) -> None:
    """Raise UserError unless the model can be split this way; `world_size` None leaves the processes out."""
    sizes = sizes_of(config)
    if min(tp, pp, cp) < 1:
        raise UserError(f"--tp {tp}, --pp {pp} and --cp {cp} must be at least 1.", where="--tp, --pp, --cp")
    for name, size in (("attention heads", sizes.heads), ("key/value heads", sizes.kv_heads), ("feed-forward size", sizes.ffn)):
        if size % tp:
            legal = _divisors(math.gcd(math.gcd(sizes.heads, sizes.kv_heads), sizes.ffn))
            raise UserError(
                f"--tp {tp} does not divide the model's {size} {name}.",
                where="--tp",
                fix=f"nearest legal values: {_nearest(tp, legal)}",
            )
    if sizes.layers < pp:
        raise UserError(
            f"--pp {pp} is more than the model's {sizes.layers} layers: each stage has one at least.",
            where="--pp",
            fix=f"use at most {sizes.layers}",
        )
    if sequence_parallel and tp == 1:
        raise UserError(
            "--sequence_parallel true needs --tp above 1.", where="--sequence_parallel", fix="leave it out, or raise --tp"
        )
    if world_size is not None and world_size % (tp * pp * cp):
        product, shared = f"tp {tp} x pp {pp}", ""
        if cp > 1:
            product, shared = f"{product} x cp {cp}", " / --cp"
        raise UserError(
            f"{world_size} processes cannot hold {product}: {tp * pp * cp} are needed, or a multiple.",
            where="NPROC_PER_NODE x NNODES",
            fix=f"NPROC_PER_NODE={tp * pp * cp}, or another --tp / --pp{shared} whose product divides {world_size}",
        )


def check_fp8(config: PreTrainedConfig, tp: int, dtype: str) -> None:
    """Raise UserError unless --fp8 goes with the precision, and with the size of each rank's part of every linear layer."""
    if dtype != "bf16":
        raise UserError(f"--fp8 goes with bf16 training; this is {dtype}.", where="--fp8, --dtype", fix="use --dtype bf16")
    sizes = sizes_of(config)
    parts = {  # sizes of the results and inputs of a rank's products
        "linear_qkv": ((sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim // tp, sizes.hidden),
        "linear_proj": (sizes.hidden, sizes.heads * sizes.head_dim // tp),
        "linear_fc1": (2 * sizes.ffn // tp, sizes.hidden),
        "linear_fc2": (sizes.hidden, sizes.ffn // tp),
    }
    for name, shape in parts.items():
        if any(size % FP8_MULTIPLE for size in shape):
            raise UserError(
                f"--fp8 needs matrices whose sides are multiples of {FP8_MULTIPLE}; {name} is {shape[0]} x {shape[1]} on each rank of --tp {tp}.",
                where="--fp8, --tp",
                fix="use a smaller --tp, or leave --fp8 out" if tp > 1 else "leave --fp8 out",
            )


def check_offload(args: SftArguments, config: PreTrainedConfig) -> None:
    """Raise UserError unless a process has as many layers as shall be offloaded."""
    layers, wanted = min(stage_layers(config, args.pp)), args.cpu_offloading_num_layers
    if not 0 <= wanted <= layers:
        raise UserError(
            f"--cpu_offloading_num_layers {wanted} is not between 0 and the {layers} layers of a process.",
            where="--cpu_offloading_num_layers",
            fix=f"use at most {layers}",
        )


def padded_vocab(vocab: int, tp: int) -> int:
    """Vocabulary rows that tensor parallelism can split evenly."""
    return math.ceil(vocab / tp) * tp


def usable_length(config: PreTrainedConfig, max_length: int, given: bool = True) -> int:
    """The longest sample in tokens; a default (`given` False) beyond the model's limit becomes that limit.

    Raises UserError where the user asks for more than the model's positions or its sliding window reach.
    """
    limit, reason = trained_length(config)
    if max_length == -1 or (max_length > limit and not given):
        return limit
    if max_length < 2:
        raise UserError(
            f"--max_length {max_length} leaves no token to predict.",
            where="--max_length",
            fix="use at least 2, or -1 for the model's limit",
        )
    if max_length > limit:
        raise UserError(
            f"--max_length {max_length} is beyond the model's {limit} tokens ({reason}).",
            where="--max_length",
            fix=f"use at most {limit}",
        )
    return max_length


def check_numbers(args: SftArguments) -> None:
    """Raise UserError for options out of range, or that exclude each other; each in itself was judged when it was given."""
    args.check_choices()
    if args.cp > 1 and args.use_flash_attn is not None:
        raise UserError(
            "--cp above 1 has one attention kernel of its own.", where="--use_flash_attn", fix="leave it out, or use --cp 1"
        )
    if args.cuda_graphs == "true":
        _check_graphs(args)
    if args.gradient_checkpointing and args.recompute_modules in ("swiglu", "mlp"):
        raise UserError(
            f"--gradient_checkpointing true recomputes whole layers, --recompute_modules {args.recompute_modules} parts of them.",
            where="--recompute_modules",
            fix="give one of the two",
        )
    if args.overlap_param_gather and not args.overlap_grad_reduce:
        raise UserError(
            "--overlap_param_gather true works only together with --overlap_grad_reduce true.",
            where="--overlap_param_gather",
            fix="give both, or neither",
        )
    if args.min_lr is not None and args.min_lr > args.learning_rate:
        raise UserError(
            f"--min_lr {args.min_lr:g} is above --learning_rate {args.learning_rate:g}.",
            where="--min_lr",
            fix="leave it out for a tenth of --learning_rate, or give a smaller one",
        )


def _check_graphs(args: SftArguments) -> None:
    """Raise UserError for options that make --cuda_graphs true impossible."""
    others = {
        "--tp, --pp and --cp above 1": max(args.tp, args.pp, args.cp) > 1,
        "--gradient_checkpointing": args.gradient_checkpointing,
        "--deterministic": args.deterministic,
        "--use_flash_attn": args.use_flash_attn is not None,
        "--overlap_grad_reduce true": bool(args.overlap_grad_reduce),
        "--fp8": args.fp8,
        "--sft_type lora": args.sft_type == LORA,
        "--cpu_offloading_num_layers": args.cpu_offloading_num_layers > 0,
    }
    for name, given in others.items():
        if given:
            raise UserError(
                f"--cuda_graphs true does not work with {name}.",
                where="--cuda_graphs",
                fix="leave --cuda_graphs out: graphs are then used wherever they work and help",
            )


def make_plan(
    args: SftArguments,
    config: PreTrainedConfig,
    *,
    model_type: str,
    dtype: str,
    world_size: int,
    train_rows: int,
    val_rows: int,
    load: str,
    save: str,
    kept_batch: int | None = None,
) -> Plan:
    """The plan of a run; `kept_batch` is the global batch of one that goes on, and divides into batch_size x dp.

    Raises UserError or DataError for what cannot work.
    """
    _check_run(args, config, world_size, train_rows)
    facts = table.Facts(world_size, train_rows, val_rows, dtype, load, save, kept_batch)
    values = table.megatron_arguments(args, facts)
    steps, warmup = values["train_iters"], values["lr_warmup_iters"]
    if steps < 1:
        raise UserError("the run would have no step.", where="--num_train_epochs, --max_steps", fix="ask for at least one step")
    accumulation, rest = divmod(values["global_batch_size"], args.batch_size * world_size)
    dp = world_size // (args.tp * args.pp * args.cp)
    moments = table.MOMENTS.get(args.optim, "fp32")
    if dtype == "fp16":
        _check_fp16(args, moments)
    lora, frozen = adapter_of(args, config), frozen_parameters(args, config)
    trained = trained_parameters(lora, frozen, config)
    rank_bytes, host_bytes = _bytes(args, config, world_size, dtype, moments, lora, trained if lora or frozen else None)
    whole, total = parameter_count(config), sum(parameter.size for parameter in trained)
    saved = total if lora else whole
    return Plan(
        model_type=model_type,
        dtype=dtype,
        world_size=world_size,
        tp=args.tp,
        pp=args.pp,
        dp=dp,
        cp=args.cp,
        padded_vocab=padded_vocab(config.vocab_size, args.tp),
        max_length=args.max_length,
        pad_multiple=(2 * args.cp if args.cp > 1 else 1) * (args.tp if args.sequence_parallel else 1),
        micro_batches=values["global_batch_size"] // (args.batch_size * dp),
        gradient_accumulation_steps=None if rest else accumulation,
        train_rows=train_rows,
        val_rows=val_rows,
        # Megatron counts warm-up into the decay and wants decay > warm-up; the last step then has exactly min_lr.
        decay_steps=max(steps, warmup + 1),
        wsd_decay_steps=max(1, math.ceil(0.1 * (steps - warmup))),
        rank_bytes=rank_bytes,
        checkpoint_bytes=saved * BYTES[dtype] + (0 if args.save_only_model else total * 12),
        moments=moments,
        megatron=values,
        table=table.filled_rows(args, facts),
        optimizer_cpu_offload=args.optimizer_cpu_offload,
        cpu_offloading_num_layers=args.cpu_offloading_num_layers,
        host_bytes=host_bytes,
        stages=list(stage_layers(config, args.pp)),
        parameters=whole,
        trainable=total,
    )


def _check_run(args: SftArguments, config: PreTrainedConfig, world_size: int, train_rows: int) -> None:
    """Raise UserError or DataError unless options, model, processes and rows go together."""
    check_numbers(args)
    check_layout(config, args.tp, args.pp, world_size, args.sequence_parallel, args.cp)
    check_offload(args, config)
    if train_rows == 0:
        raise DataError(
            "no row is left to train on.",
            where="--dataset",
            fix="see the counts above; give more data, or a larger --max_length",
        )


def _check_fp16(args: SftArguments, moments: str) -> None:
    """Raise UserError for an optimizer that only our update has: fp16's loss scaler needs Megatron-Core's own."""
    for given, name, plain in (
        (moments != "fp32", f"--optim {args.optim}", "--optim adamw_torch"),
        (args.optimizer_cpu_offload, "--optimizer_cpu_offload true", "--optimizer_cpu_offload false"),
    ):
        if given:
            raise UserError(
                f"{name} does not work with fp16: its loss scaler needs Megatron-Core's own update.",
                where=f"{name.split()[0]}, --dtype",
                fix=f"use --dtype bf16, or {plain}",
            )


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the whole model, tied weights counted once."""
    return sum(parameter.size for parameter in parameters_of(config))


def _bytes(
    args: SftArguments,
    config: PreTrainedConfig,
    world_size: int,
    dtype: str,
    moments: str,
    lora: Lora | None,
    only: list[Parameter] | None,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes on the device and in the host memory of the fullest rank: its layers, and embedding and output layer."""
    weights = max(stage_weights(config, args.pp)) // args.tp
    trained = weights if only is None else trainable_of_rank(only, config, args.pp, args.tp)
    data_parallel = world_size // (args.tp * args.pp)
    # Two moments, and an fp32 copy of the weights unless they are fp32 already; shared out over data-parallel ranks.
    each = {"fp32": 8, "bf16": 4, "8bit": 2}[moments] + (0 if dtype == "fp32" else 4)
    state = trained * each // data_parallel
    share = packed_share(lora, config)
    held = int(weights * ((1 - share) * BYTES[dtype] + share * PACKED_BYTES)) + (0 if lora is None else trained * BYTES[dtype])
    device, host = {"weights": held, "gradients": trained * 4, "optimizer": state}, {}
    if args.optimizer_cpu_offload:
        device["optimizer"], host["optimizer"] = 0, state
    if args.cpu_offloading_num_layers:
        host["activations"] = args.cpu_offloading_num_layers * _layer_activations(args, config) * BYTES[dtype]
    return device, host


def _layer_activations(args: SftArguments, config: PreTrainedConfig) -> int:
    """The most values that a layer keeps for the backward passes of all micro batches in flight, with rows of max_length."""
    sizes = sizes_of(config)
    tokens = args.batch_size * args.max_length // args.cp * args.pp
    if args.gradient_checkpointing:
        return tokens * sizes.hidden // (args.tp if args.sequence_parallel else 1)
    qkv = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    return tokens * (5 * sizes.hidden + (qkv + 3 * sizes.ffn) // args.tp)


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _nearest(wanted: int, legal: list[int]) -> str:
    return ", ".join(str(value) for value in sorted(sorted(legal, key=lambda value: abs(value - wanted))[:3]))
