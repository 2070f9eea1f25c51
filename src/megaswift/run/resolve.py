"""From what was asked for to what will be done: `resolve` makes a Run of options, source, processes and rows.

It judges nothing: a run that cannot be is resolved too, so that a planner may try many, and `problems.problems` says what
is wrong with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.config.options import PtArguments, SftArguments
from megaswift.config.parse import count_of
from megaswift.run.memory import checkpoint_bytes, rank_weights
from megaswift.run.objective import objective_of
from megaswift.run.spec import (
    Batch,
    DataRef,
    Guards,
    Memory,
    Method,
    ModelRef,
    OptimizerSpec,
    Parallel,
    Precision,
    Routing,
    Run,
    Saving,
    Schedule,
)
from megaswift.store.paths import INITIAL_ADAPTER

if TYPE_CHECKING:
    from megaswift.run.source import TrainingSource

OPTIMIZERS = {"adamw_torch": "adam", "adamw_torch_fused": "adam", "adamw_bf16": "adam", "adamw_8bit": "adam"}
STATE_DTYPES = {"adamw_bf16": "bf16", "adamw_8bit": "8bit"}  # where it is not fp32
DECAY_STYLES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse-square-root",
    "warmup_stable_decay": "WSD",
}
ATTENTION = {None: "fastest", True: "flash", False: "plain"}
GRAPHS = {"auto": "if launching is slow", "true": "always", "false": "never"}
RECOMPUTE = {"auto": "swiglu if short", "none": "none", "swiglu": "swiglu", "mlp": "mlp"}
# A model smaller than this has little to reduce, and gains more from CUDA graphs, which exclude overlapping. Parameters.
OVERLAP_FROM = 1_000_000_000


@dataclass(frozen=True)
class World:
    """The processes of a run."""

    size: int
    on_gpu: bool = False

    @classmethod
    def of(cls, size: int) -> World:
        """So many processes of this machine's kind."""
        import torch

        return cls(size, torch.cuda.is_available())


def resolve(
    args: SftArguments,
    source: TrainingSource,
    world: World,
    data: DataRef | None = None,
    *,
    run_dir: Path | str = "",
    earlier_batch: int | None = None,
) -> Run:
    """What a run will do.

    Args:
        data: its rows; None where they are not known yet.
        run_dir: where it goes.
        earlier_batch: rows of the global batch of the run that goes on, which stays; None: the options tell.
    """
    data, dtype = data or DataRef(), source.dtype
    batch = _batch(args, world, earlier_batch)
    run_dir = str(run_dir)
    return Run(
        seed=args.seed,
        model=ModelRef(
            model_type=str(args.model_type),
            directory=str(source.root),
            named=str(source.named or (source.new_tokens.source if source.new_tokens else source.root)),
            new_head=source.new_head,
            checkpoint=str(source.checkpoint),
            rows_before=source.new_tokens.rows_before if source.new_tokens else None,
            other_dtypes=source.manifest.get("other_dtypes") or {},
            carried=source.carried,
        ),
        parallel=_parallel(args, source.config, world),
        precision=Precision(
            dtype=dtype,  # type: ignore[arg-type]
            fp8=args.fp8,
            attention=ATTENTION[args.use_flash_attn],  # type: ignore[arg-type]
            deterministic=args.deterministic,
        ),
        memory=Memory(
            recompute=_recompute(args),  # type: ignore[arg-type]
            offloaded_layers=args.cpu_offloading_num_layers,
            optimizer_on_host=args.optimizer_cpu_offload,
            cuda_graphs=GRAPHS[args.cuda_graphs],  # type: ignore[arg-type]
        ),
        routing=Routing(
            router_dtype=args.moe_router_dtype,  # type: ignore[arg-type]
            balance_loss=args.moe_aux_loss_coeff,
            z_loss=args.moe_z_loss_coeff,
        ),
        batch=batch,
        schedule=_schedule(args, train_iters(args, data.train_rows, batch.global_batch_size), source.first_step),
        optimizer=OptimizerSpec(
            name=OPTIMIZERS[args.optim],
            state_dtype=STATE_DTYPES.get(args.optim, "fp32"),  # type: ignore[arg-type]
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            beta1=args.adam_beta1,
            beta2=args.adam_beta2,
            epsilon=args.adam_epsilon,
        ),
        method=Method(
            sft_type=args.sft_type,  # type: ignore[arg-type]
            frozen=tuple(source.frozen),
            adapter=source.adapter,
            base=source.base,
            adapter_start=_adapter_start(args, source, run_dir),
        ),
        objective=objective_of(args),
        data=data,
        saving=Saving(
            run_dir=run_dir,
            logging_dir=args.logging_dir or f"{run_dir}/runs",
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.eval_steps if args.save_steps is None else args.save_steps,
            total_limit=args.save_total_limit,
            only_model=args.save_only_model,
            hf_copies=args.save_safetensors,
            in_background=args.async_save,
            checkpoint_bytes=checkpoint_bytes(source.config, dtype, args.save_only_model, source.adapter, source.frozen),
        ),
        guards=Guards(
            nonfinite=args.nonfinite,  # type: ignore[arg-type]
            skip_spikes=args.skip_spikes,
            max_skipped_steps=args.max_skipped_steps,
            start_timeout_s=args.start_timeout,
            step_timeout_s=args.step_timeout,
        ),
    )


