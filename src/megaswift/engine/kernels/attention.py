"""Causal attention, dense and packed, with grouped key-value heads as they are (never expanded on the GPU).

On Hopper the cuDNN kernel is the fastest that PyTorch ships; elsewhere flash attention. Packed rows hold several samples,
told apart by `cu_seqlens`; each attends within itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return (
        torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0) and torch.backends.cudnn.is_available()
    )


def _cudnn_takes(query: Tensor) -> bool:
    """What the cuDNN kernel asks of its input, beside the GPU's age."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return query.shape[-1] % 8 == 0 and query.shape[-1] <= 128 and query.shape[0] > 1 and _is_hopper(query.device)


def dense_causal(
    query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None = None, *, backend: str = "auto"
) -> Tensor:
    """Causal attention of whole rows.

    Args:
        query: [s, b, heads, d]; key, value: [s, b, kv heads, d].
        softmax_scale: factor on the scores, 1 / sqrt(d) when None.
        backend: "auto" (the fastest measured), or "torch": PyTorch's own choice among the kernels that are enabled there.
    Returns:
        [s, b, heads * d].
    """
    s, b, heads, dim = query.shape
    q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    if backend == "auto" and _cudnn_takes(query):
        needs = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        mixed = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, needs, 0.0, True, False, scale=softmax_scale)[
            0
        ]
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=heads != key.shape[2])
    return mixed.permute(2, 0, 1, 3).reshape(s, b, heads * dim)


class _FlashVarlen(torch.autograd.Function):
    """PyTorch's flash attention over packed rows: [t, heads, d], kv heads as they are."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None) -> Tensor:
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, state, unused)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens, state, unused = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grads[0].contiguous(),
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens,
            cu_seqlens,
            ctx.longest,
            ctx.longest,
            0.0,
            True,
            state,
            unused,
            scale=ctx.scale,
        )
        return dq, dk, dv, None, None, None


def _by_sample(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None) -> Tensor:
    """The twin: one attention a sample. `split` and `cat` keep the backward pass linear in the row's length."""
    parts = []
    for one in zip(*(x.split(lengths) for x in (q, k, v))):
        a, b, c = (x.transpose(0, 1).unsqueeze(0) for x in one)
        mixed = F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        parts.append(mixed.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def packed_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    *,
    lengths: list[int] | None = None,
) -> Tensor:
    """Causal attention within each of the samples that share one row.

    Args:
        query: [t, 1, heads, d]; key, value: [t, 1, kv heads, d].
        cu_seqlens: int32 [n + 1], where samples begin; the last entry is t.
        max_seqlen: length of the longest sample.
        lengths: the samples' lengths as numbers, if the caller has them (used on the CPU, saves reading cu_seqlens).
    Returns:
        [t, 1, heads * d].
    """
    t, _, heads, dim = query.shape
    q, k, v = (part.squeeze(1) for part in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        mixed = _FlashVarlen.apply(q, k, v, cu_seqlens, max_seqlen, softmax_scale)
    else:
        mixed = _by_sample(q, k, v, lengths or cu_seqlens.diff().tolist(), softmax_scale)
    return mixed.reshape(t, 1, heads * dim)
