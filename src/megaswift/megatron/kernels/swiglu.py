"""SwiGLU, silu(gate) * up, in one pass each way; nothing is saved but the input, and its gradient overwrites it.

The input is [..., 2f] with the gate first, as one column-parallel product writes it (https://arxiv.org/abs/2002.05202).
Roundings as in transformers: silu is rounded to the activation type before the product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.megatron.kernels.triton_support import jit, tl, use_triton


@jit
def _forward_kernel(x, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    gate = tl.load(x + row * 2 * width + col, mask=mask, other=0.0)
    up = tl.load(x + row * 2 * width + width + col, mask=mask, other=0.0)
    full = gate.to(tl.float32)
    silu = (full / (1.0 + tl.exp(-full))).to(gate.dtype).to(tl.float32)
    tl.store(y + row * width + col, (silu * up.to(tl.float32)).to(gate.dtype), mask=mask)


@jit
def _backward_kernel(dy, x, width, BLOCK: tl.constexpr, RECOMPUTE: tl.constexpr):
    # Each element of dy and of x is read once before it is overwritten, by the same program.
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    gate = tl.load(x + row * 2 * width + col, mask=mask, other=0.0)
    up = tl.load(x + row * 2 * width + width + col, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * width + col, mask=mask, other=0.0).to(tl.float32)
    full = gate.to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-full))
    silu = (full * sigmoid).to(gate.dtype).to(tl.float32)
    dgate = grad * up * (sigmoid + full * sigmoid * (1.0 - sigmoid))
    tl.store(x + row * 2 * width + col, dgate.to(gate.dtype), mask=mask)
    tl.store(x + row * 2 * width + width + col, (grad * silu).to(gate.dtype), mask=mask)
    if RECOMPUTE:
        tl.store(dy + row * width + col, (silu * up).to(gate.dtype), mask=mask)


@jit
def _backward_share_kernel(dy, x, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, RECOMPUTE: tl.constexpr):
    # The same with as many programs as it may use processors: each fills one and goes through its part of the tiles.
    across = (width + BLOCK - 1) // BLOCK
    for tile in range(tl.program_id(0), (rows + ROWS - 1) // ROWS * across, tl.num_programs(0)):
        row = ((tile // across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        col = ((tile % across) * BLOCK + tl.arange(0, BLOCK))[None, :]
        mask = (row < rows) & (col < width)
        gate = tl.load(x + row * 2 * width + col, mask=mask, other=0.0)
        up = tl.load(x + row * 2 * width + width + col, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * width + col, mask=mask, other=0.0).to(tl.float32)
        full = gate.to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-full))
        silu = (full * sigmoid).to(gate.dtype).to(tl.float32)
        dgate = grad * up * (sigmoid + full * sigmoid * (1.0 - sigmoid))
        tl.store(x + row * 2 * width + col, dgate.to(gate.dtype), mask=mask)
        tl.store(x + row * 2 * width + width + col, (grad * silu).to(gate.dtype), mask=mask)
        if RECOMPUTE:
            tl.store(dy + row * width + col, (silu * up).to(gate.dtype), mask=mask)


_BLOCK = 1024


def forward(x: Tensor) -> Tensor:
    """silu(x[..., :f]) * x[..., f:] of a contiguous [..., 2f] tensor."""
    width = x.shape[-1] // 2
    if not use_triton(x):
        gate, up = x.split(width, dim=-1)
        return F.silu(gate) * up
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    grid = (y.numel() // width, (width + _BLOCK - 1) // _BLOCK)
    _forward_kernel[grid](x, y, width, _BLOCK, num_warps=4)
    return y


def backward_in_place(dy: Tensor, x: Tensor, *, recompute: bool, share: int | None = None) -> None:
    """Overwrite contiguous x [..., 2f] with its gradient and, with `recompute`, dy [..., f] with the forward's result.

    With `share` the kernel uses that many of the GPU's multiprocessors.
    """
    width = x.shape[-1] // 2
    if not use_triton(x):
        gate, up = x.split(width, dim=-1)
        silu = F.silu(gate)
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        result = silu * up if recompute else None
        torch.mul(dy, silu, out=up)
        gate.copy_(dgate)
        if result is not None:
            dy.copy_(result)
    elif share is not None:
        _backward_share_kernel[(share,)](dy, x, dy.numel() // width, width, 8, 1024, recompute, num_warps=32)
    else:
        grid = (dy.numel() // width, (width + _BLOCK - 1) // _BLOCK)
        _backward_kernel[grid](dy, x, width, _BLOCK, recompute, num_warps=4)
    # x was saved for this backward pass; a second pass over the same graph must fail loudly instead of reading gradients.
    torch.autograd.graph.increment_version(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        backward_in_place(grads[0].contiguous(), x, recompute=False)
        return x


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x = [gate, up] on the last axis. x must not be needed by anything else: its gradient overwrites it."""
    return _SwiGLU.apply(x)
