"""A linear layer whose weight gradient is accumulated in fp32 by the matrix product itself, tensor parallelism included."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaswift.megatron.kernels.linear_ops import PLAIN, LinearOps
from megaswift.megatron.kernels.main_grad import accumulate_product, accumulate_rows, has_main_grad


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' parts of the first axis, in rank order: [s / tp, ...] to [s, ...]."""
    whole = torch.empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reduce_grad: bool,
        sequence: bool,
        group: Any,
        linear_ops: LinearOps,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias  # as they are: through saved-tensor hooks they would lose main_grad
        ctx.linear_ops = linear_ops
        ctx.reduce_grad, ctx.sequence, ctx.group = reduce_grad, sequence, group
        return linear_ops.forward(gather_sequence(x, group) if sequence else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad = grads[0].contiguous()
        flat = grad.view(-1, grad.shape[-1])
        work = None
        # Communication is started before the product that hides it: the gathered input is needed by the weight
        # gradient only, the reduced input gradient by nobody here.
        if ctx.sequence:
            whole = torch.empty((x.shape[0] * dist.get_world_size(ctx.group), *x.shape[1:]), dtype=x.dtype, device=x.device)
            work = dist.all_gather_into_tensor(whole, x.contiguous(), group=ctx.group, async_op=True)
        grad_x = ctx.linear_ops.input_grad(grad, weight) if ctx.needs_input_grad[0] else None
        if work is not None:
            work.wait()
            x = whole
            if grad_x is not None:
                part = torch.empty((x.shape[0] // dist.get_world_size(ctx.group), *x.shape[1:]), dtype=x.dtype, device=x.device)
                work = dist.reduce_scatter_tensor(part, grad_x, group=ctx.group, async_op=True)
        elif ctx.reduce_grad and grad_x is not None:
            part = grad_x
            work = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1])
            grad_weight = accumulate_product(weight, flat, inputs) if has_main_grad(weight) else flat.t().mm(inputs)
        grad_bias = None
        if ctx.bias is not None and ctx.needs_input_grad[2]:
            grad_bias = accumulate_rows(ctx.bias, flat.sum(0, keepdim=True, dtype=torch.float32))
        if work is not None and grad_x is not None:
            work.wait()
            grad_x = part
        return grad_x, grad_weight, grad_bias, None, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reduce_input_grad: bool = False,
    sequence_parallel: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    linear_ops: LinearOps = PLAIN,
) -> Tensor:
    """x @ weight^T + bias; weight and bias gradients go into `main_grad` where the parameters have one.

    Args:
        x: [s, b, k], or [s / tp, b, k] when `sequence_parallel`.
        weight: [n, k]; bias: [n] or None.
        reduce_input_grad: sum the input's gradient over `tp_group` (a column-parallel layer without sequence parallelism).
        sequence_parallel: gather the input over `tp_group` on the way in, reduce-scatter its gradient on the way back.
        linear_ops: how the result and the input's gradient are multiplied out.
    """
    return _Linear.apply(x, weight, bias, reduce_input_grad, sequence_parallel, tp_group, linear_ops)
