"""The one estimate of memory and disk: bytes of the fullest rank by cause, and of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megaswift.models import family_of, parameters_of
from megaswift.models.adapters import Lora
from megaswift.models.family import is_tied, padded_vocab
from megaswift.models.stages import by_rank, stage_layers
from megaswift.models.tally import BEFORE, Tally, stage_of_layers, tally, trained_tally
from megaswift.run.activations import beside_layers, head_bytes, kept_in_flight, layer_activations
from megaswift.run.spec import Parallel, Run
from megaswift.weights.dtypes import BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.models.parameters import Parameter

# Bytes of a parameter's two moments.
STATE_BYTES = {"fp32": 8, "bf16": 4, "8bit": 2}
GRADIENT_BYTES = MASTER_BYTES = 4
# Of a value and its part of a scale: (bits, whether scales are held in 8 bits themselves). A row in 8 bits has one scale.
PACKED_BYTES = {(4, False): 0.5 + 4 / 64, (4, True): 0.5 + 1 / 64, (8, False): 1.0}
# What a GPU holds outside of torch's allocator: driver and kernels, buffers of a communicator, and by gaps between tensors.
CONTEXT_BYTES, COMMUNICATOR_BYTES, GAPS = 600 << 20, 400 << 20, 0.02
SHORT = 0.8  # of the memory that is free, what activations may take before SwiGLU's result is computed again


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by cause, of the fullest rank."""

    device: dict[str, int]  # what lies there all the time: weights, gradients, optimizer
    host: dict[str, int] = field(default_factory=dict)  # page-locked: optimizer, activations at most
    working: dict[str, int] = field(
        default_factory=dict
    )  # of a step: activations, and the larger of `head` and `layer` at a time
    outside: dict[str, int] = field(default_factory=dict)  # of torch's allocator: context, communication, gaps
    saving: dict[str, int] = field(default_factory=dict)  # while a checkpoint is on its way: host memory
    parts: dict[str, int] = field(default_factory=dict)  # of `device`: what adapters and experts have of it
    stage: int = 0  # pipeline rank
    recompute: str = "none"  # what is computed again, where that follows from the memory

    @property
    def peak(self) -> int:
        """The most that torch's allocator holds at once: `torch.cuda.max_memory_allocated`."""
        now = self.working
        return sum(self.device.values()) + now.get("activations", 0) + max(now.get("head", 0), now.get("layer", 0))

    @property
    def needed(self) -> int:
        """What the card must have."""
        return self.peak + sum(self.outside.values())


def estimate(run: Run, config: PreTrainedConfig, card_bytes: int | None = None) -> MemoryEstimate:
    """What the fullest rank holds, and where.

    Args:
        card_bytes: of the GPU, which decides about "swiglu if short"; None: there is enough.
    """
    return max(estimates(run, config, card_bytes), key=lambda one: one.peak)


def estimates(run: Run, config: PreTrainedConfig, card_bytes: int | None = None) -> list[MemoryEstimate]:
    """The same of each pipeline rank."""
    how = _recompute(run, config, card_bytes)
    run = replace(run, memory=replace(run.memory, recompute=how))  # type: ignore[arg-type]
    element, parallel = BYTES[run.precision.dtype], run.parallel
    kept, head, layer = kept_in_flight(run, config), head_bytes(run, config), beside_layers(run, config)
    found = []
    for rank, held in enumerate(_held(run, config)):
        working = {"activations": kept[rank] * element, "head": head if rank == parallel.pp - 1 else 0, "layer": layer}
        made = replace(held, working=working, stage=rank, recompute=how)
        found.append(replace(made, outside=_outside(run, made.peak)))
    return found


def _recompute(run: Run, config: PreTrainedConfig, card_bytes: int | None) -> str:
    """As the ranks decide when weights and gradients are in place (`train/setup.py`)."""
    if run.memory.recompute != "swiglu if short":
        return run.memory.recompute
    if run.parallel.device == "cpu" or card_bytes is None:
        return "none"
    held = max(sum(one.device.values()) for one in _held(run, config))
    free = card_bytes - CONTEXT_BYTES - held
    return "swiglu" if short_of(run, config, free) else "none"


def short_of(run: Run, config: PreTrainedConfig, free: int) -> bool:
    """Whether what layers keep would take more than four fifths of so many free bytes."""
    counts = by_rank(stage_layers(config, run.parallel.pp, run.parallel.vpp), run.parallel.pp)
    layers = max(counts) - run.memory.offloaded_layers  # that stay on the device
    return layers * layer_activations(run, config) * BYTES[run.precision.dtype] > SHORT * free


def _outside(run: Run, peak: int) -> dict[str, int]:
    if run.parallel.device == "cpu":
        return {}
    parallel = run.parallel
    sizes = (parallel.dp * parallel.cp, parallel.tp, parallel.pp, parallel.ep * parallel.etp)
    groups = sum(size > 1 for size in sizes)
    return {"context": CONTEXT_BYTES, "communication": groups * COMMUNICATOR_BYTES, "gaps": int(GAPS * peak)}


