"""What the routers of a model do with given rows, by forward passes of one process: no training run is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaswift.megatron import process_groups
from megaswift.megatron.model import build, chunks_of
from megaswift.run.spec import Parallel, Precision
from megaswift.train.expert_health import gathered, routers_of, watched
from megaswift.train.objectives import SupervisedTokens
from megaswift.train.setup import to_device
from megaswift.train.trainer import forward_backward
from megaswift.weights.hf.config import load_config
from megaswift.weights.load_hf import load_hf_weights

if TYPE_CHECKING:
    from megaswift.data.batches import EvalBatches


@contextmanager
def _group() -> Iterator[Any]:
    with process_groups.joined(Parallel(), seed=0) as rank, torch.no_grad():
        yield rank


def load_of(
    folder: Path, batches: EvalBatches, dtype: Any, compared: Mapping[int, torch.Tensor] | None = None
) -> tuple[list[dict[str, Any]], dict[int, torch.Tensor]]:
    """Layer by layer the load of each expert and what else `expert_health.gathered` tells; and the routers' weights, on the host.

    Args:
        folder: a Hugging Face folder of a model with experts.
        dtype: of weights and activations: "fp32", "bf16" or "fp16".
        compared: layer -> weights of other routers, from which "drift" is counted; without them it is 0.
    """
    config = load_config(folder)
    with _group() as rank:
        model = build(config, Parallel(), Precision(dtype=dtype))
        load_hf_weights(model, folder)
        chunks = chunks_of(model)
        routers = routers_of(chunks)
        for chunk in chunks:
            chunk.eval()
        with watched(routers):
            for step in range(len(batches)):
                group = to_device(batches.step(step), rank.device)
                forward_backward(list(chunks), chunks[0].config, SupervisedTokens(), group, forward_only=True)
        first = {number: weight.to(rank.device) for number, weight in (compared or {}).items()}
        experts = max(router.experts.count for router in routers.values())
        layers = gathered(routers, first, config.num_hidden_layers, experts, rank.device)
        weights = {number: router.routing_matrix().detach().cpu().clone() for number, router in routers.items()}
        del model, chunks, routers
    return layers, weights
