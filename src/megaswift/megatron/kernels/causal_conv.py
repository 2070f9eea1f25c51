"""Causal convolution of each channel by itself along samples that lie one after the other: none sees tokens of the one before it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@functools.lru_cache(maxsize=32)  # layers of a micro batch ask for the same
def _first_rows(lengths: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """int64, the first `count` rows of every sample (all of a shorter one)."""
    starts: list[int] = []
    place = 0
    for length in lengths:
        starts += range(place, place + min(count, length))
        place += length
    return torch.tensor(starts, dtype=torch.int64).to(device, non_blocking=True)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
        width = weight.shape[1]
        ctx.borders = [_first_rows(tuple(lengths), back, x.device) for back in range(1, width)]
        ctx.save_for_backward(x, weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        out = x.to(wide) * weight[:, -1]
        for back in range(1, width):
            out += _before(x, back, ctx.borders[back - 1]) * weight[:, -1 - back].to(wide)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        grad = grads[0].to(wide)
        grad_weight = torch.empty_like(weight)
        grad_weight[:, -1] = (grad * x).sum(0)
        grad_x = grad * weight[:, -1]
        for back in range(1, weight.shape[1]):
            grad_weight[:, -1 - back] = (grad * _before(x, back, ctx.borders[back - 1])).sum(0)
            # What a token gives to the one `back` after it comes back from there, unless a sample begins between them.
            own = (grad * weight[:, -1 - back]).index_fill(0, ctx.borders[back - 1], 0.0)
            grad_x[:-back] += own[back:]
        return grad_x.to(x.dtype), grad_weight, None


def _before(x: Tensor, back: int, firsts: Tensor) -> Tensor:
    """For each row of x [t, c] the one `back` before it; zeros where that is of another sample."""
    shifted = torch.zeros_like(x)
    shifted[back:] = x[:-back]
    return shifted.index_fill_(0, firsts, 0.0)


def causal_conv(x: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    """The sum over the last tokens of a sample, each times its weight, in fp32 or wider.

    Args:
        x: [t, channels].
        weight: [channels, width]; the last one is a token's own.
        lengths: of the samples; they add up to t.

    Returns:
        [t, channels]
    """
    return _CausalConv.apply(x, weight, lengths)
