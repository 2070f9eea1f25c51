"""The products of many experts at once, and tokens laid out for them: rows of one expert stand together.

torch's grouped product serves CPUs and GPUs alike, and its offsets stay on the device: nothing waits for the host. Weight
gradients go into the fp32 buffers, as everywhere (`main_grad`). Rows are moved by gathering in both directions, so the
result does not depend on the order in which a device adds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.megatron.kernels.expert_rows import (
    add_rows,
    gather_rows,
    put_gradient,
    weighted_swiglu,
    weighted_swiglu_backward,
)
from megaswift.megatron.kernels.main_grad import buffer, has_main_grad, placeholder, take_stale
from megaswift.megatron.kernels.packed import PackedWeight, dense


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows times its matrix: x [t, k] sorted by expert, weight [e, k, n] -> [t, n].

    Args:
        ends: int32 [e], the row after each expert's last; an expert may have none.
    """
    if not len(x):  # no token of any rank chose an expert of this one
        return x.new_zeros((0, weight.shape[-1]))
    if x.is_cuda and x.dtype != torch.bfloat16:  # the kernel of GPUs takes bf16 alone
        parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
        return torch.cat([part @ matrix for part, matrix in zip(parts, weight)])
    return F.grouped_mm(x, weight, offs=ends)


def grouped_outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The gradient of each expert's matrix: grad [t, n], x [t, k], both sorted by expert -> [e, n, k]; zeros where it has no row."""
    if not len(x):
        return x.new_zeros((len(ends), grad.shape[-1], x.shape[-1]))
    if x.is_cuda and x.dtype != torch.bfloat16:
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        return torch.stack([g.t() @ part for g, part in zip(grad.split(counts), x.split(counts))])
    return F.grouped_mm(grad.t(), x, offs=ends)


def weight_gradient(weight: Tensor, grad: Tensor, x: Tensor, ends: Tensor) -> Tensor | None:
    """The gradient of all experts' matrices into `main_grad`; what autograd shall receive."""
    product = grouped_outer(grad, x, ends)
    if not has_main_grad(weight):
        return product
    put_gradient(buffer(weight), product, overwrite=take_stale(weight))
    return placeholder(weight)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, first: Any, second: Any, ends: Tensor) -> Tensor:
        both = grouped(x, dense(first, x.dtype).transpose(1, 2), ends)
        ctx.save_for_backward(x, both, weights, ends)
        ctx.first, ctx.second = first, second  # as they are: through saved-tensor hooks they would lose main_grad
        return grouped(weighted_swiglu(both, weights), dense(second, x.dtype).transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, both, weights, ends), first, second = ctx.saved_tensors, ctx.first, ctx.second
        grad = grads[0].contiguous()
        hidden = grouped(grad, dense(second, grad.dtype), ends)  # its gradient, until the next line
        grad_weights = weighted_swiglu_backward(hidden, both, weights)
        grad_second = weight_gradient(second, grad, hidden, ends) if ctx.needs_input_grad[3] else None
        grad_first = weight_gradient(first, both, x, ends) if ctx.needs_input_grad[2] else None
        grad_x = grouped(both, dense(first, both.dtype), ends) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weights, grad_first, grad_second, None


def expert_mlp(x: Tensor, weights: Tensor, first: Tensor | PackedWeight, second: Tensor | PackedWeight, ends: Tensor) -> Tensor:
    """Every row through its expert's gated MLP, times the row's weight; what SwiGLU makes is made again on the way back.

    Args:
        x: [t, h], sorted by expert.
        weights: fp32 [t], what the router gives each row.
        first: [e, 2f, h], gate over up; second: [e, h, f]; as they are, or held in few bits.
        ends: int32 [e], the row after each expert's last.

    Returns:
        [t, h]
    """
    return _ExpertMLP.apply(x, weights, first, second, ends)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return gather_rows(x, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return add_rows(grads[0].contiguous(), places), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, places: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return add_rows(y, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        return gather_rows(grads[0], source), None, None


def take_rows(x: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """Rows of x [t, ...] in another order, each as often as it is wanted.

    Args:
        source: int64 [r], which row of x stands at each place of the result.
        places: int64 [t, r / t], at which places each row of x stands: the other direction of the same.
    """
    return _Take.apply(x, source, places)


def sum_rows(y: Tensor, places: Tensor, source: Tensor) -> Tensor:
    """For each row of [t, ...] the sum of those rows of y [r, ...] that stand at its places, added up in fp32; undoes `take_rows`."""
    return _Sum.apply(y, places, source)