def _held(run: Run, config: PreTrainedConfig) -> list[MemoryEstimate]:
    """What each pipeline rank has in memory between two steps."""
    dtype, method, parallel = run.precision.dtype, run.method, run.parallel
    element, adapter = BYTES[dtype], method.adapter
    base = _by_rank(tally(config), config, parallel)
    trained = _by_rank(trained_tally(config, adapter, method.frozen), config, parallel)
    state_bytes = STATE_BYTES[run.optimizer.state_dtype] + (0 if dtype == "fp32" else MASTER_BYTES)
    packed = PACKED_BYTES[adapter.bits, adapter.double] if adapter is not None and adapter.bits is not None else element
    found = []
    for whole, own in zip(base, trained, strict=True):
        held = int(whole.packable * packed + (whole.all - whole.packable) * element)
        state = own.dense * state_bytes // (parallel.dp * parallel.cp) + own.experts * state_bytes // parallel.expert_dp
        more = own.all * element if adapter is not None else 0
        device, host = {"weights": held + more, "gradients": own.all * GRADIENT_BYTES, "optimizer": state}, {}
        if run.memory.optimizer_on_host:
            device["optimizer"], host["optimizer"] = 0, state
        if run.memory.offloaded_layers:
            host["activations"] = run.memory.offloaded_layers * layer_activations(run, config) * element
        parts = {"experts": int(whole.experts * (packed if whole.packable else element))} if whole.experts else {}
        if adapter is not None:
            parts["adapters"] = more + own.all * GRADIENT_BYTES + device["optimizer"]
        written = state + (own.all if adapter is not None else whole.all) * element // parallel.dp
        found.append(MemoryEstimate(device, host, saving={"host": written} if run.saving.in_background else {}, parts=parts))
    return found


@dataclass
class _Values:
    """Values on a rank: of experts among which tokens are routed, of all else, and those of both that can be held in few bits."""

    dense: int = 0
    experts: int = 0
    packable: int = 0

    @property
    def all(self) -> int:
        return self.dense + self.experts


def _by_rank(groups: Tally, config: PreTrainedConfig, parallel: Parallel) -> list[_Values]:
    """What a rank of each pipeline stage has of the groups; a tied embedding's copy on the last one counts."""
    stage_of, found = (
        stage_of_layers(stage_layers(config, parallel.pp, parallel.vpp)),
        [_Values() for _ in range(parallel.pp)],
    )
    for group, size in groups.items():
        parts = (parallel.etp if group.split else 1) * parallel.ep if group.expert else parallel.tp if group.split else 1
        ranks = [stage_of[group.layer] % parallel.pp if group.layer >= 0 else 0 if group.layer == BEFORE else parallel.pp - 1]
        if group.table and is_tied(config) and parallel.pp > 1:
            ranks = [0, parallel.pp - 1]
        here = size // parts
        if group.table:  # with rows that only let the vocabulary be cut
            here = size // config.vocab_size * (padded_vocab(config.vocab_size, parallel.tp) // parallel.tp)
        for rank in ranks:
            own = found[rank]
            if group.expert:
                own.experts += here
            else:
                own.dense += here
            own.packable += here if group.packable else 0
    return found


def rank_weights(config: PreTrainedConfig, parallel: Parallel) -> int:
    """Parameters of the fullest rank."""
    return max(own.all for own in _by_rank(tally(config), config, parallel))


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the whole model, tied weights counted once."""
    return sum(tally(config).values())


def trained_count(adapter: Lora | None, frozen: Sequence[str], config: PreTrainedConfig) -> int:
    """How many values are trained."""
    return sum(trained_tally(config, adapter, tuple(frozen)).values())


def checkpoint_bytes(
    config: PreTrainedConfig, dtype: str, only_model: bool, adapter: Lora | None = None, frozen: Sequence[str] = ()
) -> int:
    """Bytes of one checkpoint: the weights, or an adapter, and unless `only_model` fp32 masters and moments of what is trained."""
    trained = trained_count(adapter, frozen, config)
    saved = parameter_count(config) if adapter is None else trained
    return saved * BYTES[dtype] + (0 if only_model else trained * 12)


def first_rank(run: Run, config: PreTrainedConfig) -> tuple[int, int]:
    """Parameters of rank 0 with those of an adapter, and how many of them are trained."""
    method, own = run.method, trained_tally(config, run.method.adapter, run.method.frozen)
    base, trained = (_by_rank(groups, config, run.parallel)[0].all for groups in (tally(config), own))
    return base + (trained if method.adapter is not None else 0), trained


def disk_bytes(run: Run) -> int:
    """Of all checkpoints that a run keeps, and of one more while the oldest waits for the newest."""
    saving, left = run.saving, run.schedule.train_iters - run.schedule.first_step
    kept = max(1, -(-left // saving.save_steps))
    if saving.total_limit is not None:
        kept = min(kept, saving.total_limit + 1)
    return kept * saving.checkpoint_bytes


def trained_parameters(adapter: Lora | None, frozen: Sequence[str], config: PreTrainedConfig) -> list[Parameter]:
    """What is trained: of an adapter, or of the model what is not frozen."""
    if adapter is not None:
        return adapter.parameters(family_of(config.model_type), config)
    kept = set(frozen)
    return [parameter for parameter in parameters_of(config) if parameter.name not in kept]


__all__ = [
    "MemoryEstimate", "checkpoint_bytes", "disk_bytes", "estimate", "estimates", "first_rank", "layer_activations", "parameter_count",
    "rank_weights", "short_of", "trained_count", "trained_parameters",
]  # fmt: skip
