"""The MLPs of many experts at once whose products have biases and whose gates are clamped (gpt-oss), in PyTorch's operations.

Rows of one expert stand together, as in `expert_mlp`. With gate and up at most `limit` (up at least -limit, too), an expert gives
gate * sigmoid(slope * gate) * (up + 1) to its second product. Roundings are those of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.expert_mlp import grouped, weight_gradient
from megaswift.megatron.kernels.packed import PackedWeight, dense


def clamped_swiglu(both: Tensor, limit: float, slope: float) -> Tensor:
    """both = [gate, up] [t, 2f] to [t, f]."""
    gate, up = both.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * slope))


def expert_of_rows(ends: Tensor, rows: int) -> Tensor:
    """int64 [rows], the expert that each row belongs to; ends: int32 [e], the row after each expert's last."""
    return torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)


class _BiasedExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, first: Any, bias: Tensor, second: Any, last: Tensor, ends: Tensor, how: Any
    ) -> Tensor:
        expert = expert_of_rows(ends, len(x))
        both = grouped(x, dense(first, x.dtype).transpose(1, 2), ends) + bias[expert]
        ctx.save_for_backward(x, both, weights, last, ends, expert)
        ctx.first, ctx.second, ctx.how = first, second, how  # as they are: through saved-tensor hooks they would lose main_grad
        output = grouped(clamped_swiglu(both, *how), dense(second, x.dtype).transpose(1, 2), ends) + last[expert]
        return (output * weights.unsqueeze(1)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, both, weights, last, ends, expert), first, second = ctx.saved_tensors, ctx.first, ctx.second
        with torch.enable_grad():
            leaf = both.detach().requires_grad_()
            hidden = clamped_swiglu(leaf, *ctx.how)
        made = hidden.detach()
        grad = (grads[0] * weights.unsqueeze(1)).to(x.dtype)  # of what the second product and its bias give
        matrix = dense(second, x.dtype)
        output = grouped(made, matrix.transpose(1, 2), ends) + last[expert]
        grad_weights = (grads[0].float() * output.float()).sum(1)
        grad_second = weight_gradient(second, grad, made, ends) if ctx.needs_input_grad[4] else None
        (grad_both,) = torch.autograd.grad(hidden, leaf, grouped(grad, matrix, ends))
        grad_first = weight_gradient(first, grad_both, x, ends) if ctx.needs_input_grad[2] else None
        grad_x = grouped(grad_both, dense(first, x.dtype), ends) if ctx.needs_input_grad[0] else None
        grad_bias = _summed(grad_both, expert, len(ends)) if ctx.needs_input_grad[3] else None
        grad_last = _summed(grad, expert, len(ends)) if ctx.needs_input_grad[5] else None
        return grad_x, grad_weights, grad_first, grad_bias, grad_second, grad_last, None, None


def _summed(rows: Tensor, expert: Tensor, count: int) -> Tensor:
    """The sum of each expert's rows, [e, n]."""
    total = rows.new_zeros((count, rows.shape[1]), dtype=torch.promote_types(rows.dtype, torch.float32))
    return total.index_add_(0, expert, rows.to(total.dtype)).to(rows.dtype)


def biased_expert_mlp(
    x: Tensor,
    weights: Tensor,
    first: tuple[Tensor | PackedWeight, Tensor],
    second: tuple[Tensor | PackedWeight, Tensor],
    ends: Tensor,
    clamp: tuple[float, float],
) -> Tensor:
    """Every row through its expert's MLP, times the row's weight.

    Args:
        x: [t, h], sorted by expert.
        weights: fp32 [t], what the router gives each row.
        first: [e, 2f, h], gate over up, as it is or held in few bits, and the bias [e, 2f]; second: [e, h, f] and [e, h].
        ends: int32 [e], the row after each expert's last.
        clamp: limit and slope.

    Returns:
        [t, h]
    """
    return _BiasedExpertMLP.apply(x, weights, *first, *second, ends, clamp)


__all__ = ["biased_expert_mlp", "clamped_swiglu", "expert_of_rows"]