def _adapter_start(args: SftArguments, source: TrainingSource, run_dir: str) -> str | None:
    """Where the first values of an adapter are read, if they do not follow from names and seed."""
    if source.adapter is None:
        return None
    if source.adapter.is_part_of_base:  # also of a run that goes on: its base lacks them
        return str(Path(run_dir) / INITIAL_ADAPTER)
    return args.adapters if source.first_step == 0 else None


def _recompute(args: SftArguments) -> str:
    """What is computed again in the backward pass. With adapters silu(gate) * up always is: it takes half a percent of a step."""
    if args.gradient_checkpointing:
        return "layers"
    adapter = args.sft_type == "lora" and args.recompute_modules == "auto"
    return "swiglu" if adapter else RECOMPUTE[args.recompute_modules]


def _parallel(args: SftArguments, config: Any, world: World) -> Parallel:
    parallel = Parallel(
        device="cuda" if world.on_gpu else "cpu",
        world_size=world.size,
        tp=args.tp,
        pp=args.pp,
        vpp=args.vpp,
        cp=args.cp,
        ep=args.ep,
        etp=args.etp,
        sequence_parallel=args.sequence_parallel,
    )
    overlap = parallel.dp * parallel.cp > 1 and _overlaps(args, config, parallel)
    gather = overlap and args.overlap_param_gather is not False
    return replace(parallel, overlap_grad_reduce=overlap, overlap_param_gather=gather)


def _overlaps(args: SftArguments, config: Any, parallel: Parallel) -> bool:
    """Whether gradients are reduced over data-parallel ranks while the backward pass goes on.

    Where nothing is said: on GPUs, for large models; gloo's threads would take the processor from the backward pass.
    """
    if args.overlap_grad_reduce is not None:
        return args.overlap_grad_reduce
    small = args.sft_type != "full"  # an adapter has little to reduce
    return (
        parallel.device == "cuda"
        and args.cuda_graphs != "true"
        and not small
        and rank_weights(config, parallel) >= OVERLAP_FROM
    )


def accumulation(args: SftArguments, world_size: int) -> int:
    """gradient_accumulation_steps, by default ceil(16 / batch_size / world_size)."""
    return args.gradient_accumulation_steps or math.ceil(16 / args.batch_size / world_size)


def global_batch_size(args: SftArguments, world_size: int) -> int:
    """Rows in one step. The world size counts all processes: tp, pp and cp multiply it too, as in the document."""
    return args.batch_size * accumulation(args, world_size) * world_size


def _batch(args: SftArguments, world: World, earlier_batch: int | None) -> Batch:
    rows = earlier_batch or global_batch_size(args, world.size)
    steps, rest = divmod(rows, args.batch_size * world.size)
    copies = max(1, world.size // (args.tp * args.pp * args.cp))
    return Batch(
        micro_batch_size=args.batch_size,
        global_batch_size=rows,
        micro_batches=rows // (args.batch_size * copies),
        gradient_accumulation_steps=None if rest else steps,
        of_earlier_run=earlier_batch is not None,
        max_length=args.max_length,
        packing=args.packing,
        padding_free=args.padding_free,
        group_by_length=args.group_by_length,
        workers=args.dataloader_num_workers,
    )


def train_iters(args: SftArguments, train_rows: int, global_batch_size: int) -> int:
    """Steps of the run."""
    if (tokens := asked_tokens(args)) is not None:
        return -(-tokens // (global_batch_size * args.max_length))
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(train_rows * args.num_train_epochs / global_batch_size)


def asked_tokens(args: SftArguments) -> int | None:
    """Tokens that a run over text shall train on; None where something else tells its length."""
    return count_of(args.train_tokens, "train_tokens") if isinstance(args, PtArguments) and args.train_tokens else None


def min_lr(args: SftArguments) -> float:
    """The learning rate of the last step, by default a tenth of the largest."""
    return 0.1 * args.learning_rate if args.min_lr is None else args.min_lr


def _schedule(args: SftArguments, steps: int, first_step: int) -> Schedule:
    warmup, tokens = min(asked_warmup(args, steps), steps), asked_tokens(args)
    return Schedule(
        train_iters=steps,
        first_step=first_step,
        epochs=None if args.max_steps > 0 or tokens is not None else args.num_train_epochs,
        decay_style=DECAY_STYLES[args.lr_scheduler_type],
        warmup_iters=warmup,
        # Megatron counts warm-up into the decay and wants decay > warm-up; the last step then has exactly min_lr.
        decay_iters=max(steps, warmup + 1),
        wsd_decay_iters=max(1, math.ceil(0.1 * (steps - warmup))),
        learning_rate=args.learning_rate,
        min_lr=min_lr(args),
        tokens=tokens,
    )


def asked_warmup(args: SftArguments, steps: int) -> int:
    """Steps of warm-up that the options ask for, in a run of so many steps."""
    return args.warmup_steps if args.warmup_steps > 0 else math.ceil(steps * args.warmup_ratio)


def warmup_note(args: SftArguments, steps: int) -> str:
    """A sentence on a warm-up that leaves no step at the full learning rate, else nothing."""
    asked = asked_warmup(args, steps)
    if asked < steps or steps <= 1:
        return ""
    given = f"--warmup_steps {asked}" if args.warmup_steps > 0 else f"--warmup_ratio {args.warmup_ratio:g}"
    what = f"is longer than the run: it is cut to {steps} steps" if asked > steps else "is the whole run"
    return f"the warm-up ({given}) {what}, and the learning rate rises until the last one and never falls."
