"""How many layers each pipeline stage has: any number of layers at any number of stages.

Where processes hold several chunks (--vpp), `pp` x `vpp` virtual stages follow each other, and rank r holds every pp-th.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megaswift.models.family import is_tied, sizes_of
from megaswift.models.head import labels_of
from megaswift.models.tally import BEFORE, tally

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def stage_layers(config: PreTrainedConfig, pp: int, vpp: int = 1) -> tuple[int, ...]:
    """Layers of each of `pp` x `vpp` stages, first to last; at least one each.

    Where that divides the layers all stages have as many. Else they are dealt out so that the slowest stage has least to
    do, and then the slowest rank: the last stage also multiplies with the output layer, where there is one, which counts as the
    layers that have as many weights; looking tokens up in the embedding costs nothing.
    """
    layers, count = sizes_of(config).layers, pp * vpp
    if layers % count == 0:
        return (layers // count,) * count
    groups = tally(config)
    table = max(size for group, size in groups.items() if group.table) if labels_of(config) is None else 0
    of_layers = sum(size for group, size in groups.items() if group.layer >= 0)
    work = [0.0] * (count - 1) + [table / (of_layers / layers)]
    stages = [0] * count
    for left in range(layers, 0, -1):
        empty = [stage for stage in range(count) if not stages[stage]]
        # The first stage comes last among equals: it holds the embedding, and the activations of most micro batches.
        choices = empty if len(empty) == left else range(count)
        stage = min(choices, key=lambda stage: (work[stage] + 1, sum(work[stage % pp :: pp]), stage == 0, stage))
        stages[stage] += 1
        work[stage] += 1
    return tuple(stages)


def stage_weights(config: PreTrainedConfig, pp: int, vpp: int = 1, experts_only: bool = False) -> list[int]:
    """Weights of each stage; the embedding is the first one's, the output layer, or its copy of a tied embedding, the last one's.

    Args:
        experts_only: count the experts among which tokens are routed, and nothing else.
    """
    stage_of = [stage for stage, count in enumerate(stage_layers(config, pp, vpp)) for _ in range(count)]
    weights = [0] * (pp * vpp)
    for group, size in tally(config).items():
        if experts_only and not group.expert:
            continue
        if group.layer >= 0:
            weights[stage_of[group.layer]] += size
            continue
        weights[0 if group.layer == BEFORE else -1] += size
        if group.table and is_tied(config) and pp > 1:
            weights[-1] += size
    return weights


def by_rank(stages: Sequence[int], pp: int) -> list[int]:
    """Sums of what virtual stages have, for each of `pp` pipeline ranks."""
    return [sum(stages[rank::pp]) for rank in range(pp)]


def group_of_micro_batches(micro_batches: int, pp: int) -> int:
    """How many micro batches a chunk takes before the next one has its turn: at least `pp`, and the fewer the less memory.

    Megatron-Core needs the last group to be whole, or at least as large as the pipeline is deep. Needs `micro_batches` >= `pp`.
    """
    return next(size for size in range(pp, micro_batches + 1) if not 0 < micro_batches % size < pp)


def passes_in_flight(pp: int, vpp: int, micro_batches: int) -> int:
    """Micro batches whose activations a layer keeps at once, at most: those of the first stage's first layers.

    With chunks that take turns Megatron-Core's schedule lets the first rank make 2 (pp - 1) + (vpp - 1) group + 1 passes of
    chunks before the first backward pass, a group of micro batches through each chunk in turn.
    """
    if vpp == 1 or micro_batches < pp:
        return pp
    return min(max(group_of_micro_batches(micro_batches, pp), 2 * pp - 1), micro_batches)
