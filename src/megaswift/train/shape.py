"""The model of a run's first rank, built without memory for a single weight: how many values it has, and trains.

Nothing is sent, whatever the layout: the process groups are of processes that are not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megaswift.megatron import compat
from megaswift.megatron.freeze import freeze
from megaswift.megatron.lora_layers import attach
from megaswift.megatron.model import build, chunks_of
from megaswift.megatron.process_groups import alone
from megaswift.models import family_of, parameters_of
from megaswift.models.parameters import Parameter
from megaswift.run.spec import Run
from megaswift.train.adapters import trainable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def rank_shape(run: Run, config: PreTrainedConfig) -> tuple[int, int]:
    """(values of rank 0 with those of an adapter, values that it trains). Weights that would be held in few bits count as they are."""
    method, base = run.method, parameters_of(config)
    with alone(run.parallel, run.seed), compat.without_memory():
        model = build(config, run.parallel, run.precision, run.memory, run.routing)
        for chunk in chunks_of(model):
            if method.adapter is not None:
                made = method.adapter.parameters(family_of(config.model_type), config)
                attach(chunk, method.adapter, base, made, chunk.first_layer, run.seed, _empty)
            elif method.frozen:
                freeze(chunk, method.frozen)
        buffers = {parameter.name.rsplit(".", 1)[-1] for parameter in base if not parameter.trained}
        held = sum(value.numel() for name, value in model.named_buffers() if name.rsplit(".", 1)[-1] in buffers)
        return sum(value.numel() for value in model.parameters()) + held, trainable(model) + (
            held if method.adapter is None and not method.frozen else 0
        )


def _empty(parameter: Parameter) -> torch.Tensor:
    return torch.empty(parameter.shape, device="meta")


__all__ = ["rank_shape"]
