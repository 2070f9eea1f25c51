"""SwiGLU and the product after it (the second half of an MLP) as one operation that saves only the first product's result.

Or not even that: it can be computed again from the first product's input, which is kept anyway for its weight's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaswift.megatron.kernels import swiglu
from megaswift.megatron.kernels.linear_ops import PLAIN, LinearOps
from megaswift.megatron.kernels.main_grad import accumulate_product, add_product, buffer, has_main_grad, placeholder, take_stale
from megaswift.megatron.kernels.overlap import beside, can_run_beside
from megaswift.megatron.kernels.weight_grad import gather_sequence


@dataclass(frozen=True)
class FirstProduct:
    """What [gate, up] came from: inputs [s, b, h] @ weight [2f, h]^T, without a bias.

    Args:
        gather: the group over which the inputs [s / tp, b, h] are gathered first, under sequence parallelism.
    """

    inputs: Tensor
    weight: Tensor
    gather: dist.ProcessGroup | None = None


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        recompute: bool,
        overlap: bool,
        residual: Tensor | None,
        linear_ops: LinearOps,
        inputs: Tensor | None,
        first: FirstProduct | None,
        needed: bool,
        gated_by: str,
    ) -> Tensor:
        x = x.contiguous()
        ctx.gated_by = gated_by
        ctx.recompute, ctx.overlap, ctx.linear_ops = (
            recompute,
            overlap and linear_ops is PLAIN and gated_by == swiglu.SILU,
            linear_ops,
        )
        if needed:
            result, hidden = linear_ops.swiglu_forward(x, weight, residual, keep=not recompute, gated_by=gated_by)
        else:
            result, hidden = x.new_empty((*x.shape[:-1], weight.shape[0])), None if recompute else swiglu.forward(x, gated_by)
        ctx.save_for_backward(x if inputs is None else inputs, *(() if hidden is None else (hidden,)))
        ctx.weight = weight  # as it is: through saved-tensor hooks it would lose main_grad
        ctx.first = None if first is None else (first.weight, first.gather)
        ctx.has_residual = residual is not None
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, *kept), weight = ctx.saved_tensors, ctx.weight
        if ctx.first is not None:
            first, group = ctx.first
            x = ctx.linear_ops.forward(x if group is None else gather_sequence(x, group), first)
        grad = grads[0].contiguous()
        residual = grad if ctx.has_residual else None
        flat, gate_up = grad.view(-1, grad.shape[-1]), x.view(-1, x.shape[-1])
        hidden = kept[0].view(-1, kept[0].shape[-1]) if kept else None
        if ctx.overlap and ctx.needs_input_grad[1] and has_main_grad(weight) and can_run_beside(x):
            _backward_beside(flat, gate_up, weight, hidden)
            return x, placeholder(weight), None, None, residual, None, None, None, None, None
        dhidden = ctx.linear_ops.input_grad(flat, weight)
        swiglu.backward_in_place(dhidden, gate_up, recompute=ctx.recompute, gated_by=ctx.gated_by)
        dweight = None
        if ctx.needs_input_grad[1]:
            inputs = dhidden if hidden is None else hidden
            dweight = accumulate_product(weight, flat, inputs) if has_main_grad(weight) else flat.t().mm(inputs)
        return x, dweight, None, None, residual, None, None, None, None, None


def _backward_beside(grad: Tensor, gate_up: Tensor, weight: Tensor, hidden: Tensor | None) -> None:
    """Overwrite gate_up [tokens, 2f] with its gradient and add the weight's to main_grad; SwiGLU's gradient costs little time.

    Its kernel runs beside the weight's product, which does not need it if `hidden` was kept. Otherwise the tokens go in
    two halves: the first half's kernel beside the second half's product, the second half's beside the first's weight product.
    """
    target, stale = buffer(weight), take_stale(weight)
    dhidden = torch.empty((grad.shape[0], weight.shape[1]), dtype=grad.dtype, device=grad.device)
    if hidden is not None:
        torch.mm(grad, weight, out=dhidden)
        beside(
            lambda share: swiglu.backward_in_place(dhidden, gate_up, recompute=False, share=share),
            lambda: add_product(target, grad, hidden, overwrite=stale),
            grad.device,
        )
        return
    half = grad.shape[0] // 16 * 8
    one, two = slice(0, half), slice(half, None)
    torch.mm(grad[one], weight, out=dhidden[one])
    beside(
        lambda share: swiglu.backward_in_place(dhidden[one], gate_up[one], recompute=True, share=share),
        lambda: torch.mm(grad[two], weight, out=dhidden[two]),
        grad.device,
    )
    beside(
        lambda share: swiglu.backward_in_place(dhidden[two], gate_up[two], recompute=True, share=share),
        lambda: add_product(target, grad[one], dhidden[one], overwrite=stale),
        grad.device,
    )
    add_product(target, grad[two], dhidden[two])


def swiglu_linear(
    x: Tensor,
    weight: Tensor,
    *,
    recompute: bool = True,
    overlap: bool = False,
    residual: Tensor | None = None,
    linear_ops: LinearOps = PLAIN,
    first: FirstProduct | None = None,
    needed: bool = True,
    gated_by: str = swiglu.SILU,
) -> Tensor:
    """(silu(gate) * up) @ weight^T, plus `residual` [..., n] if given, for x = [gate, up] [..., 2f] and weight [n, f].

    x must not be needed by anything else: its gradient overwrites it. With a row-parallel weight the result is this
    rank's part of the sum.

    Args:
        recompute: backward forms silu(gate) * up again in the pass that computes the gradient, in the memory of a gradient
            it no longer needs: f values a token less are kept, for one more write of them.
        overlap: on a GPU, run SwiGLU's gradient beside a matrix product (only where the weight has a main_grad, and with the
            products of the tensors' own precision).
        linear_ops: how the result and the gradient of silu(gate) * up are multiplied out.
        first: x is not kept but computed from it again: 2f values a token less, for one more product; `recompute` is implied.
        needed: False where only gradients will be asked for, and nobody reads the result: it is not computed then.
        gated_by: what the gate goes through (swiglu.GATES); any but SiLU needs products of the tensors' own precision, and nothing
            runs beside its gradient.
    """
    inputs = None if first is None else first.inputs
    return _SwiGLULinear.apply(
        x, weight, recompute or first is not None, overlap, residual, linear_ops, inputs, first, needed, gated_by
    )
