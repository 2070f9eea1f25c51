"""Matrices in FP8 (e4m3) with a scale for each row, made in as few passes over memory as there can be.

A row's scale is its largest absolute value / 448, so that this becomes e4m3's largest number
(https://arxiv.org/abs/2209.05433). It is fp32 and no power of two: the largest value is always exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.megatron.kernels import swiglu
from megaswift.megatron.kernels.triton_support import jit, next_power_of_2, tl, use_triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
# Rows that are all zeros, or smaller than this, are scaled as if this were their largest value: 1 / scale stays finite.
SMALLEST = 2.0**-100


class Scaled(NamedTuple):
    """A matrix in e4m3 with the scales of its rows: the true values are `values * scales[:, None]`."""

    values: Tensor  # e4m3 [rows, k]
    scales: Tensor  # fp32 [rows]


@jit
def _magnitude(value):
    # Bits of |value| as an integer: they sort like the numbers, with infinity above them and NaN above that, which a
    # maximum of floating-point numbers may drop.
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _scale_and_inverse(bits):
    largest = tl.maximum(bits, 226492416).to(tl.float32, bitcast=True)  # the bits of 2^-100
    return tl.div_rn(largest, 448.0), tl.div_rn(448.0, largest)


@jit
def _rows_kernel(
    x, values, scales, rows, padded, COLS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = row.to(tl.int64)[:, None] * COLS
    col = tl.arange(0, BLOCK)[None, :]
    inside, kept = (row < rows)[:, None], (row < padded)[:, None]
    if WHOLE:
        value = tl.load(x + place + col, mask=inside & (col < COLS), other=0.0).to(tl.float32)
        scale, inverse = _scale_and_inverse(tl.max(_magnitude(value), axis=1))
        tl.store(values + place + col, (value * inverse[:, None]).to(values.dtype.element_ty), mask=kept & (col < COLS))
    else:  # rows longer than a block: the second read comes from the L2 cache
        bits = tl.zeros([ROWS, BLOCK], dtype=tl.int32)
        for start in range(0, COLS, BLOCK):
            mask = inside & (start + col < COLS)
            bits = tl.maximum(bits, _magnitude(tl.load(x + place + start + col, mask=mask, other=0.0).to(tl.float32)))
        scale, inverse = _scale_and_inverse(tl.max(bits, axis=1))
        for start in range(0, COLS, BLOCK):
            mask = start + col < COLS
            value = tl.load(x + place + start + col, mask=inside & mask, other=0.0).to(tl.float32)
            tl.store(values + place + start + col, (value * inverse[:, None]).to(values.dtype.element_ty), mask=kept & mask)
    tl.store(scales + row, scale, mask=row < padded)


@jit
def _swiglu(x, place, col, mask, WIDTH: tl.constexpr):
    # As in swiglu.py, roundings included.
    gate = tl.load(x + 2 * place + col, mask=mask, other=0.0)
    up = tl.load(x + 2 * place + WIDTH + col, mask=mask, other=0.0).to(tl.float32)
    full = gate.to(tl.float32)
    silu = (full / (1.0 + tl.exp(-full))).to(gate.dtype).to(tl.float32)
    return (silu * up).to(gate.dtype)


@jit
def _swiglu_rows_kernel(x, hidden, values, scales, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr):
    row = tl.program_id(0)
    place = row.to(tl.int64) * WIDTH
    bits = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, WIDTH, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = _swiglu(x, place, col, (col < WIDTH) & (row < rows), WIDTH)
        bits = tl.maximum(bits, _magnitude(value.to(tl.float32)))
        if KEEP:
            tl.store(hidden + place + col, value, mask=(col < WIDTH) & (row < rows))
    scale, inverse = _scale_and_inverse(tl.max(bits, axis=0))
    tl.store(scales + row, scale)
    if KEEP:
        tl.debug_barrier()  # what other threads stored is read now
    for start in range(0, WIDTH, BLOCK):  # both reads come from the L2 cache
        col = start + tl.arange(0, BLOCK)
        if KEEP:
            value = tl.load(hidden + place + col, mask=(col < WIDTH) & (row < rows), other=0.0)
        else:
            value = _swiglu(x, place, col, (col < WIDTH) & (row < rows), WIDTH)
        tl.store(values + place + col, (value.to(tl.float32) * inverse).to(values.dtype.element_ty), mask=col < WIDTH)


@jit
def _column_magnitude_kernel(x, bits, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.zeros([ROWS, BLOCK], dtype=tl.int32)
    for step in range(STEPS):
        row = (tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * cols + col[None, :], mask=mask, other=0.0)
        largest = tl.maximum(largest, _magnitude(value.to(tl.float32)))
    tl.atomic_max(bits + col, tl.max(largest, axis=0), mask=col < cols)


@jit
def _transpose_kernel(x, bits, values, scales, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # A tile is turned in registers, so that reads run along the rows of x and writes along those of `values` [cols, rows].
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale, inverse = _scale_and_inverse(tl.load(bits + col, mask=col < cols, other=0))
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * cols + col[None, :], mask=mask, other=0.0).to(tl.float32)
    turned = tl.trans((value * inverse[None, :]).to(values.dtype.element_ty))
    place = col.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(values + place, turned, mask=(col < cols)[:, None] & (row < rows)[None, :])
    if tl.program_id(0) == 0:
        tl.store(scales + col, scale, mask=col < cols)


# Longest row that a program holds in registers (32 a thread, so that two programs fit on a multiprocessor of Hopper); longer
# ones are read twice, a tile at a time.
_WHOLE_ROW = 16384
_ROWS_TILE, _THREAD = 4096, 16  # elements of a program's tile, and of a thread
_COLUMN_TILE = (32, 256, 8)  # rows and columns of a tile, and tiles of a program
_TRANSPOSE_TILE = (128, 64)


def quantize_rows(x: Tensor, padded: int | None = None) -> Scaled:
    """x [rows, k] in e4m3 with a scale for each row; `padded` rows in all, those beyond x zero."""
    x = x.contiguous()
    rows, cols = x.shape
    padded = rows if padded is None else padded
    if not use_triton(x):
        return _quantize_rows_twin(F.pad(x, (0, 0, 0, padded - rows)))
    values = torch.empty((padded, cols), dtype=E4M3, device=x.device)
    scales = torch.empty(padded, dtype=torch.float32, device=x.device)
    whole = cols <= _WHOLE_ROW
    block = next_power_of_2(cols) if whole else _ROWS_TILE
    tile = max(1, _ROWS_TILE // block)
    warps = max(1, min(32, tile * block // (32 * _THREAD)))
    _rows_kernel[((padded + tile - 1) // tile,)](x, values, scales, rows, padded, cols, block, tile, whole, num_warps=warps)
    return Scaled(values, scales)


def quantize_swiglu(x: Tensor, padded: int, *, keep: bool) -> tuple[Scaled, Tensor | None]:
    """silu(gate) * up of contiguous x = [gate, up] [rows, 2f] in e4m3 with a scale for each row; and itself, if asked for.

    In one pass: 7 bytes of traffic a value in place of 9, and 5 where only e4m3 is written.
    """
    rows, width = x.shape[0], x.shape[1] // 2
    if not use_triton(x):
        hidden = swiglu.forward(x)
        return quantize_rows(hidden, padded), hidden if keep else None
    kept = torch.empty((rows, width), dtype=x.dtype, device=x.device) if keep else x
    values = torch.empty((padded, width), dtype=E4M3, device=x.device)
    scales = torch.empty(padded, dtype=torch.float32, device=x.device)
    block = min(next_power_of_2(width), _ROWS_TILE)
    warps = max(1, block // (32 * _THREAD))
    _swiglu_rows_kernel[(padded,)](x, kept, values, scales, rows, width, block, keep, num_warps=warps)
    return Scaled(values, scales), kept if keep else None


def quantize_columns(x: Tensor) -> Scaled:
    """The transpose [k, n] of x [n, k] in e4m3, with a scale for each column of x."""
    x = x.contiguous()
    if not use_triton(x):
        return _quantize_rows_twin(x.t())
    rows, cols = x.shape
    bits = torch.zeros(cols, dtype=torch.int32, device=x.device)
    height, width, steps = _COLUMN_TILE
    grid = ((cols + width - 1) // width, (rows + height * steps - 1) // (height * steps))
    _column_magnitude_kernel[grid](x, bits, rows, cols, height, width, steps, num_warps=8)
    values = torch.empty((cols, rows), dtype=E4M3, device=x.device)
    scales = torch.empty(cols, dtype=torch.float32, device=x.device)
    height, width = _TRANSPOSE_TILE
    grid = ((rows + height - 1) // height, (cols + width - 1) // width)
    _transpose_kernel[grid](x, bits, values, scales, rows, cols, height, width, num_warps=8)
    return Scaled(values, scales)


def _quantize_rows_twin(x: Tensor) -> Scaled:
    full = x.float()
    largest = full.abs().amax(1).clamp_min(SMALLEST)
    values = (full * (LARGEST / largest)[:, None]).clamp(-LARGEST, LARGEST)
    return Scaled(values.to(E4M3).contiguous(), largest / LARGEST)
