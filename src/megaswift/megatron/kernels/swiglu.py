"""A gated activation, act(gate) * up, in one pass each way; nothing is saved but the input, and its gradient overwrites it.

The input is [..., 2f] with the gate first, as one column-parallel product writes it (https://arxiv.org/abs/2002.05202). The gate
goes through SiLU (SwiGLU) or GELU in its form with tanh (GeGLU, https://arxiv.org/abs/1606.08415). Roundings as in transformers:
act(gate) is rounded to the activation type before the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.megatron.kernels.triton_support import jit, tl, use_triton


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its form with tanh."""
    return F.gelu(x, approximate="tanh")


SILU, GELU_TANH = "silu", "gelu_tanh"
GATES: dict[Callable[[Tensor], Tensor], str] = {F.silu: SILU, gelu_tanh: GELU_TANH}  # what goes through here, by its function


@jit
def _gate(full, GELU: tl.constexpr):
    """act(full) and its slope, fp32."""
    if GELU:
        inner = 0.7978845608028654 * full * (1.0 + 0.044715 * full * full)
        half = 1.0 / (1.0 + tl.exp(-2.0 * inner))  # (1 + tanh(inner)) / 2
        value = full * half
        slope = half + value * (1.0 - half) * 1.5957691216057308 * (1.0 + 0.134145 * full * full)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-full))
        value = full * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    return value, slope


@jit
def _forward_kernel(x, y, width, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    gate = tl.load(x + row * 2 * width + col, mask=mask, other=0.0)
    up = tl.load(x + row * 2 * width + width + col, mask=mask, other=0.0)
    value, _ = _gate(gate.to(tl.float32), GELU)
    value = value.to(gate.dtype).to(tl.float32)
    tl.store(y + row * width + col, (value * up.to(tl.float32)).to(gate.dtype), mask=mask)


@jit
def _backward_tile(dy, x, row, col, mask, width, RECOMPUTE: tl.constexpr, GELU: tl.constexpr):
    # Each element of dy and of x is read once before it is overwritten, by the same program.
    gate = tl.load(x + row * 2 * width + col, mask=mask, other=0.0)
    up = tl.load(x + row * 2 * width + width + col, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * width + col, mask=mask, other=0.0).to(tl.float32)
    value, slope = _gate(gate.to(tl.float32), GELU)
    value = value.to(gate.dtype).to(tl.float32)
    tl.store(x + row * 2 * width + col, (grad * up * slope).to(gate.dtype), mask=mask)
    tl.store(x + row * 2 * width + width + col, (grad * value).to(gate.dtype), mask=mask)
    if RECOMPUTE:
        tl.store(dy + row * width + col, (value * up).to(gate.dtype), mask=mask)


@jit
def _backward_kernel(dy, x, width, BLOCK: tl.constexpr, RECOMPUTE: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _backward_tile(dy, x, row, col, col < width, width, RECOMPUTE, GELU)


@jit
def _backward_share_kernel(
    dy, x, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, RECOMPUTE: tl.constexpr, GELU: tl.constexpr
):
    # The same with as many programs as it may use processors: each fills one and goes through its part of the tiles.
    across = (width + BLOCK - 1) // BLOCK
    for tile in range(tl.program_id(0), (rows + ROWS - 1) // ROWS * across, tl.num_programs(0)):
        row = ((tile // across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        col = ((tile % across) * BLOCK + tl.arange(0, BLOCK))[None, :]
        _backward_tile(dy, x, row, col, (row < rows) & (col < width), width, RECOMPUTE, GELU)


_BLOCK = 1024


def forward(x: Tensor, gated_by: str = SILU) -> Tensor:
    """act(x[..., :f]) * x[..., f:] of a contiguous [..., 2f] tensor."""
    width = x.shape[-1] // 2
    if not use_triton(x):
        gate, up = x.split(width, dim=-1)
        return (F.silu(gate) if gated_by == SILU else gelu_tanh(gate)) * up
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    grid = (y.numel() // width, (width + _BLOCK - 1) // _BLOCK)
    _forward_kernel[grid](x, y, width, _BLOCK, gated_by == GELU_TANH, num_warps=4)
    return y


def backward_in_place(dy: Tensor, x: Tensor, *, recompute: bool, share: int | None = None, gated_by: str = SILU) -> None:
    """Overwrite contiguous x [..., 2f] with its gradient and, with `recompute`, dy [..., f] with the forward's result.

    With `share` the kernel uses that many of the GPU's multiprocessors.
    """
    width, gelu = x.shape[-1] // 2, gated_by == GELU_TANH
    if not use_triton(x):
        gate, up = x.split(width, dim=-1)
        value = gelu_tanh(gate) if gelu else F.silu(gate)
        aten = torch.ops.aten
        dgate = aten.gelu_backward(dy * up, gate, approximate="tanh") if gelu else aten.silu_backward(dy * up, gate)
        result = value * up if recompute else None
        torch.mul(dy, value, out=up)
        gate.copy_(dgate)
        if result is not None:
            dy.copy_(result)
    elif share is not None:
        _backward_share_kernel[(share,)](dy, x, dy.numel() // width, width, 8, 1024, recompute, gelu, num_warps=32)
    else:
        grid = (dy.numel() // width, (width + _BLOCK - 1) // _BLOCK)
        _backward_kernel[grid](dy, x, width, _BLOCK, recompute, gelu, num_warps=4)
    # x was saved for this backward pass; a second pass over the same graph must fail loudly instead of reading gradients.
    torch.autograd.graph.increment_version(x)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gated_by: str) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.gated_by = gated_by
        return forward(x, gated_by)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        backward_in_place(grads[0].contiguous(), x, recompute=False, gated_by=ctx.gated_by)
        return x, None


def swiglu(x: Tensor, gated_by: str = SILU) -> Tensor:
    """act(gate) * up of x = [gate, up] on the last axis. x must not be needed by anything else: its gradient overwrites it.

    Args:
        gated_by: SILU or GELU_TANH.
    """
    return _Gated.apply(x, gated_by)
