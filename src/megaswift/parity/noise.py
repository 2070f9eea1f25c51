"""The noise of a half precision, measured: the same steps from weights that differ by one rounding.

A run in bf16 or fp16 has no single right loss: another order of summation gives another one. How far apart such losses
are depends on model, data and step, so it is measured: every weight is moved at random by up to one unit in the last
place, once with each of two seeds, and the three runs (these two and the one as it is) span the band.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

SEEDS = (1, 2)
FACTOR = 3.0  # a layout may be this many times as far from the first as the seeds were from it and from each other


@torch.no_grad()
def perturb(trainer: Any, seed: int) -> None:
    """Move every weight of a trainer at random by up to one unit in the last place of its type.

    Parts of one model get the same noise wherever they are held twice: on data-parallel ranks, which are others for experts,
    and the tied embedding on the first and the last pipeline stage.
    """
    from megatron.core import parallel_state

    rank, of_experts = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_expert_tensor_and_model_parallel_rank
    for name, weight in trainer.bare_model.named_parameters():
        shared = "embedding" if getattr(weight, "shared_embedding", False) or "word_embeddings" in name else name
        split = rank if getattr(weight, "tensor_model_parallel", False) else 0
        if not getattr(weight, "allreduce", True):  # halves of adapters that ranks of an expert hold whole are one
            whole = getattr(weight, "partial_expert_gradient", False)
            split = parallel_state.get_expert_model_parallel_rank() if whole else of_experts()
        generator = torch.Generator(device=weight.device).manual_seed(zlib.crc32(f"{seed} {shared} {split}".encode()))
        noise = torch.rand(weight.shape, generator=generator, device=weight.device).mul_(2.0).sub_(1.0)
        weight.copy_(weight.float() * (1.0 + torch.finfo(weight.dtype).eps * noise))
    trainer.optimizer.reload_model_params()


def band(plain: list[float], noisy: list[list[float]]) -> list[float]:
    """The limit at each step: FACTOR times the largest relative difference of two of the runs at this step or before."""
    curves = [plain, *noisy]
    limits, largest = [], 0.0
    for values in zip(*curves):
        spread = (max(values) - min(values)) / max(abs(values[0]), 1e-12)
        largest = max(largest, spread)
        limits.append(FACTOR * largest)
    return limits
