"""Layers that are computed again in the backward pass: nothing of one is kept but what goes into it.

Megatron-Core's own way copies and restores the states of all random generators around each layer, in both passes. No layer
here draws from one (the dropout of adapters is a hash), the copies take the host's time, and a CUDA graph cannot hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(hidden)
        with torch.no_grad():
            return layer(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (hidden,) = ctx.saved_tensors
        again = hidden.detach().requires_grad_(hidden.requires_grad)
        with torch.enable_grad():
            output = ctx.layer(again)
        torch.autograd.backward(output, grads[0])
        return again.grad, None


def again(hidden: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """What a layer makes of hidden [s, b, h]; the backward pass runs it once more.

    Hidden must need a gradient, or the weights of the layer would get none: see `freeze.need_gradients_of_inputs`.
    """
    return _Again.apply(hidden, layer)
