"""The router of a layer of experts: which experts each token goes to, and what each of them weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaswift.megatron.kernels.main_grad import buffer, ensure_fresh, has_main_grad, placeholder
from megaswift.models.kinds import Experts


def _is_exact_in_bf16(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether tensor cores give the fp32 product: what they multiply is bf16, and products of bf16 and their sums are fp32 there."""
    return x.is_cuda and x.dtype == torch.bfloat16 and dtype == torch.float32


def _in_three(x: Tensor) -> Tensor:
    """fp32 [t, e] as three bf16 terms that add up to it, side by side: [t, 3 e]."""
    first = x.to(torch.bfloat16)
    rest = x - first
    second = rest.to(torch.bfloat16)
    return torch.cat((first, second, (rest - second).to(torch.bfloat16)), 1)


class _RouterLogits(torch.autograd.Function):
    """x [t, h] @ weight [e, h]^T in a precision of its own; the weight's gradient goes into main_grad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, group: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.group = weight, group
        if _is_exact_in_bf16(x, dtype):
            return torch.mm(x, weight.t(), out_dtype=dtype)
        return x.to(dtype) @ weight.to(dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, grad = ctx.saved_tensors, ctx.weight, grads[0]
        grad_x = grad_weight = None
        terms = _in_three(grad) if _is_exact_in_bf16(x, grad.dtype) else None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if terms is None else torch.mm(terms, weight.repeat(3, 1))
        if ctx.needs_input_grad[1]:
            if terms is None:
                grad_weight = grad.t() @ x.to(grad.dtype)
            else:
                grad_weight = torch.mm(terms.t(), x, out_dtype=grad.dtype).view(3, *weight.shape).sum(0)
            if ctx.group is not None:
                dist.all_reduce(grad_weight, group=ctx.group)
            if has_main_grad(weight):
                ensure_fresh(weight)
                buffer(weight).add_(grad_weight)
                grad_weight = placeholder(weight)
            else:
                grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, None, None


class _WithLoss(torch.autograd.Function):
    """Hands the routers' weights on, and lets the backward pass begin from a loss beside the objective's as well."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, scale: Any) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        one = torch.ones_like(ctx.like)
        return grads[0], one if ctx.scale is None else ctx.scale(one), None


@dataclass(frozen=True)
class Counted:
    """What routers are told of a micro batch.

    Attributes:
        padding: bool [b, s], True where a token only fills up; None: none does. This rank's under context parallelism.
        weight: fp32 scalar, what its loss is divided by in the end, together with all others'; this rank's likewise.
    """

    padding: Tensor | None
    weight: Tensor


class Seen:
    """What a layer's router did since it was last asked, on this rank: sums over tokens that are no padding.

    Attributes:
        load: fp64 [e], choices that fell on each expert.
        figures: fp64 [5]: tokens; entropy of their scores; balancing loss and z loss, times the weight of their micro
            batch; that weight.
    """

    def __init__(self, experts: int, device: Any) -> None:
        self.load = torch.zeros(experts, dtype=torch.float64, device=device)
        self.figures = torch.zeros(5, dtype=torch.float64, device=device)

    def clear(self) -> None:
        """Begin anew."""
        self.load.zero_()
        self.figures.zero_()


