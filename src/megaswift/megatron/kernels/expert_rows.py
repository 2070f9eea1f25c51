"""What happens to rows between the products of experts, in one pass each: gathered, added up, and SwiGLU times a row's weight.

Triton on GPUs, PyTorch's operations elsewhere. Roundings are those of transformers: silu and its product with `up` are
rounded to the activation type, sums over a token's experts are made in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.megatron.kernels.triton_support import jit, next_power_of_2, tl, use_triton


@jit
def _gather_kernel(x, source, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + tl.load(source + row) * width + col, mask=col < width, other=0.0)
    tl.store(out + row * width + col, value, mask=col < width)


@jit
def _sum_kernel(y, places, out, width, EACH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for number in tl.static_range(EACH):
        place = tl.load(places + row * EACH + number)
        total += tl.load(y + place * width + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + col, total.to(out.dtype.element_ty), mask=mask)


@jit
def _swiglu_kernel(both, weights, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    gate = tl.load(both + row * 2 * width + col, mask=mask, other=0.0)
    up = tl.load(both + row * 2 * width + width + col, mask=mask, other=0.0).to(tl.float32)
    full = gate.to(tl.float32)
    silu = (full / (1.0 + tl.exp(-full))).to(gate.dtype).to(tl.float32)
    hidden = (silu * up).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + col, (hidden * tl.load(weights + row)).to(gate.dtype), mask=mask)


@jit
def _swiglu_backward_kernel(grad, both, weights, grad_weights, width: tl.constexpr, BLOCK: tl.constexpr):
    # A program goes through one row, for its weight's gradient is a sum over the row. Every value is read before it is
    # overwritten, by the same program.
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < width
        gate = tl.load(both + row * 2 * width + col, mask=mask, other=0.0)
        up = tl.load(both + row * 2 * width + width + col, mask=mask, other=0.0).to(tl.float32)
        given = tl.load(grad + row * width + col, mask=mask, other=0.0).to(tl.float32)
        full = gate.to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-full))
        silu = (full * sigmoid).to(gate.dtype).to(tl.float32)
        hidden = (silu * up).to(gate.dtype).to(tl.float32)
        total += given * hidden
        scaled = (given * weight).to(gate.dtype).to(tl.float32)
        dgate = (scaled * up).to(gate.dtype).to(tl.float32) * (sigmoid + full * sigmoid * (1.0 - sigmoid))
        tl.store(both + row * 2 * width + col, dgate.to(gate.dtype), mask=mask)
        tl.store(both + row * 2 * width + width + col, (scaled * silu).to(gate.dtype), mask=mask)
        tl.store(grad + row * width + col, (hidden * weight).to(gate.dtype), mask=mask)
    tl.store(grad_weights + row, tl.sum(total, axis=0))


@jit
def _put_kernel(target, value, count, OVERWRITE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    result = tl.load(value + place, mask=mask, other=0.0).to(tl.float32)
    if not OVERWRITE:
        result += tl.load(target + place, mask=mask, other=0.0)
    tl.store(target + place, result, mask=mask)


_PUT = 8192


def _tile(width: int) -> tuple[int, int]:
    """Columns of a program, and how many programs a row takes."""
    block = min(1024, next_power_of_2(width))
    return block, (width + block - 1) // block


def gather_rows(x: Tensor, source: Tensor) -> Tensor:
    """x[source]: rows of x [t, ...] in the order of source, int64 [r]."""
    if x.dim() != 2 or not len(source) or not use_triton(x):
        return x[source]
    x = x.contiguous()
    out = x.new_empty((len(source), x.shape[1]))
    block, across = _tile(x.shape[1])
    _gather_kernel[(len(source), across)](x, source.contiguous(), out, x.shape[1], block, num_warps=4)
    return out


def add_rows(y: Tensor, places: Tensor) -> Tensor:
    """[t, ...]: for each row of places, int64 [t, n], the sum of those rows of y [r, ...], in fp32 or wider."""
    if places.shape[1] == 1:
        return gather_rows(y, places[:, 0])
    if y.dim() == 2 and y.dtype != torch.float64 and len(places) and use_triton(y):
        y, (block, across) = y.contiguous(), _tile(y.shape[1])
        out = y.new_empty((len(places), y.shape[1]))
        _sum_kernel[(len(places), across)](y, places.contiguous(), out, y.shape[1], places.shape[1], block, num_warps=4)
        return out
    total = y[places[:, 0]].to(torch.promote_types(y.dtype, torch.float32))
    for number in range(1, places.shape[1]):
        total += y[places[:, number]]
    return total.to(y.dtype)


def weighted_swiglu(both: Tensor, weights: Tensor) -> Tensor:
    """silu(gate) * up * weight of both = [gate, up] [t, 2f] and fp32 weights [t] -> [t, f]."""
    width = both.shape[1] // 2
    watched = torch.is_grad_enabled() and (both.requires_grad or weights.requires_grad)  # outside of `expert_mlp`
    if watched or not len(both) or not use_triton(both):
        gate, up = both.split(width, dim=1)
        return (F.silu(gate) * up * weights.unsqueeze(1)).to(both.dtype)
    out = both.new_empty((len(both), width))
    block, across = _tile(width)
    _swiglu_kernel[(len(both), across)](both.contiguous(), weights, out, width, block, num_warps=4)
    return out


def weighted_swiglu_backward(grad: Tensor, both: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the weights, fp32 [t]; contiguous `both` becomes its own gradient, and `grad` [t, f] the result itself."""
    width = grad.shape[1]
    if len(both) and use_triton(both):
        grad_weights = torch.empty_like(weights)
        _swiglu_backward_kernel[(len(both),)](grad, both, weights, grad_weights, width, _tile(width)[0], num_warps=4)
    else:
        gate, up = both.split(width, dim=1)
        silu = F.silu(gate)
        hidden, scaled = silu * up, (grad * weights.unsqueeze(1)).to(grad.dtype)
        grad_weights = (grad.float() * hidden.float()).sum(1)
        grad.copy_(hidden * weights.unsqueeze(1))
        grad_gate = torch.ops.aten.silu_backward(scaled * up, gate)
        torch.mul(scaled, silu, out=up)
        gate.copy_(grad_gate)
    # `both` was saved for this pass; a second one over the same graph must fail loudly instead of reading gradients.
    torch.autograd.graph.increment_version(both)
    return grad_weights


def put_gradient(target: Tensor, gradient: Tensor, *, overwrite: bool) -> None:
    """target (fp32) = or += gradient, of the same shape: PyTorch's own conversion takes twice the time of the memory."""
    if target.dtype == torch.float32 and target.is_contiguous() and gradient.is_contiguous() and use_triton(target):
        blocks = (target.numel() + _PUT - 1) // _PUT
        _put_kernel[(blocks,)](target, gradient, target.numel(), overwrite, _PUT, num_warps=8)
    elif overwrite:
        target.copy_(gradient)
    else:
        target.add_(gradient)
