"""Token embedding whose gradient is added row by row to the fp32 buffer: no dense gradient of the vocabulary's size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.megatron.kernels.main_grad import buffer, ensure_fresh, has_main_grad, placeholder
from megaswift.megatron.kernels.triton_support import jit, next_power_of_2, tl, use_triton


@jit
def _scatter_kernel(target, grad, ids, first, rows, cols, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    row = tl.load(ids + token) - first
    col = tl.arange(0, BLOCK)
    mask = (col < cols) & (row >= 0) & (row < rows)
    value = tl.load(grad + token.to(tl.int64) * cols + col, mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(target + row.to(tl.int64) * cols + col, value, mask=mask, sem="relaxed")


def scatter_add(target: Tensor, grad: Tensor, ids: Tensor, first_row: int) -> None:
    """target[ids - first_row] += grad, for ids that fall on a row of `target` [rows, h]; grad is [tokens, h].

    The kernel adds in whatever order its programs run; where deterministic operations are asked for, torch's own sorts.
    """
    if use_triton(grad) and not torch.are_deterministic_algorithms_enabled():
        block = next_power_of_2(grad.shape[1])
        _scatter_kernel[(ids.numel(),)](target, grad, ids, first_row, target.shape[0], grad.shape[1], block, num_warps=4)
        return
    local = ids - first_row
    here = (local >= 0) & (local < target.shape[0])
    if not bool(here.all()):
        local, grad = local[here], grad[here]
    target.index_add_(0, local, grad.to(target.dtype))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, first_row: int, partial: bool) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.first_row = first_row
        if not partial:
            return F.embedding(ids, weight)
        local = ids - first_row
        outside = (local < 0) | (local >= weight.shape[0])
        return F.embedding(local.masked_fill(outside, 0), weight).masked_fill(outside.unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1]).contiguous()
        if has_main_grad(weight):
            ensure_fresh(weight)
            scatter_add(buffer(weight), grad, ids.reshape(-1), ctx.first_row)
            return None, placeholder(weight), None, None
        dense = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        scatter_add(dense, grad, ids.reshape(-1), ctx.first_row)
        return None, dense.to(weight.dtype), None, None


def embedding(ids: Tensor, weight: Tensor, *, first_row: int = 0, partial: bool = False) -> Tensor:
    """Rows of the vocabulary: ids int64 [...] to [..., h].

    Args:
        weight: [rows, h], the vocabulary's rows from `first_row` on.
        partial: the weight is one rank's shard; tokens of other shards give zeros (sum over the ranks).
    """
    return _Embedding.apply(ids.contiguous(), weight, first_row, partial)
