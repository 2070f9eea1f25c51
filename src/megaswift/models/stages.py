"""How many layers each pipeline stage has: any number of layers at any number of stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaswift.models import parameters_of
from megaswift.models.family import is_tied, sizes_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def stage_layers(config: PreTrainedConfig, pp: int) -> tuple[int, ...]:
    """Layers of each of `pp` stages, first to last; at least one each.

    Where `pp` divides the layers all stages have as many. Else they are dealt out so that the slowest stage has least to
    do: the last one also multiplies with the output layer, which counts as the layers that have as many weights; looking
    tokens up in the embedding costs nothing.
    """
    layers = sizes_of(config).layers
    if layers % pp == 0:
        return (layers // pp,) * pp
    table, of_layers = 0, 0
    for parameter in parameters_of(config):
        if parameter.padded:
            table = parameter.size
        elif parameter.name.startswith("decoder.layers."):
            of_layers += parameter.size
    work = [0.0] * (pp - 1) + [table / (of_layers / layers)]
    stages = [0] * pp
    for left in range(layers, 0, -1):
        empty = [stage for stage in range(pp) if not stages[stage]]
        # The first stage comes last among equals: it holds the embedding, and the activations of most micro batches.
        choices = empty if len(empty) == left else range(pp)
        stage = min(choices, key=lambda stage: (work[stage] + 1, stage == 0, stage))
        stages[stage] += 1
        work[stage] += 1
    return tuple(stages)


def stage_weights(config: PreTrainedConfig, pp: int, experts_only: bool = False) -> list[int]:
    """Weights of each stage; the embedding is the first one's, the output layer, or its copy of a tied embedding, the last one's.

    Args:
        experts_only: count the experts among which tokens are routed, and nothing else.
    """
    stage_of = [stage for stage, count in enumerate(stage_layers(config, pp)) for _ in range(count)]
    weights = [0] * pp
    for parameter in parameters_of(config):
        if experts_only and ".local_experts." not in parameter.name:
            continue
        if parameter.name.startswith("decoder.layers."):
            weights[stage_of[int(parameter.name.split(".")[2])]] += parameter.size
            continue
        weights[0 if parameter.name.startswith("embedding.") else -1] += parameter.size
        if parameter.padded and is_tied(config) and pp > 1:
            weights[-1] += parameter.size
    return weights
