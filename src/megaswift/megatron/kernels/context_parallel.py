"""Context parallelism: the ranks of a group share the tokens of every row.

A row of width s is cut into 2 * cp slices; rank r holds slices r and 2 * cp - 1 - r, so that causal attention is equal
work for all (the zigzag of https://arxiv.org/abs/2311.09431). Everything but attention is done token by token and does not
notice. For attention keys and values, which grouped heads make small, are gathered; queries stay where they are, and each
slice attends to what stands before it in its samples. The gradients of keys and values are summed and scattered back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaswift.megatron.kernels.attention import Lengths, varlen_causal

if TYPE_CHECKING:
    from megaswift.data.batches import MicroBatch


@dataclass(frozen=True)
class Slice:
    """One of this rank's slices.

    Args:
        first, last: its tokens in the whole row.
        start: the first token that any of them attends to.
        lengths: for each sample that has tokens in it, how many these are, and how many keys the last of them sees.
    """

    first: int
    last: int
    start: int
    lengths: Lengths


@dataclass(frozen=True)
class Share:
    """What a rank needs to know to attend from its part of a micro batch.

    Args:
        slices: its two slices, in the order of its local tokens.
        group: the ranks that share the rows.
        samples: lengths of what stands in each whole row, one after the other; the same in all rows.
    """

    slices: tuple[Slice, Slice]
    group: dist.ProcessGroup
    samples: tuple[int, ...]

    def take(self, x: Tensor) -> Tensor:
        """This rank's part of rows [b, s]."""
        return torch.cat([x[:, piece.first : piece.last] for piece in self.slices], dim=1)


def shard_batch(batch: MicroBatch, group: dist.ProcessGroup) -> MicroBatch:
    """This rank's part of a micro batch: two slices of each row, and a Share that describes them.

    The width of the rows must be a multiple of 2 * cp.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rows, width = batch.tokens.shape
    samples = [width] if batch.cu_seqlens is None else batch.cu_seqlens.diff().tolist()
    part = width // (2 * size)
    first, second = (
        _slice(number * part, (number + 1) * part, samples, rows, batch.tokens.device) for number in (rank, 2 * size - 1 - rank)
    )
    share = Share((first, second), group, tuple(samples))
    more = [name for name in ("weights", "padding", "origins", "pooled") if getattr(batch, name) is not None]
    names = ("tokens", "labels", "position_ids", *more)
    own: dict[str, Any] = {name: share.take(getattr(batch, name)) for name in names}
    return replace(batch, **own, cu_seqlens=None, share=share)


def _slice(first: int, last: int, samples: list[int], rows: int, device: torch.device) -> Slice:
    """`samples`: lengths of what stands in each row, one after the other; the same in all rows."""
    queries: list[int] = []
    keys: list[int] = []
    start, begin = first, 0
    for length in samples:
        end = begin + length
        if begin < last and end > first:
            start = start if queries else begin
            queries.append(min(end, last) - max(begin, first))
            keys.append(min(end, last) - begin)
        begin = end
    return Slice(first, last, start, Lengths.of(queries * rows, keys * rows, device))


class _Gather(torch.autograd.Function):
    """[s / cp, ...] of every rank to [s, ...] in the order of the row; backward sums the gradients and scatters them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, size = group, dist.get_world_size(group)
        everyone = torch.empty((size * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(everyone, x.contiguous(), group=group)
        halves = everyone.view(size, 2, x.shape[0] // 2, *x.shape[1:])
        return torch.cat((halves[:, 0], halves[:, 1].flip(0))).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        size = dist.get_world_size(ctx.group)
        slices = grads[0].unflatten(0, (2 * size, -1))
        everyone = torch.stack((slices[:size], slices[size:].flip(0)), dim=1).flatten(0, 2)
        own = torch.empty((everyone.shape[0] // size, *everyone.shape[1:]), dtype=everyone.dtype, device=everyone.device)
        dist.reduce_scatter_tensor(own, everyone, group=ctx.group)
        return own, None


class _Exchange(torch.autograd.Function):
    """Either direction of `by_heads`; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads, size = group, to_heads, dist.get_world_size(group)
        if to_heads:
            sent = x.unflatten(2, (size, -1)).movedim(2, 0).contiguous()
        else:
            slices = x.unflatten(0, (2 * size, -1))
            sent = torch.stack((slices[:size], slices[size:].flip(0)), dim=1).flatten(1, 2)
        everyone = torch.empty_like(sent)
        dist.all_to_all_single(everyone, sent, group=group)
        if not to_heads:
            return everyone.movedim(0, 2).flatten(2, 3)
        halves = everyone.unflatten(1, (2, -1))
        return torch.cat((halves[:, 0], halves[:, 1].flip(0))).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(grads[0], ctx.group, not ctx.to_heads), None, None


def by_heads(x: Tensor, share: Share) -> Tensor:
    """Every head of this rank's tokens -> this rank's heads of every token, in the order of the row: rank r has the r-th part of them.

    Args:
        x: [s / cp, b, heads, d], the two slices one after the other.

    Returns:
        [s, b, heads / cp, d]
    """
    return _Exchange.apply(x, share.group, True)


def by_tokens(x: Tensor, share: Share) -> Tensor:
    """The other direction of `by_heads`."""
    return _Exchange.apply(x, share.group, False)


def shared_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    share: Share,
    softmax_scale: float | None = None,
    *,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of this rank's tokens within their samples, to all tokens of the row before them.

    Args:
        query: [s / cp, b, heads, d], the two slices one after the other; key, value: [s / cp, b, kv heads, d].
        window, cap, sinks: as for `dense_causal`.
    Returns:
        [s / cp, b, heads * d].
    """
    both = _Gather.apply(torch.stack((key, value), dim=1), share.group)  # one message for the two
    parts = []
    for piece, own in zip(share.slices, query.chunk(2)):
        seen = both[piece.start : piece.last]
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (own, seen[:, 0], seen[:, 1]))
        mixed = varlen_causal(q, k, v, piece.lengths, softmax_scale, window=window, cap=cap, sinks=sinks)
        parts.append(mixed.unflatten(0, (query.shape[1], -1)).transpose(0, 1).flatten(2))
    return torch.cat(parts)