class Router(torch.nn.Module):
    """Softmax over all experts, or sigmoid of each; a token goes to those with the largest scores.

    Every tensor-parallel rank holds the whole weight and routes its own part of the tokens. Under sequence parallelism
    Megatron-Core adds up the parts of the gradient, by the mark on the weight; else this module does, over `sum_group`.

    The balancing loss is that of https://arxiv.org/abs/2101.03961, as Megatron-Core has it: experts / chosen * sum over the
    experts of (share of the tokens' choices * chosen) * (mean score), over the tokens of a micro batch and for each layer by
    itself; the z loss that of https://arxiv.org/abs/2202.08906, the mean squared logsumexp of the logits. Micro batches
    count by what their objective's losses are divided by, so that every layout gives the same gradients.
    """

    def __init__(self, config: TransformerConfig, experts: Experts, sum_group: Any = None) -> None:
        super().__init__()
        self.config, self.experts, self.sum_group = config, experts, sum_group
        self.dtype: torch.dtype = config.routing_dtype
        self.balance: float = config.moe_aux_loss_coeff if config.num_moe_experts else 0.0
        self.z_loss: float = config.moe_z_loss_coeff or 0.0
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        shape = (experts.count, config.hidden_size)
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias: torch.nn.Parameter | None = None
        if experts.biases:
            self.bias = torch.nn.Parameter(torch.zeros(experts.count, dtype=config.params_dtype, device=device))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.register_buffer("expert_bias", torch.zeros(experts.count, device=device) if experts.bias else None)
        self.seen: Seen | None = None
        self.expert_bias: Tensor | None
        self.watching = False  # whether to note what happens outside of training as well

    def forward(self, x: Tensor, padding: Tensor | None = None, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [t, h] -> weights (fp32) and numbers of the chosen experts, each [t, chosen].

        Args:
            padding: bool [t], True where a token does not count for what is noted, nor for losses of the router.
            weight: of the micro batch, see Counted; None: nothing is noted.
        """
        logits = self.logits(x)
        how, wide = self.experts, torch.promote_types(logits.dtype, torch.float32)
        scores = logits.softmax(-1, dtype=wide) if how.score == "softmax" else logits.to(wide).sigmoid()
        if how.groups == 1 and self.expert_bias is None:
            weights, chosen = scores.topk(how.chosen, dim=-1)
        else:
            chosen = self._chosen(scores.detach())
            weights = scores.gather(1, chosen)
        if how.renormalise:
            total = weights.sum(-1, keepdim=True) + (0.0 if how.score == "softmax" else 1e-20)
            weights = weights / (total.clamp_min(how.least) if how.least else total)
        weights = (weights if how.factor == 1.0 else weights * how.factor).float()
        # A layer whose activations are computed again runs twice; the second time is the one with gradients.
        if weight is not None and (self.watching or (self.training and torch.is_grad_enabled())):
            weights = self._noted(weights, logits, scores, chosen, padding, weight)
        return weights, chosen

    def logits(self, x: Tensor) -> Tensor:
        """x [t, h] -> [t, experts], in the precision that tokens are routed in."""
        made = _RouterLogits.apply(x, self.weight, self.dtype, self.sum_group)
        if self.bias is None:
            return made
        # Each rank routes its own part of the tokens: as for the weight, its gradient is summed over them.
        bias = self.bias if self.sum_group is None else copy_to_tensor_model_parallel_region(self.bias, group=self.sum_group)
        return made + bias.to(made.dtype)

    def routing_matrix(self) -> Tensor:
        """fp32 [experts, h]: what x is multiplied by."""
        return self.weight.detach().float()

    def _chosen(self, scores: Tensor) -> Tensor:
        """Numbers of the experts with the largest scores, bias and groups taken into account: [t, e] to [t, chosen]."""
        how = self.experts
        scores = scores if self.expert_bias is None else scores + self.expert_bias
        if how.groups > 1:
            grouped = scores.unflatten(-1, (how.groups, -1))
            worth = grouped.amax(-1) if how.group_score == "best" else grouped.topk(2, dim=-1).values.sum(-1)
            best = worth.topk(how.kept, dim=-1).indices
            kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
            scores = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
        return scores.topk(how.chosen, dim=-1).indices

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The bias stays in fp32 whatever the model is cast to, as transformers keeps it: its differences are small."""
        bias = self.expert_bias
        made = super()._apply(fn, recurse)
        if bias is not None:
            self.expert_bias = bias.to(self.weight.device)
        return made

    def _noted(
        self, weights: Tensor, logits: Tensor, scores: Tensor, chosen: Tensor, padding: Tensor | None, weight: Tensor
    ) -> Tensor:
        """Note what was chosen, and give the weights with the router's own losses hanging on them."""
        if self.experts.score != "softmax":
            scores = scores / scores.sum(-1, keepdim=True)
        counts = scores.new_ones(len(scores)) if padding is None else (~padding).to(scores.dtype)
        with torch.no_grad():
            load = counts.new_zeros(self.experts.count)
            load.index_add_(0, chosen.flatten(), counts.repeat_interleave(self.experts.chosen))
            entropy = -(scores.clamp_min(1e-30).log() * scores).sum(-1)
            if self.seen is None:
                self.seen = Seen(self.experts.count, scores.device)
            self.seen.load += load
            self.seen.figures[0] += counts.sum()
            self.seen.figures[1] += (entropy * counts).sum()
        if not (self.balance or self.z_loss):
            return weights
        group = parallel_state.get_tensor_and_context_parallel_group()
        tp = parallel_state.get_tensor_model_parallel_world_size()
        shared = torch.cat((load, counts.sum().view(1), weight.to(scores.device, scores.dtype).view(1) / tp))
        if group.size() > 1:
            dist.all_reduce(shared, group=group)
        load, tokens, whole = shared[:-2], shared[-2].clamp_min(1.0), shared[-1]
        mean = (scores * counts.unsqueeze(-1)).sum(0) / tokens  # this rank's part of it
        balance = (load / tokens * mean).sum() * (self.experts.count / self.experts.chosen)
        z_loss = (logits.logsumexp(-1).square() * counts).sum() / tokens
        with torch.no_grad():
            self.seen.figures[2:] += torch.stack((balance * whole, z_loss * whole, whole / group.size()))
        if not torch.is_grad_enabled():
            return weights
        loss = (self.balance * balance + self.z_loss * z_loss) * whole
        return _WithLoss.apply(weights, loss, self.config.grad_scale_func if self.config.fp16 else None)
