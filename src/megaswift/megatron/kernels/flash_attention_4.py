"""FlashAttention 4 (the package flash-attn-4, kernels written in CuTe DSL), where it is installed and the GPU is Hopper or newer.

It beats cuDNN on whole rows and is about twice as fast as PyTorch's flash kernel on packed and long ones (docs/performance.md).
Its kernels are compiled when they are first needed, some eight seconds in each process.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.sinks import sinks_gradient, with_sinks

# Major compute capabilities whose data-center kernels the package has in both directions.
_CAPABILITIES = (9, 10)
_LARGEST_HEAD = 128


@functools.cache
def _interface() -> tuple[Any, str]:
    """The package's functions, or None and why: "" where it is not installed."""
    try:
        from flash_attn.cute import interface
    except ModuleNotFoundError as error:
        return None, "" if (error.name or "").startswith("flash_attn") else str(error)
    except Exception as error:  # its compiler and its runtime are packages of their own, and may not fit together
        return None, f"{type(error).__name__}: {error}"
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)  # its compiler's, for each kernel of version 4.0.0b36
    return interface, ""


@functools.cache
def _probed(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    packed: bool,
    window: bool,
    cap: float | None,
    with_one: bool,
) -> str:
    """Compile both directions and compare them with plain attention. Returns "" or what is wrong.

    Some sizes compile and give wrong numbers: with heads of 80, version 4.0.0b36 returns a wrong gradient of the query.
    """
    lengths = [130, 1, 382] if packed else [513]
    generator = torch.Generator(device).manual_seed(0)

    def sample(count: int) -> Tensor:
        shape = (sum(lengths), count, dim) if packed else (1, sum(lengths), count, dim)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    inputs = [sample(count).requires_grad_() for count in (heads, kv_heads, kv_heads)]
    if with_one:  # a sink
        inputs.append(torch.randn(heads, dtype=dtype, device=device, generator=generator).requires_grad_())
    exact = [part.detach().float().requires_grad_() for part in inputs]
    grad = sample(heads)
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    try:
        with torch.enable_grad():
            cu, longest = ((borders, borders), (max(lengths), max(lengths))) if packed else (None, None)
            narrow = 150 if window else None
            sinks = inputs[3] if with_one else None
            out = _FlashAttention4.apply(*inputs[:3], sinks, cu, longest, None, narrow, cap)
            samples = zip(*(part.split(lengths, dim=-3) for part in exact[:3]))
            exact_sinks = exact[3] if with_one else None
            want = torch.cat([_plain(q, k, v, narrow, cap, exact_sinks) for q, k, v in samples], dim=-3)
            got = (out, *torch.autograd.grad(out, inputs, grad))
            wanted = (want, *torch.autograd.grad(want, exact, grad.float()))
        for name, one, other in zip(
            ("result", "gradient of the query", "of the key", "of the value", "of the sinks"), got, wanted
        ):
            error = float(((one.float() - other).norm() / other.norm()).detach())
            if not error < 2e-2:
                return f"its {name} is off by {error:.1g} with {heads} heads, {kv_heads} for keys and values, of {dim}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _plain(q: Tensor, k: Tensor, v: Tensor, window: int | None, cap: float | None, sinks: Tensor | None = None) -> Tensor:
    """Causal attention of [..., s, heads, d] with PyTorch's operations."""
    q, k, v = (part.transpose(-3, -2) for part in (q, k, v))
    k, v = (part.repeat_interleave(q.shape[-3] // part.shape[-3], dim=-3) for part in (k, v))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores if cap is None else (scores / cap).tanh() * cap
    all_pairs = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    hidden = all_pairs.triu(1) if window is None else all_pairs.triu(1) | all_pairs.tril(-window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        more = sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        return (torch.cat((scores, more), -1).softmax(-1)[..., :-1] @ v).transpose(-3, -2)
    return (scores.softmax(-1) @ v).transpose(-3, -2)


def refusal(
    query: Tensor, kv_heads: int, *, packed: bool, window: bool = False, cap: float | None = None, sinks: bool = False
) -> str | None:
    """Why these tensors cannot go through it: None if they can, "" if it is just not installed or not for this GPU.

    Args:
        window, cap, sinks: whether samples are longer than a window, what scores are capped at, and whether there are sinks.
    """
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or torch.version.hip is not None:
        return ""
    dim = query.shape[-1]
    if dim % 8 or dim > _LARGEST_HEAD or torch.cuda.get_device_capability(query.device)[0] not in _CAPABILITIES:
        return ""
    interface, problem = _interface()
    if interface is None:
        return problem
    return _probed(query.device, query.dtype, query.shape[-2], kv_heads, dim, packed, window, cap, sinks) or None


class _FlashAttention4(torch.autograd.Function):
    """The package's own function copies where its output is not batch first; here the output has the query's strides."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        cu: tuple[Tensor, Tensor] | None,
        longest: tuple[int, int] | None,
        scale: float | None,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        options = _options(cu, longest, scale, window, cap)
        out, lse = _interface()[0]._flash_attn_fwd(q, k, v, out=torch.empty_like(q), return_lse=True, **options)[:2]
        if sinks is not None:  # its lse has the heads before the tokens
            out, full = with_sinks(out, lse.transpose(-1, -2), sinks)
            lse = full.transpose(-1, -2).contiguous()
        ctx.save_for_backward(q, k, v, sinks, out, lse, *(cu or ()))
        ctx.longest, ctx.how = longest, (scale, window, cap)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse, *cu = ctx.saved_tensors
        options = _options(tuple(cu) or None, ctx.longest, *ctx.how)
        dq, dk, dv = _interface()[0]._flash_attn_bwd(q, k, v, out, grads[0], lse, **options)
        dsinks = None if sinks is None else sinks_gradient(grads[0], out, lse.transpose(-1, -2), sinks)
        return dq, dk, dv, dsinks, None, None, None, None, None


def _options(
    cu: Any, longest: tuple[int, int] | None, scale: float | None, window: int | None, cap: float | None
) -> dict[str, Any]:
    common: dict[str, Any] = dict(causal=True, softmax_scale=scale)
    if window is not None:  # it counts the keys before a query's own
        common |= dict(window_size_left=window - 1, window_size_right=0)
    if cap is not None:
        common |= dict(softcap=cap)
    if cu is None or longest is None:
        return common
    return common | dict(cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], max_seqlen_q=longest[0], max_seqlen_k=longest[1])


def flash_attention_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: tuple[Tensor, Tensor] | None = None,
    longest: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    *,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of tensors that `refusal` does not refuse, aligned to the last key.

    Args:
        q: [b, s, heads, d], or [queries, heads, d] of samples that lie one after the other; any strides, the last one 1.
        k, v: the same with the key-value heads.
        cu: int32 [n + 1] each, where the queries and the keys of the n samples begin; None for whole rows.
        longest: the most queries and the most keys of a sample.
        window: how many keys a query sees, its own among them; None: all before it.
        cap: a score s becomes cap * tanh(s / cap); None: it stays.
        sinks: [heads], a score of each head that no key has; None: there are none.
    Returns:
        As q.
    """
    return _FlashAttention4.apply(q, k, v, sinks, cu, longest, softmax_scale, window, cap)
