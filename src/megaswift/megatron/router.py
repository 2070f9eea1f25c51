"""The router of a layer of experts: which experts each token goes to, and what each of them weighs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaswift.megatron.kernels.main_grad import buffer, ensure_fresh, has_main_grad, placeholder
from megaswift.models.kinds import Experts


class _RouterLogits(torch.autograd.Function):
    """x [t, h] @ weight [e, h]^T in a precision of its own; the weight's gradient goes into main_grad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, group: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.group = weight, group
        return x.to(dtype) @ weight.to(dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, grad = ctx.saved_tensors, ctx.weight, grads[0]
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ x.to(grad.dtype)
            if ctx.group is not None:
                dist.all_reduce(grad_weight, group=ctx.group)
            if has_main_grad(weight):
                ensure_fresh(weight)
                buffer(weight).add_(grad_weight)
                grad_weight = placeholder(weight)
            else:
                grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, None, None


class Router(torch.nn.Module):
    """Softmax over all experts, of which each token goes to those with the largest scores.

    Every tensor-parallel rank holds the whole weight and routes its own part of the tokens. Under sequence parallelism
    Megatron-Core adds up the parts of the gradient, by the mark on the weight; else this module does, over `sum_group`.
    """

    def __init__(self, config: TransformerConfig, experts: Experts, sum_group: Any = None) -> None:
        super().__init__()
        self.experts, self.sum_group = experts, sum_group
        self.dtype: torch.dtype = config.routing_dtype
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        shape = (experts.count, config.hidden_size)
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [t, h] -> weights (fp32, or fp64 where the router is) and numbers of the chosen experts, each [t, chosen]."""
        logits = _RouterLogits.apply(x, self.weight, self.dtype, self.sum_group)
        scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = scores.topk(self.experts.chosen, dim=-1)
        if self.experts.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.float(), chosen
