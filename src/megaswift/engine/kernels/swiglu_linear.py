"""SwiGLU and the product after it (the second half of an MLP) as one operation that saves only the first product's result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaswift.engine.kernels.main_grad import accumulate_product, has_main_grad
from megaswift.engine.kernels.swiglu import backward_in_place, forward


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recompute: bool, residual: Tensor | None) -> Tensor:
        x = x.contiguous()
        hidden = forward(x)
        ctx.recompute = recompute
        ctx.save_for_backward(x, weight, *(() if recompute else (hidden,)))
        ctx.has_residual = residual is not None
        if residual is None:
            return torch.matmul(hidden, weight.t())
        flat = torch.addmm(residual.reshape(-1, weight.shape[0]), hidden.view(-1, hidden.shape[-1]), weight.t())
        return flat.view(residual.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *kept = ctx.saved_tensors
        grad = grads[0].contiguous()
        dhidden = torch.matmul(grad, weight)
        backward_in_place(dhidden, x, recompute=ctx.recompute)
        dweight = None
        if ctx.needs_input_grad[1]:
            hidden = dhidden if ctx.recompute else kept[0]
            flat, inputs = grad.view(-1, grad.shape[-1]), hidden.view(-1, hidden.shape[-1])
            dweight = accumulate_product(weight, flat, inputs) if has_main_grad(weight) else flat.t().mm(inputs)
        return x, dweight, None, (grad if ctx.has_residual else None)


def swiglu_linear(x: Tensor, weight: Tensor, *, recompute: bool = True, residual: Tensor | None = None) -> Tensor:
    """(silu(gate) * up) @ weight^T, plus `residual` [..., n] if given, for x = [gate, up] [..., 2f] and weight [n, f].

    With `recompute`, backward forms silu(gate) * up again in the pass that computes the gradient, in the memory of a
    gradient it no longer needs: f values a token less are kept, for one more write of them. x must not be needed by
    anything else: its gradient overwrites it. With a row-parallel weight the result is this rank's part of the sum.
    """
    return _SwiGLULinear.apply(x, weight, recompute, residual)
