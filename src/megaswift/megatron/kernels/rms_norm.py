"""RMSNorm, alone or fused with the residual addition before or behind it; the backward pass adds the residual's gradient as it goes.

Formula (https://arxiv.org/abs/1910.07467) with the roundings of transformers' models: variance and scaling in fp32, then the
weight in one of three ways, see FORMS. Saved for backward: the input and one fp32 number a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.main_grad import accumulate_rows
from megaswift.megatron.kernels.triton_support import jit, next_power_of_2, processors, tl, use_triton

# How the scaled value and the weight are multiplied: the value is rounded to the activation type first; in fp32; in fp32 with
# one added to the weight, which is stored without it.
ROUNDED, WIDE, CENTRED = "rounded", "wide", "centred"
FORMS = (ROUNDED, WIDE, CENTRED)


@jit
def _forward_kernel(
    x,
    delta,
    weight,
    total,
    y,
    rstd,
    rows,
    eps,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    BEHIND: tl.constexpr,
    WIDE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < COLS)[None, :]
    place = row.to(tl.int64)[:, None] * COLS + col[None, :]
    value = tl.load(x + place, mask=mask, other=0.0)
    if HAS_DELTA and not BEHIND:
        value = (value.to(tl.float32) + tl.load(delta + place, mask=mask, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + place, value, mask=mask)
    full = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(full * full, axis=1) / COLS + eps)
    normal = full * scale[:, None]
    if not WIDE:
        normal = normal.to(value.dtype).to(tl.float32)
    gain = tl.load(weight + col, mask=col < COLS, other=0.0).to(tl.float32) + OFFSET
    result = (normal * gain[None, :]).to(value.dtype)
    if BEHIND:
        result = (result.to(tl.float32) + tl.load(delta + place, mask=mask, other=0.0).to(tl.float32)).to(value.dtype)
    tl.store(y + place, result, mask=mask)
    tl.store(rstd + row, scale, mask=row < rows)


@jit
def _backward_kernel(
    dy,
    dtotal,
    x,
    weight,
    rstd,
    dx,
    partial,
    rows,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_DTOTAL: tl.constexpr,
    WIDE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    # A persistent grid: each program keeps its share of the weight gradient in registers over all its rows.
    col = tl.arange(0, BLOCK)
    inside = col < COLS
    gain = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32) + OFFSET
    share = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * COLS + col[None, :]
        value = tl.load(x + place, mask=mask, other=0.0)
        grad = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normal = value.to(tl.float32) * scale
        share += grad * (normal if WIDE else normal.to(value.dtype).to(tl.float32))
        grad = grad * gain[None, :]
        mean = tl.sum(grad * normal, axis=1) / COLS
        result = scale * (grad - normal * mean[:, None])
        if HAS_DTOTAL:
            result += tl.load(dtotal + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + place, result.to(value.dtype), mask=mask)
    tl.store(partial + tl.program_id(0) * COLS + col, tl.sum(share, axis=0), mask=inside)


def _tile(cols: int, elements: int, share: int) -> tuple[int, int, int]:
    """Rows and padded columns of a program's tile of about `elements`, and its warps, for `share` elements a thread."""
    block = next_power_of_2(cols)
    rows = max(1, elements // block)
    return rows, block, max(1, min(32, rows * block // (32 * share)))


# 8 elements a thread keep the backward kernel at 48 registers, so that 40 warps fit on a multiprocessor.
_FORWARD, _BACKWARD, _WARPS_ON_PROCESSOR = (2048, 16), (1024, 8), 40


def forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, form: str = ROUNDED, behind: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + delta, its norm, 1 / rms of each row) of contiguous tensors; x itself is returned when there is no delta.

    With `behind` (x, its norm + delta, 1 / rms of each row) instead.
    """
    cols = x.shape[-1]
    rows = x.numel() // cols
    if not use_triton(x):
        total = x if delta is None or behind else x + delta
        full = total.float()
        rstd = torch.rsqrt(full.pow(2).mean(-1, keepdim=True).add_(eps))
        if form == ROUNDED:
            y = weight * (full * rstd).to(x.dtype)
        else:
            y = (full * rstd * _gain(weight, form)).to(x.dtype)
        return total, y.add_(delta) if delta is not None and behind else y, rstd.view(rows)
    total, y = (x if delta is None or behind else torch.empty_like(x)), torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile, block, warps = _tile(cols, *_FORWARD)
    grid = ((rows + tile - 1) // tile,)
    _forward_kernel[grid](
        x,
        x if delta is None else delta,
        weight,
        total,
        y,
        rstd,
        rows,
        eps,
        cols,
        block,
        tile,
        delta is not None,
        behind,
        form != ROUNDED,
        float(form == CENTRED),
        num_warps=warps,
    )
    return total, y, rstd


def _gain(weight: Tensor, form: str) -> Tensor:
    return 1.0 + weight.float() if form == CENTRED else weight.float()


def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, form: str = ROUNDED
) -> tuple[Tensor, Tensor]:
    """Gradient of the (summed) input, and parts [n, cols] in fp32 that add up to the weight's.

    `dtotal` is the gradient that reaches the input past the norm; it is added.
    """
    cols = x.shape[-1]
    rows = x.numel() // cols
    if not use_triton(x):
        normal = x.float() * rstd.view(*x.shape[:-1], 1)
        scaled = normal.to(x.dtype) if form == ROUNDED else normal
        dweight = (dy.float() * scaled).reshape(rows, cols).sum(0, keepdim=True)
        grad = dy.float() * _gain(weight, form)
        grad = (grad - normal * (grad * normal).mean(-1, keepdim=True)) * rstd.view(*x.shape[:-1], 1)
        return (grad if dtotal is None else grad.add_(dtotal)).to(x.dtype), dweight
    dx = torch.empty_like(x)
    tile, block, warps = _tile(cols, *_BACKWARD)
    programs = min((rows + tile - 1) // tile, processors(x.device) * max(1, _WARPS_ON_PROCESSOR // warps))
    partial = torch.empty((programs, cols), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        dy,
        dy if dtotal is None else dtotal,
        x,
        weight,
        rstd,
        dx,
        partial,
        rows,
        cols,
        block,
        tile,
        dtotal is not None,
        form != ROUNDED,
        float(form == CENTRED),
        num_warps=warps,
    )
    return dx, partial


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, form: str) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        total, y, rstd = forward(x, None if delta is None else delta.contiguous(), weight, eps, form)
        ctx.save_for_backward(total, rstd)
        ctx.weight, ctx.form = weight, form  # the weight as it is: through saved-tensor hooks it would lose main_grad
        ctx.has_delta = delta is not None
        ctx.set_materialize_grads(False)
        # Returning the input itself would make autograd treat it as modified; a view of it is the same memory.
        return (total.view_as(total) if delta is None else total), y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dtotal, dy = grads
        (total, rstd), weight = ctx.saved_tensors, ctx.weight
        if dy is None:
            return dtotal, (dtotal if ctx.has_delta else None), None, None, None
        dtotal = None if dtotal is None else dtotal.contiguous()
        dx, parts = backward(dy.contiguous(), dtotal, total, weight, rstd, ctx.form)
        dweight = accumulate_rows(weight, parts) if ctx.needs_input_grad[2] else None
        return dx, (dx if ctx.has_delta else None), dweight, None, None


class _NormAdded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
        x, y, rstd = forward(x.contiguous(), residual.contiguous(), weight, eps, form, behind=True)
        ctx.save_for_backward(x, rstd)
        ctx.weight, ctx.form = weight, form
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, rstd), weight = ctx.saved_tensors, ctx.weight
        dx, parts = backward(grads[0].contiguous(), None, x, weight, rstd, ctx.form)
        dweight = accumulate_rows(weight, parts) if ctx.needs_input_grad[2] else None
        return grads[0], dx, dweight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: str = ROUNDED) -> Tensor:
    """RMSNorm over the last axis: x [..., h], weight [h]; `form` is one of FORMS."""
    return _AddNorm.apply(x, None, weight, eps, form)[1]


def rms_norm_keep(x: Tensor, weight: Tensor, eps: float, form: str = ROUNDED) -> tuple[Tensor, Tensor]:
    """(x, norm of x). Use the returned x for the residual path: its gradient is then added inside the norm's backward."""
    return _AddNorm.apply(x, None, weight, eps, form)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, form: str = ROUNDED) -> tuple[Tensor, Tensor]:
    """(x + delta, norm of x + delta) in one pass; both [..., h]."""
    return _AddNorm.apply(x, delta, weight, eps, form)


def rms_norm_added(residual: Tensor, x: Tensor, weight: Tensor, eps: float, form: str = ROUNDED) -> Tensor:
    """residual + norm of x in one pass; both [..., h]. The norm is rounded to their type before it is added."""
    return _NormAdded.apply(residual, x, weight, eps, form)
