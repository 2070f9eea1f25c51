"""Scores of whole sequences: the states of one token each, wherever its rank is, and the head that every rank has whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor


class ScoreLayer(torch.nn.Module):
    """A linear layer without bias from a state to `labels` scores, in fp32 whatever the model's precision.

    Every tensor-parallel rank holds all of it and computes it from the same states, so its gradient is the same on all of
    them and is summed over none.
    """

    def __init__(self, hidden: int, labels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(labels, hidden, dtype=dtype))

    def forward(self, states: Tensor) -> Tensor:
        """fp32 [..., labels] of [..., h]."""
        return F.linear(states.float(), self.weight.float())


class _SumOverShares(torch.autograd.Function):
    """The sum over ranks that share rows; each of them makes something of it, so gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, x = group, x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def pooled_states(
    hidden: Tensor,
    places: Tensor,
    numbers: Tensor,
    count: int,
    tp_group: dist.ProcessGroup | None = None,
    share_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The state of one token of each sequence.

    Args:
        hidden: [s, b, h], with `tp_group` this rank's part of the s.
        places: int64 [n] on the device, where these tokens stand among the s * b of all its tensor-parallel ranks.
        numbers: int64 [n], which sequence each belongs to; `count`: how many there are.
        tp_group: the ranks that hold other tokens, under sequence parallelism. They compute the same loss of the result.
        share_group: the ranks that hold other parts of the same rows; each counts a part of the loss.

    Returns:
        fp32 [count, h], the same on all ranks of both groups; 0 for a sequence without such a token. It hangs on `hidden` on
        every rank, whether one of the tokens is there or not: a backward pass goes through the layers of all of them.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if tp_group is not None:
        first = dist.get_rank(tp_group) * flat.shape[0]
        own = (places >= first) & (places < first + flat.shape[0])
        places, numbers = places[own] - first, numbers[own]
    states = flat.new_zeros((count, flat.shape[1]), dtype=torch.float32).index_copy(0, numbers, flat[places].float())
    if tp_group is not None:
        states = reduce_from_tensor_model_parallel_region(states, tp_group)  # its gradient stays as it is
    return states if share_group is None else _SumOverShares.apply(states, share_group)
