"""Causal attention, dense and packed, with grouped key-value heads as they are (never expanded on the GPU).

FlashAttention 4 is the fastest on Hopper where it is installed. Of the kernels that PyTorch ships, cuDNN's is the fastest there
for whole rows; elsewhere, and for packed rows, its flash kernel. Packed rows hold several samples, told apart by
`cu_seqlens`; each attends within itself. A window is an argument of FlashAttention 4 and of the flash kernel, a cap of the
scores of FlashAttention 4 alone; sinks go with both (`sinks`); what no kernel knows goes through plain operations (`block_attention`). A window as long as
the longest sample is none.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.megatron.kernels.block_attention import block_causal
from megaswift.megatron.kernels.flash_attention_4 import flash_attention_4, refusal
from megaswift.megatron.kernels.sinks import sinks_gradient, with_sinks


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return (
        torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0) and torch.backends.cudnn.is_available()
    )


@functools.cache
def _has_flash(device: torch.device) -> bool:
    """Whether PyTorch's flash kernel runs on a GPU: Ampere is the first that it was written for."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _takes_packed(query: Tensor) -> bool:
    """Whether there is a kernel for packed rows; else each sample is a row of its own."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and _has_flash(query.device)


def _cudnn_takes(query: Tensor) -> bool:
    """What the cuDNN kernel asks of its input, beside the GPU's age."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return query.shape[-1] % 8 == 0 and query.shape[-1] <= 128 and query.shape[0] > 1 and _is_hopper(query.device)


def takes_narrow_values(query: Tensor) -> bool:
    """Whether `dense_causal` takes values narrower than such queries [s, b, heads, d] as they are, without losing a fast kernel.

    On Hopper PyTorch chooses cuDNN for heads of 192 with values of 128; elsewhere its choice for unequal widths is a slow one.
    """
    if not query.is_cuda:
        return True
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] == 192 and _is_hopper(query.device)


def _narrowed(window: int | None, longest: int) -> int | None:
    """A window, or None where no sample is longer than it."""
    return None if window is None or window >= longest else window


def dense_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float | None = None,
    *,
    backend: str = "auto",
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of whole rows.

    Args:
        query: [s, b, heads, d]; key, value: [s, b, kv heads, d], or narrower values where `takes_narrow_values`.
        softmax_scale: factor on the scores, 1 / sqrt(d) when None.
        backend: "auto" (the fastest measured), or "torch": PyTorch's own choice among the kernels that are enabled there.
        window: how many keys a query sees, its own among them; None: all before it.
        cap: a score s becomes cap * tanh(s / cap); None: it stays.
        sinks: [heads], a score of each head that no key has; None: there are none.
    Returns:
        [s, b, heads * d].
    """
    s, b, heads, dim = query.shape
    window = _narrowed(window, s)
    q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    limits: dict[str, Any] = dict(packed=False, window=window is not None, cap=cap, sinks=sinks is not None)
    if backend == "auto" and refusal(query, key.shape[2], **limits) is None:
        rows = [part.transpose(0, 1) for part in (query, key, value)]
        mixed = flash_attention_4(rows[0], rows[1], rows[2], softmax_scale=softmax_scale, window=window, cap=cap, sinks=sinks)
        return mixed.transpose(0, 1).reshape(s, b, heads * dim)
    special = window is not None or sinks is not None
    if cap is not None or (special and not _takes_packed(query)):
        rows = [part.transpose(0, 1) for part in (query, key, value)]
        mixed = block_causal(rows[0], rows[1], rows[2], softmax_scale, window=window, cap=cap, sinks=sinks)
        return mixed.transpose(0, 1).reshape(s, b, heads * dim)
    if special:  # rows are samples, one after the other
        lengths = Lengths.of([s] * b, [s] * b, query.device)
        packed = [part.transpose(0, 1).flatten(0, 1) for part in (query, key, value)]
        mixed = varlen_causal(packed[0], packed[1], packed[2], lengths, softmax_scale, window=window, sinks=sinks)
        return mixed.unflatten(0, (b, s)).transpose(0, 1).reshape(s, b, heads * dim)
    if backend == "auto" and _cudnn_takes(query):
        needs = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        mixed = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, needs, 0.0, True, False, scale=softmax_scale)[
            0
        ]
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=heads != key.shape[2])
    return mixed.permute(2, 0, 1, 3).reshape(s, b, -1)


@dataclass(frozen=True)
class Lengths:
    """Samples that lie one after the other, and for each how many queries and how many keys it has.

    The last query sees all keys of its sample, the one before it all but the last, and so on.

    Args:
        queries, keys: the numbers; equal where whole samples attend to themselves.
        cu_queries, cu_keys: int32 [n + 1] on the device, where they begin; the last entry is their sum.
    """

    queries: list[int]
    keys: list[int]
    cu_queries: Tensor
    cu_keys: Tensor

    @classmethod
    def of(cls, queries: list[int], keys: list[int], device: torch.device) -> Lengths:
        borders = [torch.tensor([0, *part], dtype=torch.int32).cumsum(0, dtype=torch.int32) for part in (queries, keys)]
        return cls(queries, keys, *(part.to(device, non_blocking=True) for part in borders))


def describe(
    query: Tensor, kv_heads: int, *, packed: bool, window: bool = False, cap: float | None = None, sinks: bool = False
) -> str:
    """Which kernel `packed_causal`, or else `dense_causal`, takes for such a query on its GPU, in words for the user.

    Args:
        window, cap, sinks: whether samples are longer than a window, what scores are capped at, and whether there are sinks.
    """
    reason = refusal(query, kv_heads, packed=packed, window=window, cap=cap, sinks=sinks)
    if reason is None:
        return "FlashAttention 4"
    if cap is not None or ((window or sinks) and not _takes_packed(query)):
        return "plain operations, block by block, which is the slow way"
    packed = packed or window or sinks
    if query.dtype == torch.float32:
        return "PyTorch's own choice for fp32" + (", sample by sample" if packed else "")
    if not _has_flash(query.device):
        return "PyTorch's own choice for this GPU" + (", sample by sample" if packed else "")
    used = "PyTorch's flash kernel" if packed or not _cudnn_takes(query) else "cuDNN"
    if not packed and takes_narrow_values(query):
        used = "PyTorch's own choice for heads of 192, which is cuDNN"
    if reason:
        return f"{used}, for FlashAttention 4 does not work here: {reason.splitlines()[0]}"
    return used


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
    window: int | None,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor | None:
    """The fastest kernel for packed half-precision rows on a GPU: [t, heads, d], kv heads as they are; None where none fits."""
    if refusal(q, k.shape[1], packed=True, window=window is not None, cap=cap, sinks=sinks is not None) is None:
        return flash_attention_4(q, k, v, cu, longest, scale, window=window, cap=cap, sinks=sinks)
    return None if cap is not None else _FlashVarlen.apply(q, k, v, sinks, cu, longest, scale, window)


class _FlashVarlen(torch.autograd.Function):
    """PyTorch's flash attention over packed rows: [t, heads, d], kv heads as they are."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        cu: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        # Its window counts the keys before a query's own.
        options: dict[str, Any] = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *cu, *longest, 0.0, True, False, scale=scale, **options
        )
        if sinks is not None:
            out, full = with_sinks(out, lse.t(), sinks)
            lse = full.t().contiguous()
        ctx.save_for_backward(q, k, v, sinks, out, lse, *cu, state, unused)
        ctx.longest, ctx.options = longest, options | {"scale": scale}
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse, cu_q, cu_k, state, unused = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grads[0].contiguous(), q, k, v, out, lse, cu_q, cu_k, *ctx.longest, 0.0, True, state, unused, **ctx.options
        )
        dsinks = None if sinks is None else sinks_gradient(grads[0], out, lse.t(), sinks)
        return dq, dk, dv, dsinks, None, None, None, None


