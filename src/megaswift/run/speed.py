"""How long a step takes, by cause: arithmetic, with what known cards reached (cards.tsv) and what was measured of launching kernels.

Beside measurements, and what it leaves out: docs/plan.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megaswift.models import family_of
from megaswift.models.family import sizes_of
from megaswift.models.kinds import Kind
from megaswift.models.stages import stage_layers
from megaswift.models.tally import stage_of_layers, tally, trained_tally
from megaswift.run.activations import tokens_of
from megaswift.run.cards import CPU, Card
from megaswift.run.experts import mlp_parts
from megaswift.run.memory import MemoryEstimate
from megaswift.run.spec import Run
from megaswift.weights.dtypes import BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LATENCY = 25e-6  # s of one collective
HIDDEN_SHARE = 0.9  # of what is sent while the backward pass goes on, if it lasts long enough:
BEHIND = 0.4  # of a micro batch's time is behind which it can hide
HOST_BYTES = 44e9  # a second over PCIe, both ways at once: 18.5 GB in 0.42 s, measured
UPDATE_BYTES = {"fp32": 34, "bf16": 27, "8bit": 25}  # read and written a parameter by AdamW and the gradient norm
STATE_ON_HOST = {"fp32": 12, "bf16": 8, "8bit": 6}
# Seconds a billion weights each time they are made anew of few bits, on an H200.
UNPACKING = {4: 0.9e-3, 8: 3.3e-3}
NARROW_HEADS, NARROW_PRODUCTS = 0.85, 0.94  # of the rate, with heads of 64 or less, and a hidden size below 1,024
WIDE_HEADS = 0.35  # of attention's rate, with heads wider than 128, for which FlashAttention 4 has no kernel
GROWTH = 0.15  # of attention's rate with each doubling of the row's length beyond 4,096, a third at most
THIN_ROWS = 4.0  # times as long as its bytes say takes what adapters of experts multiply
# Kernels of a layer, forward and backward, in steps that were bound by launching them.
LAYER_KERNELS, SEQUENCE_KERNELS, CONTEXT_KERNELS, ADAPTER_KERNELS, EXPERT_KERNELS, ROUTED_ADAPTER_KERNELS = 26, 4, 4, 16, 26, 8
HEAD_KERNELS = 40
AGAIN = 1.2  # times as many in a layer that is computed again: 1.07 and 1.41 on two machines


@dataclass(frozen=True)
class Speed:
    """One step, on all ranks together.

    Attributes:
        flops: of the model: what a step multiplies, without what is computed again.
        done: with that.
        seconds: of the slowest rank, by cause.
        tokens: rows of max_length.
        launching: whether launching kernels takes longer than they do.
    """

    flops: float
    done: float
    seconds: dict[str, float]
    tokens: int
    gpus: int
    launching: bool

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def per_gpu(self) -> float:
        return self.tokens_per_second / self.gpus


@dataclass
class _Work:
    """Of one micro batch on one rank."""

    products: float = 0.0  # FLOPs
    grouped: float = 0.0
    attention: float = 0.0
    moved: float = 0.0  # bytes
    unpacked: float = 0.0  # weights
    kernels: float = 0.0


def speed_of(run: Run, config: PreTrainedConfig, memory: MemoryEstimate, card: Card, cores: int = 1) -> Speed:
    """The time of a step.

    Args:
        memory: of the same run, which says what is computed again.
        cores: of each process, on a CPU.
    """
    parallel, how = run.parallel, memory.recompute
    on_cpu = card.name == CPU
    scale = cores if on_cpu else 1
    narrow = NARROW_PRODUCTS if sizes_of(config).hidden < 1024 else 1.0
    width = sizes_of(config).head_dim
    attending = card.attention * (NARROW_HEADS if width <= 64 else WIDE_HEADS if width > 128 else 1.0)
    attending *= min(max(1 + GROWTH * math.log2(run.batch.max_length / 4096), 0.5), 1.35)
    ranks = [_work(run, config, how, rank) for rank in range(parallel.pp)]
    micro = max(run.batch.micro_batches, 1)

    def busy(work: _Work) -> dict[str, float]:
        bits = run.method.adapter.bits if run.method.adapter is not None else None
        return {
            "products": (work.products / (card.products * narrow) + work.grouped / card.grouped) / scale,
            "attention": work.attention / attending / scale,
            "other kernels": work.moved / card.bytes + work.unpacked * UNPACKING.get(bits or 0, 0.0) / 1e9,
        }

    slowest = max(ranks, key=lambda work: sum(busy(work).values()))
    parts = busy(slowest)
    sent = _sent(run, config, card, how)
    parts |= {name: value for name, value in sent.items() if value}
    floor = 0.0 if _graphs(run, config) else slowest.kernels * card.launch
    waiting = max(0.0, floor - sum(parts.values()))
    if waiting:
        parts["launching"] = waiting
    seconds = {name: value * micro for name, value in parts.items()}
    turns = sum(seconds.values())
    if parallel.pp > 1:
        seconds["bubble"] = turns * (parallel.pp - 1) / (micro * parallel.vpp)
    seconds |= _once(run, config, memory, card, micro, turns / micro)
    tokens = run.batch.global_batch_size * run.batch.max_length * run.objective.answers
    flops, done = _flops(run, config, how, tokens)
    return Speed(flops, done, seconds, tokens, parallel.world_size, waiting > 0)


def _work(run: Run, config: PreTrainedConfig, how: str, rank: int) -> _Work:
    """What a rank of a pipeline stage does with one micro batch."""
    parallel, sizes, tokens, made = run.parallel, sizes_of(config), tokens_of(run), _Work()
    element, tp, kinds = BYTES[run.precision.dtype], run.parallel.tp, family_of(config.model_type).layers(config)
    adapter = run.method.adapter
    stage_of = stage_of_layers(stage_layers(config, parallel.pp, parallel.vpp))
    own = {layer for layer, stage in enumerate(stage_of) if stage % parallel.pp == rank}
    passes = _passes_of_products(run, config)
    again = 2.0 if how == "layers" else 0.0
    for group, size in tally(config).items():
        if group.layer not in own or not group.matrix:
            continue
        experts = kinds[group.layer].experts
        if group.expert and experts is not None:
            made.grouped += (passes + again) * size * experts.chosen / experts.count * tokens / tp
        else:
            made.products += (passes + again) * size * tokens / (tp if group.split else 1)
        if group.packable:
            share = parallel.ep * parallel.etp if group.expert else tp
            made.unpacked += size / share * (3 if how == "layers" else 2)
    for layer in own:
        kind = kinds[layer]
        _add_layer(made, kind, run, config, how, tokens, element)
    if adapter is not None:
        for group, values in trained_tally(config, adapter, ()).items():
            if group.layer in own and group.matrix:
                experts = kinds[group.layer].experts
                rows = THIN_ROWS * experts.chosen / experts.count if group.expert and experts is not None else 1.0
                made.moved += 2.6 * values / adapter.rank * rows * tokens / tp * element * (4 / 3 if how == "layers" else 1)
    if rank == parallel.pp - 1:
        head = sizes.vocab * sizes.hidden / tp
        made.products += passes * head * tokens
        made.moved += 3 * element * sizes.vocab / tp * tokens
        made.kernels += HEAD_KERNELS
    return made


def _add_layer(made: _Work, kind: Kind, run: Run, config: PreTrainedConfig, how: str, tokens: int, element: int) -> None:
    """Attention, and what is bound by memory: norms, rotation, SwiGLU, rows of experts; kernels."""
    sizes, parallel, adapter = sizes_of(config), run.parallel, run.method.adapter
    tp, along, once_more = parallel.tp, parallel.tp if parallel.sequence_parallel else 1, 4 / 3 if how == "layers" else 1.0
    length = run.batch.max_length if kind.window is None else min(run.batch.max_length, 2 * kind.window)
    heads, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    if kind.delta is None:
        made.attention += 6 * heads * length * tokens / tp * (1.3 if how == "layers" else 1.0)
    values: float = 18 * sizes.hidden / along + 4 * (heads + 2 * keys) / tp
    if kind.qk_norm or kind.qk_norm_rotated:
        values += 14 * (heads + keys) / tp
    experts, kernels = kind.experts, float(LAYER_KERNELS)
    if experts is None:
        values += 8 * sizes.ffn / tp
        if how == "layers":  # its last product is left out
            made.products -= 2 * sizes.ffn * sizes.hidden / tp * tokens
        elif how == "mlp":
            made.products += 2 * mlp_parts(config) * sizes.ffn * sizes.hidden / tp * tokens
    else:
        values += experts.chosen * (8 * experts.ffn + 12 * sizes.hidden) / tp + 8 * experts.shared_ffn / tp
        kernels += EXPERT_KERNELS
        if adapter is None:  # gradients of all matrices are put into fp32
            made.moved += 8.0 * 3 * experts.count * experts.ffn * sizes.hidden / (parallel.ep * parallel.etp)
        elif any(".experts." in name for name in adapter.targets[-3:]):
            kernels += ROUTED_ADAPTER_KERNELS
    kernels += SEQUENCE_KERNELS * parallel.sequence_parallel + CONTEXT_KERNELS * (parallel.cp > 1)
    kernels += ADAPTER_KERNELS * (adapter is not None)
    made.kernels += kernels * (AGAIN if how == "layers" else 1.0)
    made.moved += values * element * tokens * once_more


def _passes_of_products(run: Run, config: PreTrainedConfig) -> float:
    """FLOPs a weight and token: forward and the input's gradient 2 each, and 2 for what is trained."""
    if run.method.adapter is not None:
        return 4.0
    if run.method.frozen:
        return 4.0 + 2.0 * sum(trained_tally(config, None, run.method.frozen).values()) / sum(tally(config).values())
    return 6.0


