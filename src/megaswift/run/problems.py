"""What is wrong with a run: every reason why it cannot be, with what to change; a planner searches without exceptions.

`contradictions` judges wishes that exclude each other, `problems` what was resolved, `layout_problems` a layout alone. Ranges
of single options stand in their declarations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from megaswift.config.options import SftArguments
from megaswift.errors import DataError, UserError
from megaswift.models import family_of
from megaswift.models.family import sizes_of
from megaswift.models.lengths import trained_length
from megaswift.models.stages import by_rank, stage_layers
from megaswift.run.experts import expert_layout_problems, expert_problems, mlp_parts, mlp_widths
from megaswift.run.objective import objective_contradictions, objective_problems
from megaswift.run.problem import Problem, divisors, nearest_sizes
from megaswift.run.spec import FP8_MULTIPLE, Parallel, Run

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def refuse(found: Iterable[Problem]) -> None:
    """Raise the first problem: UserError, or DataError where the rows are at fault."""
    for problem in found:
        raise (DataError if problem.of_data else UserError)(problem.what, where=problem.where, fix=problem.fix)


def contradictions(args: SftArguments) -> Iterator[Problem]:
    """Options that exclude each other."""
    if args.gradient_checkpointing and args.recompute_modules in ("swiglu", "mlp"):
        yield Problem(
            f"--gradient_checkpointing true recomputes whole layers, --recompute_modules {args.recompute_modules} parts of them.",
            where="--recompute_modules",
            fix="give one of the two",
        )
    if args.overlap_param_gather and not args.overlap_grad_reduce:
        yield Problem(
            "--overlap_param_gather true works only together with --overlap_grad_reduce true.",
            where="--overlap_param_gather",
            fix="give both, or neither",
        )
    if args.cuda_graphs == "true" and args.overlap_grad_reduce:
        yield _no_graphs("--overlap_grad_reduce true")
    yield from objective_contradictions(args)


def problems(run: Run, config: PreTrainedConfig) -> Iterator[Problem]:
    """Everything that is wrong with a run, in the order in which a user should hear of it."""
    yield from _numbers(run)
    yield from objective_problems(run)
    yield from _device(run)
    yield from layout_problems(config, run.parallel)
    yield from expert_problems(run, config)
    yield from _turns(run)
    yield from _offload(run, config)
    yield from _fp8(run, config)
    yield from _flash(run, config)
    yield from _fp16(run)
    yield from _steps(run)


def _numbers(run: Run) -> Iterator[Problem]:
    """Values that do not go together, whatever the model."""
    if run.parallel.cp > 1 and run.precision.attention != "fastest":
        yield Problem(
            "--cp above 1 has one attention kernel of its own.", where="--use_flash_attn", fix="leave it out, or use --cp 1"
        )
    if run.memory.cuda_graphs == "always":
        others = {
            "--tp, --pp and --cp above 1": run.parallel.model_size > 1,
            "--deterministic": run.precision.deterministic,
            "--use_flash_attn": run.precision.attention != "fastest",
            "--overlap_grad_reduce true": run.parallel.overlap_grad_reduce,
            "--fp8": run.precision.fp8,
            "--ep above 1": run.parallel.ep > 1,
            "--cpu_offloading_num_layers": run.memory.offloaded_layers > 0,
        }
        yield from (_no_graphs(name) for name, given in others.items() if given)
    if run.schedule.min_lr > run.schedule.learning_rate:
        yield Problem(
            f"--min_lr {run.schedule.min_lr:g} is above --learning_rate {run.schedule.learning_rate:g}.",
            where="--min_lr",
            fix="leave it out for a tenth of --learning_rate, or give a smaller one",
        )


def _no_graphs(name: str) -> Problem:
    return Problem(
        f"--cuda_graphs true does not work with {name}.",
        where="--cuda_graphs",
        fix="leave --cuda_graphs out: graphs are then used wherever they work and help",
    )


def _device(run: Run) -> Iterator[Problem]:
    """What needs a GPU where there is none."""
    if run.parallel.device == "cuda":
        return
    if run.memory.cuda_graphs == "always":
        yield Problem("--cuda_graphs true needs an NVIDIA GPU, and none is here.", where="--cuda_graphs", fix="leave it out")
    offloads = {
        "optimizer_cpu_offload": run.memory.optimizer_on_host,
        "cpu_offloading_num_layers": run.memory.offloaded_layers > 0,
    }
    for name, given in offloads.items():
        if given:
            yield Problem(
                f"--{name} needs a GPU: this run is on the CPU, whose memory is the host's already.",
                where=f"--{name}",
                fix="leave it out",
            )


def layout_problems(config: PreTrainedConfig, parallel: Parallel) -> Iterator[Problem]:
    """What is wrong with splitting a model this way, with the nearest values that would be right."""
    sizes, tp, pp, cp = sizes_of(config), parallel.tp, parallel.pp, parallel.cp
    if min(tp, pp, cp) < 1:
        yield Problem(f"--tp {tp}, --pp {pp} and --cp {cp} must be at least 1.", where="--tp, --pp, --cp")
        return
    widths = mlp_widths(config)
    heads = [("attention heads", sizes.heads), ("key/value heads", sizes.kv_heads)]
    delta = next((kind.delta for kind in family_of(config.model_type).layers(config) if kind.delta is not None), None)
    if delta is not None:
        heads.append(("key heads of linear attention", delta.key_heads))
    for name, size in [*heads, *(("feed-forward size", width) for width in widths)]:
        if size % tp:
            legal = divisors(math.gcd(*(count for _, count in heads), *widths))
            yield Problem(
                f"--tp {tp} does not divide the model's {size} {name}.",
                where="--tp",
                fix=f"nearest legal values: {nearest_sizes(tp, legal)}",
            )
    if delta is not None and delta.key_heads % tp == 0 and delta.key_heads // tp % cp:
        legal = divisors(delta.key_heads // tp)
        yield Problem(
            f"--cp {cp} does not divide the {delta.key_heads // tp} key heads of linear attention that a rank of --tp {tp} has: "
            "ranks that share a row take whole rows of some heads each there.",
            where="--cp",
            fix=f"nearest legal values: {nearest_sizes(cp, legal)}",
        )
    if sizes.layers < pp:
        yield Problem(
            f"--pp {pp} is more than the model's {sizes.layers} layers: each stage has one at least.",
            where="--pp",
            fix=f"use at most {sizes.layers}",
        )
    yield from _chunks(sizes.layers, pp, parallel.vpp)
    if parallel.sequence_parallel and tp == 1:
        yield Problem(
            "--sequence_parallel true needs --tp above 1.", where="--sequence_parallel", fix="leave it out, or raise --tp"
        )
    if parallel.world_size % parallel.model_size:
        product, shared = f"tp {tp} x pp {pp}", ""
        if cp > 1:
            product, shared = f"{product} x cp {cp}", " / --cp"
        yield Problem(
            f"{parallel.world_size} processes cannot hold {product}: {parallel.model_size} are needed, or a multiple.",
            where="NPROC_PER_NODE x NNODES",
            fix=f"NPROC_PER_NODE={parallel.model_size}, or another --tp / --pp{shared} whose product divides {parallel.world_size}",
        )
    yield from expert_layout_problems(config, parallel)


def _chunks(layers: int, pp: int, vpp: int) -> Iterator[Problem]:
    """Chunks of stages that there are no layers for, or nothing to wait for."""
    if vpp > 1 and pp == 1:
        yield Problem(
            f"--vpp {vpp} needs --pp above 1: chunks of one stage have no other stage to wait for.",
            where="--vpp",
            fix=f"leave it out{_up_to(layers // vpp)}",
        )
    elif vpp > 1 and pp * vpp > layers:
        yield Problem(
            f"--pp {pp} x --vpp {vpp} is more than the model's {layers} layers: each chunk has one at least.",
            where="--vpp",
            fix=f"use --vpp {layers // pp}" if layers >= 2 * pp else f"leave it out{_up_to(layers // vpp)}",
        )


def _up_to(pp: int) -> str:
    """The numbers of stages that have as many chunks as were asked for, as another way out."""
    return "" if pp < 2 else ", or use --pp 2" if pp == 2 else f", or use --pp 2 to {pp}"


def _turns(run: Run) -> Iterator[Problem]:
    """Too few micro batches for chunks to take turns: each has its turn when as many as there are stages have passed it."""
    parallel, batch = run.parallel, run.batch
    if parallel.vpp == 1 or batch.micro_batches >= parallel.pp:
        return
    rows = batch.global_batch_size // parallel.dp
    fits = [size for size in divisors(rows) if rows // size >= parallel.pp]
    yield Problem(
        f"--vpp {parallel.vpp} at --pp {parallel.pp} needs {parallel.pp} micro batches a step on each data-parallel rank, "
        f"there are {batch.micro_batches}.",
        where="--vpp, --batch_size",
        fix=f"use --batch_size {max(fits)}, or leave --vpp out" if fits else "leave --vpp out, or use a smaller --pp",
    )


def _offload(run: Run, config: PreTrainedConfig) -> Iterator[Problem]:
    parallel, wanted = run.parallel, run.memory.offloaded_layers
    layers = min(by_rank(stage_layers(config, parallel.pp, parallel.vpp), parallel.pp))
    if not 0 <= wanted <= layers:
        yield Problem(
            f"--cpu_offloading_num_layers {wanted} is not between 0 and the {layers} layers of a process.",
            where="--cpu_offloading_num_layers",
            fix=f"use at most {layers}",
        )


def _fp8(run: Run, config: PreTrainedConfig) -> Iterator[Problem]:
    """FP8 and the precision, and the size of each rank's part of every linear layer."""
    if not run.precision.fp8:
        return
    dtype, tp, sizes = run.precision.dtype, run.parallel.tp, sizes_of(config)
    if dtype != "bf16":
        yield Problem(f"--fp8 goes with bf16 training; this is {dtype}.", where="--fp8, --dtype", fix="use --dtype bf16")
        return
    if any(kind.delta is not None for kind in family_of(config.model_type).layers(config)):
        yield Problem(
            "--fp8 with layers of linear attention was never compared with bf16.", where="--fp8", fix="leave --fp8 out"
        )
        return
    parts = {  # sizes of the results and inputs of a rank's products
        "linear_qkv": ((sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim // tp, sizes.hidden),
        "linear_proj": (sizes.hidden, sizes.heads * sizes.head_dim // tp),
        "linear_fc1": (mlp_parts(config) * sizes.ffn // tp, sizes.hidden),
        "linear_fc2": (sizes.hidden, sizes.ffn // tp),
    }
    for name, shape in parts.items():
        if any(size % FP8_MULTIPLE for size in shape):
            yield Problem(
                f"--fp8 needs matrices whose sides are multiples of {FP8_MULTIPLE}; {name} is {shape[0]} x {shape[1]} on each rank of --tp {tp}.",
                where="--fp8, --tp",
                fix="use a smaller --tp, or leave --fp8 out" if tp > 1 else "leave --fp8 out",
            )


def _flash(run: Run, config: PreTrainedConfig) -> Iterator[Problem]:
    """PyTorch's flash kernel by name, and layers that it does not know."""
    if run.precision.attention != "flash":
        return
    kinds = family_of(config.model_type).layers(config)
    windows = sorted({kind.window for kind in kinds if kind.window is not None and kind.window < run.batch.max_length})
    capped, sinks = any(kind.score_cap is not None for kind in kinds), any(kind.sinks for kind in kinds)
    if windows or capped or sinks:
        what = f"a window of {windows[0]} tokens" if windows else "a cap of the scores" if capped else "sinks"
        yield Problem(
            f"--use_flash_attn true asks for a kernel that does not know {what}, which layers of this model have.",
            where="--use_flash_attn",
            fix="leave it out: the fastest way that is right is then chosen for each layer",
        )


def _fp16(run: Run) -> Iterator[Problem]:
    """An optimizer that only our update has: fp16's loss scaler needs Megatron-Core's own."""
    if run.precision.dtype != "fp16":
        return
    small = {"bf16": "--optim adamw_bf16", "8bit": "--optim adamw_8bit"}.get(run.optimizer.state_dtype, "")
    for given, name, plain in (
        (bool(small), small, "--optim adamw_torch"),
        (run.memory.optimizer_on_host, "--optimizer_cpu_offload true", "--optimizer_cpu_offload false"),
    ):
        if given:
            yield Problem(
                f"{name} does not work with fp16: its loss scaler needs Megatron-Core's own update.",
                where=f"{name.split()[0]}, --dtype",
                fix=f"use --dtype bf16, or {plain}",
            )


def _steps(run: Run) -> Iterator[Problem]:
    """Whether there is anything to do; rows that are not known yet say nothing."""
    if not run.data.train:
        return
    if run.data.train_rows == 0:
        yield Problem(
            "no row is left to train on.",
            where="--dataset",
            fix="see the counts above; give more data, or a larger --max_length",
            of_data=True,
        )
    if run.schedule.train_iters < 1:
        yield Problem("the run would have no step.", where="--num_train_epochs, --max_steps", fix="ask for at least one step")


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
