"""The products of many frozen experts at once with low-rank adapters on them: y = W_e x + scale * B_e A_e x for every row.

As `expert_mlp`, rows of one expert stand together. Where ranks hold parts of an expert each makes its part of everything:
what it adds to a row's result is summed where the row came from. The gradients of halves that each of them holds whole are
parts, too, and are summed once a step (`kernels.lora.sum_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.expert_mlp import grouped, grouped_outer
from megaswift.megatron.kernels.expert_rows import weighted_swiglu, weighted_swiglu_backward
from megaswift.megatron.kernels.main_grad import add_gradient
from megaswift.megatron.kernels.packed import PackedWeight, dense


@dataclass(frozen=True)
class ExpertHalves:
    """An adapter of one product of all experts here.

    Args:
        a: [e, parts * r, k]; b: [e, n, r], the parts one above the other, equally high.
        scale: what B A x is multiplied by.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def parts(self) -> int:
        """How many Hugging Face modules the product is made of: gate and up, or one."""
        return self.a.shape[1] // self.b.shape[2]

    def spread(self) -> Tensor:
        """B as [e, n, parts * r] behind all of A, with zeros where a part has no say: one product then serves all parts."""
        if self.parts == 1:
            return self.b
        rows = self.b.view(len(self.b), self.parts, -1, self.b.shape[2])
        whole = rows.new_zeros((*rows.shape[:3], self.parts, rows.shape[3]))
        for number in range(self.parts):
            whole[:, number, :, number] = rows[:, number]
        return whole.view(len(self.b), self.b.shape[1], -1)

    def gathered(self, whole: Tensor) -> Tensor:
        """The inverse for a gradient: [e, n, r] of [e, n, parts * r]."""
        if self.parts == 1:
            return whole
        blocks = whole.view(len(whole), self.parts, -1, self.parts, self.b.shape[2])
        return torch.stack([blocks[:, number, :, number] for number in range(self.parts)], 1).view(self.b.shape)


def add_low_rank(y: Tensor, x: Tensor, halves: ExpertHalves, ends: Tensor) -> Tensor:
    """Add the adapter's part to y [t, n], in place; A x [t, parts * r] is kept for the way back.

    Args:
        x: [t, k], sorted by expert; ends: int32 [e], the row after each expert's last.
    """
    low = _product(x, halves.a.transpose(1, 2), ends)
    y.add_(_product(low, halves.spread().transpose(1, 2), ends), alpha=halves.scale)
    return low


def low_rank_grads(grad: Tensor, low: Tensor, halves: ExpertHalves, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Of `add_low_rank`, from the gradient of y [t, n]: those of A x [t, parts * r], the scale in it, and of B."""
    change = halves.gathered(_outer(grad, low, ends))
    return _product(grad, halves.spread(), ends).mul_(halves.scale), change.mul_(halves.scale)


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped`, also for sizes that the kernel of GPUs does not take: rows of less than 16 bytes."""
    if x.is_cuda and (x.shape[1] % 8 or weight.shape[2] % 8):
        return torch.cat([part @ matrix for part, matrix in zip(x.split(_counts(ends)), weight)])
    return grouped(x, weight, ends)


def _outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    if x.is_cuda and (x.shape[1] % 8 or grad.shape[1] % 8):
        counts = _counts(ends)
        return torch.stack([g.t() @ part for g, part in zip(grad.split(counts), x.split(counts))])
    return grouped_outer(grad, x, ends)


def _counts(ends: Tensor) -> list[int]:
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


class _LoraExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, first: Any, second: Any, a1: Any, b1: Any, a2: Any, b2: Any, scale: float, ends: Tensor
    ) -> Tensor:  # fmt: skip
        halves = [None if a is None else ExpertHalves(a, b, scale) for a, b in ((a1, b1), (a2, b2))]
        both = grouped(x, dense(first, x.dtype).transpose(1, 2), ends)
        low1 = None if halves[0] is None else add_low_rank(both, x, halves[0], ends)
        hidden = weighted_swiglu(both, weights)
        output = grouped(hidden, dense(second, x.dtype).transpose(1, 2), ends)
        low2 = None if halves[1] is None else add_low_rank(output, hidden, halves[1], ends)
        ctx.save_for_backward(x, both, weights, ends, low1, low2)
        ctx.first, ctx.second, ctx.halves = (
            first,
            second,
            halves,
        )  # as they are: through saved-tensor hooks they would lose main_grad
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, both, weights, ends, low1, low2 = ctx.saved_tensors
        grad, (one, two) = grads[0].contiguous(), ctx.halves
        da1 = db1 = da2 = db2 = None
        dlow: Any = None
        hidden = grouped(grad, dense(ctx.second, grad.dtype), ends)  # its gradient, until SwiGLU's backward makes it again
        if two is not None:
            dlow, change = low_rank_grads(grad, low2, two, ends)
            db2 = add_gradient(two.b, change)
            hidden.add_(_product(dlow, two.a, ends))
        grad_weights = weighted_swiglu_backward(hidden, both, weights)  # both becomes its gradient
        if two is not None:
            da2 = add_gradient(two.a, _outer(dlow, hidden, ends))
        grad_x = grouped(both, dense(ctx.first, both.dtype), ends) if ctx.needs_input_grad[0] else None
        if one is not None:
            dlow, change = low_rank_grads(both, low1, one, ends)
            if grad_x is not None:
                grad_x.add_(_product(dlow, one.a, ends))
            da1, db1 = add_gradient(one.a, _outer(dlow, x, ends)), add_gradient(one.b, change)
        return grad_x, grad_weights, None, None, da1, db1, da2, db2, None, None


def lora_expert_mlp(
    x: Tensor,
    weights: Tensor,
    first: Tensor | PackedWeight,
    second: Tensor | PackedWeight,
    one: ExpertHalves | None,
    two: ExpertHalves | None,
    ends: Tensor,
) -> Tensor:
    """Every row through its expert's gated MLP, times the row's weight, with adapters on its first and second product.

    Args:
        x: [t, h], sorted by expert.
        weights: fp32 [t], what the router gives each row.
        first: [e, 2f, h], gate over up; second: [e, h, f]; both frozen, as they are or held in few bits.
        one, two: the adapters of both; None where a product has none.
        ends: int32 [e], the row after each expert's last.

    Returns:
        [t, h]
    """
    scale = next(halves.scale for halves in (one, two) if halves is not None)
    parts = [part for halves in (one, two) for part in ((None, None) if halves is None else (halves.a, halves.b))]
    return _LoraExpertMLP.apply(x, weights, first, second, *parts, scale, ends)