def _graphs(run: Run, config: PreTrainedConfig) -> bool:
    """Whether layers are replayed as CUDA graphs where launching takes the time."""
    if run.memory.cuda_graphs != "if launching is slow":
        return run.memory.cuda_graphs == "always"
    parallel, plain = run.parallel, run.method.adapter is None and run.memory.recompute != "layers"
    alone = parallel.model_size == parallel.ep == 1 and not parallel.overlap_grad_reduce
    experts = any(kind.experts is not None for kind in family_of(config.model_type).layers(config))
    return plain and alone and not experts and run.precision.attention == "fastest" and not run.precision.deterministic


def _sent(run: Run, config: PreTrainedConfig, card: Card, how: str) -> dict[str, float]:
    """Seconds of what ranks send each other for one micro batch."""
    parallel, sizes, tokens, element = run.parallel, sizes_of(config), tokens_of(run), BYTES[run.precision.dtype]
    layers = max(1, sizes.layers // parallel.pp)
    found = {"tensor parallel": 0.0, "context parallel": 0.0, "experts exchanged": 0.0}
    hidden = tokens * sizes.hidden * element
    if parallel.tp > 1:  # column-row pairs: two sums forward, two backward
        times = 6 if how == "layers" else 4
        found["tensor parallel"] = layers * times * (hidden * 2 * (parallel.tp - 1) / parallel.tp / card.link + LATENCY)
    if parallel.cp > 1:  # keys and values gathered, their gradients scattered
        keys = tokens * parallel.cp * 2 * sizes.kv_heads * sizes.head_dim * element / parallel.tp
        found["context parallel"] = layers * 2 * (keys * (parallel.cp - 1) / parallel.cp / card.link + LATENCY)
    ranks = parallel.ep * parallel.etp
    if ranks > 1:
        kinds = [kind.experts for kind in family_of(config.model_type).layers(config) if kind.experts is not None]
        rows = sum(one.chosen for one in kinds) / parallel.pp * hidden * parallel.etp / parallel.tp
        found["experts exchanged"] = (6 if how == "layers" else 4) * (rows * (ranks - 1) / ranks / card.link)
        found["experts exchanged"] += len(kinds) / parallel.pp * 8 * LATENCY
    return found


def _once(run: Run, config: PreTrainedConfig, memory: MemoryEstimate, card: Card, micro: int, turn: float) -> dict[str, float]:
    """Seconds of what a step does once: gradients summed up and reduced, the update.

    Args:
        turn: seconds of a micro batch, behind whose backward pass gradients may be sent.
    """
    parallel, element = run.parallel, BYTES[run.precision.dtype]
    own = memory.device["gradients"] / 4  # trained parameters of a rank
    shares = parallel.dp * parallel.cp
    state = own / (parallel.expert_dp if parallel.ep > 1 else shares)
    kind = run.optimizer.state_dtype
    found = {"adding gradients": own * 8 * (micro - 1) / card.bytes, "update": state * UPDATE_BYTES[kind] / card.bytes}
    if shares > 1:
        sent = own * (4 + element) * (shares - 1) / shares / card.link
        hidden = min(HIDDEN_SHARE * sent, BEHIND * turn) if parallel.overlap_grad_reduce else 0.0
        found["reducing gradients"] = sent - hidden
    if run.memory.optimizer_on_host:
        found["optimizer over PCIe"] = state * STATE_ON_HOST[kind] / HOST_BYTES
    if run.memory.offloaded_layers:
        found["activations over PCIe"] = memory.host["activations"] * micro / HOST_BYTES
    return {name: value for name, value in found.items() if value}


def _flops(run: Run, config: PreTrainedConfig, how: str, tokens: int) -> tuple[float, float]:
    """FLOPs of the model a step, and with what is computed again."""
    sizes, kinds = sizes_of(config), family_of(config.model_type).layers(config)
    inside = 0.0
    for group, size in tally(config).items():
        if group.layer >= 0 and group.matrix:
            experts = kinds[group.layer].experts
            inside += size * experts.chosen / experts.count if group.expert and experts is not None else size
    passes = _passes_of_products(run, config)
    heads = sizes.heads * sizes.head_dim
    length = run.batch.max_length
    scores = sum(6 * heads * min(length, 2 * (kind.window or length)) for kind in kinds if kind.delta is None)
    model = tokens * (passes * (inside + sizes.vocab * sizes.hidden) + scores)
    more = tokens * (2 * inside + scores / 3) if how == "layers" else 0.0
    return model, model + more


__all__ = ["Speed", "speed_of"]