def _by_sample(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: list[int],
    keys: list[int],
    scale: float | None,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The twin: one attention a sample. `split` and `cat` keep the backward pass linear in the row's length."""
    parts = []
    for one in zip(q.split(queries), k.split(keys), v.split(keys)):
        narrow = _narrowed(window, one[1].shape[0])
        if narrow is not None or cap is not None or sinks is not None:
            rows = [x.unsqueeze(0) for x in one]
            parts.append(block_causal(rows[0], rows[1], rows[2], scale, window=narrow, cap=cap, sinks=sinks).squeeze(0))
            continue
        a, b, c = (x.transpose(0, 1).unsqueeze(0) for x in one)
        before = b.shape[2] - a.shape[2]  # keys that all queries see
        mask = torch.ones(a.shape[2], b.shape[2], dtype=torch.bool, device=q.device).tril(before) if before else None
        mixed = F.scaled_dot_product_attention(
            a, b, c, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(mixed.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def varlen_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    softmax_scale: float | None = None,
    *,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention within each of several samples, from their last tokens to all of them.

    Args:
        q: [queries, heads, d]; k, v: [keys, kv heads, d].
        window, cap, sinks: as for `dense_causal`.
    Returns:
        [queries, heads, d].
    """
    window = _narrowed(window, max(lengths.keys))
    if _takes_packed(q):
        cu, longest = (lengths.cu_queries, lengths.cu_keys), (max(lengths.queries), max(lengths.keys))
        mixed = _packed(q, k, v, cu, longest, softmax_scale, window, cap, sinks)
        if mixed is not None:
            return mixed
    return _by_sample(q, k, v, lengths.queries, lengths.keys, softmax_scale, window, cap, sinks)


def packed_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    *,
    lengths: list[int] | None = None,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention within each of the samples that share one row.

    Args:
        query: [t, 1, heads, d]; key, value: [t, 1, kv heads, d].
        cu_seqlens: int32 [n + 1], where samples begin; the last entry is t.
        max_seqlen: length of the longest sample.
        lengths: the samples' lengths as numbers, if the caller has them (used where there is no kernel for packed rows).
        window, cap, sinks: as for `dense_causal`.
    Returns:
        [t, 1, heads * d].
    """
    t, _, heads, dim = query.shape
    q, k, v = (part.squeeze(1) for part in (query, key, value))
    window, mixed = _narrowed(window, max_seqlen), None
    if _takes_packed(query):
        mixed = _packed(q, k, v, (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen), softmax_scale, window, cap, sinks)
    if mixed is None:
        lengths = lengths or cu_seqlens.diff().tolist()
        mixed = _by_sample(q, k, v, lengths, lengths, softmax_scale, window, cap, sinks)
    return mixed.reshape(t, 1, heads * dim)
