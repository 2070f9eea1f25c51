"""Causal attention with a window, a cap of the scores and sinks, block by block, in plain operations: right everywhere, fast nowhere.

A block of queries is multiplied with the keys that any of them sees, so that memory is linear in the length of a row; with a
window work is, too. Nothing of a block is kept: the backward pass makes its scores again. It is what kernels are compared with,
and what runs where none knows what is asked for. Scores and sums are in fp32 for half types.

Formulas: softmax of t(scale * q k), where t is the identity or cap * tanh(x / cap) (https://arxiv.org/abs/2408.00118), whose
slope is 1 - (t / cap)^2; gradients as in https://arxiv.org/abs/2205.14135.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.sinks import sinks_gradient, with_sinks

_QUERIES = 256  # of a block


@dataclass(frozen=True)
class _Scores:
    """How scores are made: by a factor, of which keys (`window` tokens, or None: all before a query), and with which cap."""

    scale: float
    window: int | None
    cap: float | None

    def blocks(self, queries: int, keys: int) -> Iterator[tuple[slice, slice, int]]:
        """Queries, the keys that any of them sees, and how many keys of these the block's first query sees at most."""
        before = keys - queries  # the last query sees the last key
        for first in range(0, queries, _QUERIES):
            last = min(first + _QUERIES, queries)
            low = 0 if self.window is None else max(0, first + before - self.window + 1)
            yield slice(first, last), slice(low, last + before), first + before - low + 1

    def of(self, q: Tensor, k: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Scores [g, r, queries, keys] of a block, and bool [queries, keys]: which of them do not count."""
        scores = (q * self.scale) @ k.unsqueeze(1).transpose(-2, -1)
        if self.cap is not None:
            scores = scores.div_(self.cap).tanh_().mul_(self.cap)
        nearest = torch.arange(seen - 1, seen - 1 + q.shape[-2], device=q.device).unsqueeze(1)  # the key that a query is beside
        distance = nearest - torch.arange(k.shape[-2], device=q.device)
        hidden = distance < 0
        return scores, hidden if self.window is None else hidden | (distance >= self.window)


class _BlockAttention(torch.autograd.Function):
    """q [g, r, n, d], k and v [g, m, d]: r query heads for each key/value head; the last query stands beside the last key."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: _Scores) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:-1], dtype=wide, device=q.device)
        for queries, keys, seen in how.blocks(q.shape[2], k.shape[1]):
            scores, hidden = how.of(q[:, :, queries].to(wide), k[:, keys].to(wide), seen)
            scores.masked_fill_(hidden, float("-inf"))
            lse[:, :, queries] = scores.logsumexp(-1)
            weights = scores.sub_(lse[:, :, queries].unsqueeze(-1)).exp_()
            mixed = weights @ v[:, keys].unsqueeze(1).to(wide)
            if sinks is not None:  # heads are the first two axes here
                own = mixed.permute(2, 0, 1, 3), lse[:, :, queries].permute(2, 0, 1)
                mixed, full = (part.movedim(0, 2) for part in with_sinks(*own, sinks))
                lse[:, :, queries] = full
            out[:, :, queries] = mixed.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        how: _Scores = ctx.how
        wide = lse.dtype
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for queries, keys, seen in how.blocks(q.shape[2], k.shape[1]):
            own, near, values = (x.to(wide) for x in (q[:, :, queries], k[:, keys], v[:, keys]))
            dout = grads[0][:, :, queries].to(wide)
            scores, hidden = how.of(own, near, seen)
            weights = (scores - lse[:, :, queries].unsqueeze(-1)).exp_().masked_fill_(hidden, 0.0)
            dv[:, keys] += weights.flatten(1, 2).transpose(-2, -1) @ dout.flatten(1, 2)
            dscores = dout @ values.unsqueeze(1).transpose(-2, -1)
            dscores = dscores.sub_((dout * out[:, :, queries].to(wide)).sum(-1, keepdim=True)).mul_(weights)
            if how.cap is not None:
                dscores.mul_(1.0 - (scores / how.cap).square_())
            dscores.mul_(how.scale)
            dq[:, :, queries] = (dscores @ near.unsqueeze(1)).to(q.dtype)
            dk[:, keys] += dscores.flatten(1, 2).transpose(-2, -1) @ own.flatten(1, 2)
        dsinks = None
        if sinks is not None:
            dsinks = sinks_gradient(grads[0].movedim(2, 0), out.movedim(2, 0), lse.movedim(2, 0), sinks)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks, None


def block_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    *,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of rows, from their last tokens to all of them.

    Args:
        q: [b, queries, heads, d]; k, v: [b, keys, kv heads, d].
        softmax_scale: factor on the scores, 1 / sqrt(d) when None.
        window: how many keys a query sees, its own among them; None: all before it.
        cap: a score s becomes cap * tanh(s / cap); None: it stays.
        sinks: [heads], a score of each head that no key has (see `kernels/sinks.py`); None: there are none.
    Returns:
        [b, queries, heads, d].
    """
    rows, queries, heads, dim = q.shape
    groups = k.shape[2]
    folded = q.permute(0, 2, 1, 3).reshape(rows * groups, heads // groups, queries, dim)
    key, value = (part.permute(0, 2, 1, 3).flatten(0, 1) for part in (k, v))
    how = _Scores(dim**-0.5 if softmax_scale is None else softmax_scale, window, cap)
    own = None if sinks is None else sinks.view(groups, -1).repeat(rows, 1)
    mixed = _BlockAttention.apply(folded, key, value, own, how)
    return mixed.reshape(rows, heads, queries, -1).permute(0, 2, 1, 3)
