"""Sinks: each head's softmax has one score more that no key has, so that its weights add up to less than one; no kernel has to know.

With lse the logarithm of the sum of exp(scores), and out what attention gives without a sink, lse' = log(exp(lse) + exp(sink)) and
out' = out * exp(lse - lse') are those with it. The backward pass of any kernel that is given out' and lse' makes exact gradients of
query, key and value, and that of the sink is -sum(exp(sink - lse') * <dout, out'>).
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out' and lse'.

    Args:
        out: [..., *heads, d]; lse: fp32 [..., *heads]; sinks: [*heads].
    """
    full = torch.logaddexp(lse, sinks.to(lse.dtype))
    return (out * (lse - full).exp().unsqueeze(-1)).to(out.dtype), full


def sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of the sinks, [*heads], from that of out', and from out' and lse'; shapes as for `with_sinks`."""
    share = (sinks.to(lse.dtype) - lse).exp()
    read = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -(share * read).sum_to_size(sinks.shape).to(sinks.dtype)


__all__ = ["sinks_gradient", "with_sinks"]
