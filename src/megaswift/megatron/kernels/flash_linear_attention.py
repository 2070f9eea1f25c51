"""The gated delta rule by flash-linear-attention (the package fla-core, kernels written in Triton), where it is installed.

It takes samples that lie one after the other, as ours does; before it is used its result and every gradient are compared with ours for
the model's heads, on this GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.gated_delta import gated_delta


@functools.cache
def _interface() -> tuple[Any, str]:
    """The package's function, or None and why: "" where it is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ModuleNotFoundError as error:
        return None, "" if (error.name or "").split(".")[0] == "fla" else str(error)
    except Exception as error:  # its compiler is a package of its own, and may not fit
        return None, f"{type(error).__name__}: {error}"
    return chunk_gated_delta_rule, ""


def _objection() -> str:
    """What the package would say in its backward pass, after a minute of compiling, where it is known before; else ""."""
    try:
        from fla.ops.common import chunk_o

        wrong = chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1
    except (ImportError, AttributeError):  # another version of it: it may speak for itself
        return ""
    if not wrong or importlib.util.find_spec("tilelang") is not None:
        return ""
    return "with this Triton its gradients are wrong on Hopper GPUs; it asks for Triton 3.7.1 or newer, or for tilelang (pip install tilelang)"


@functools.cache
def _probed(device: torch.device, dtype: torch.dtype, groups: int, heads: int, key_dim: int, value_dim: int) -> str:
    """Compile both directions and compare them with ours in fp32. Returns "" or what is wrong."""
    if objection := _objection():
        return objection
    lengths = [70, 1, 200, 64, 190]
    generator = torch.Generator(device).manual_seed(0)

    def sample(*shape: int) -> Tensor:
        return torch.randn((sum(lengths), *shape), device=device, generator=generator)

    made = [sample(groups, key_dim), sample(groups, key_dim), sample(heads, value_dim)]
    made += [-0.05 * sample(heads).abs(), sample(heads).sigmoid()]  # states last, so that a sample would be seen in the next
    q, k, v, g, beta = ((one if place == 3 else one.to(dtype)).detach().requires_grad_() for place, one in enumerate(made))
    inputs = q, k, v, g, beta
    exact = [one.detach().float().requires_grad_() for one in inputs]
    grad = sample(heads, value_dim)
    try:
        with torch.enable_grad():
            out = flash_linear_attention(q, k, v, g, beta, lengths)
            want = gated_delta(exact[0], exact[1], exact[2], exact[3], exact[4], lengths)
            got = (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)))
            wanted = (want, *torch.autograd.grad(want, exact, grad.to(out.dtype).float()))
        names = ("result", *(f"gradient of the {one}" for one in ("query", "key", "value", "decay", "rate")))
        for name, one, other in zip(names, got, wanted, strict=True):
            error = float(((one.float() - other).norm() / other.norm()).detach())
            if not error < 2e-2:
                return f"its {name} is off by {error:.1g} with {groups} key heads of {key_dim} and {heads} of {value_dim}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusal(query: Tensor, value: Tensor) -> str | None:
    """Why these tensors cannot go through it: None if they can, "" if it is just not installed or not for them.

    Args:
        query: [t, key heads, dk]; value: [t, heads, dv].
    """
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return ""
    function, problem = _interface()
    if function is None:
        return problem
    return _probed(query.device, query.dtype, *query.shape[1:2], value.shape[1], query.shape[2], value.shape[2]) or None


def flash_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, lengths: Sequence[int]
) -> Tensor:
    """As `gated_delta`, of tensors that `refusal` does not refuse."""
    borders = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    options: dict[str, Any] = dict(cu_seqlens=borders.to(query.device, non_blocking=True), use_qk_l2norm_in_kernel=True)
    rows = (one.contiguous().unsqueeze(0) for one in (query, key, value, decay, beta))
    return _interface()[0](*rows, **options)[0].squeeze(0)


def describe(query: Tensor, value: Tensor) -> str:
    """Which way the rule takes for such tensors, in words for the user."""
    reason = refusal(query, value)
    if reason is None:
        return "flash-linear-attention"
    plain = "plain operations, chunk by chunk, which is the slow way"
    if reason:
        return f"{plain}, for flash-linear-attention does not work here: {reason.splitlines()[0]}"
    return f"{plain} (pip install flash-linear-attention)" if query.is_cuda else plain


__all__ = ["describe", "flash_linear_attention", "refusal"]
