"""Log-probabilities of whole sequences from hidden states, without holding logits, and their gradients.

What a sequence's log-probability is worth is known only when all of them are. So the head's product is made twice: once
for the numbers, and once more in the backward pass, where each row's gradient is scaled by what its sequence is worth.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaswift.megatron.kernels.linear_cross_entropy import linear_cross_entropy
from megaswift.megatron.kernels.main_grad import has_main_grad, placeholder


class _SequenceLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, factors: Tensor | None, where: Any) -> Tensor:
        sequences, count, group, head = where
        losses, _ = linear_cross_entropy(hidden, weight, labels, factors=factors, reduction="none", **head)
        sums = torch.zeros(count, dtype=torch.float64, device=hidden.device).index_add_(0, sequences, -losses.double())
        if group is not None:
            dist.all_reduce(sums, group=group)
        ctx.save_for_backward(hidden, weight, labels, factors, sequences)
        ctx.group, ctx.head = group, head
        return sums.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, factors, sequences = ctx.saved_tensors
        upstream = grads[0].float().contiguous()
        if ctx.group is not None:  # every rank of the group made something of the same numbers
            upstream = upstream.clone()
            dist.all_reduce(upstream, group=ctx.group)
        row = -upstream[sequences]
        row = row if factors is None else row * factors.to(row.device)
        direct = weight.requires_grad and has_main_grad(weight)
        with torch.enable_grad():
            inputs = hidden.detach().requires_grad_()
            # The promise of a plain sum is kept, so the weight's gradient goes straight into its buffer.
            loss, _ = linear_cross_entropy(inputs, weight, labels, factors=row, grad_scale=1.0, **ctx.head)
            wanted = (inputs, weight) if weight.requires_grad and not direct else (inputs,)
            dhidden, *others = torch.autograd.grad(loss, wanted)
        dweight = others[0] if others else None
        if direct and not ctx.head["shared_with_embedding"]:
            dweight = placeholder(weight)
        return dhidden, dweight, None, None, None


def sequence_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sequences: Tensor,
    count: int,
    *,
    factors: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    shared_with_embedding: bool = False,
    **head: Any,
) -> Tensor:
    """Log-probability of the labels of each sequence.

    Args:
        hidden, weight, labels, factors, shared_with_embedding: as in `linear_cross_entropy`, and so is all of `head`.
        sequences: int64 [T] on the device, the sequence that each row belongs to; `count`: how many there are.
        group: the ranks that hold other rows of the same sequences. Each has the whole numbers then, and the gradient is
            that of the sum of what all these ranks make of them.

    Returns:
        fp32 [count]; 0 for a sequence without a label.
    """
    head["shared_with_embedding"] = shared_with_embedding
    return _SequenceLogProbabilities.apply(hidden, weight, labels, factors, (sequences, count, group, head))
