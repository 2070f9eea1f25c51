"""Products of linear layers in FP8 (e4m3), each row with a scale of its own: y = x W^T and dx = dy W.

A row is what one element of the result is summed over: a token of x and of dy, an output channel of W forward, an input
channel of W backward. Its scale is its largest absolute value / 448, so that this becomes e4m3's largest number
(https://arxiv.org/abs/2209.05433). Scales are worked out from the numbers at hand, none is remembered from step to step.
The weight's gradient stays in the activation type. This is the recipe that torchao calls rowwise_with_gw_hp, but for W
backward, which has one scale there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.engine.kernels.products import Products
from megaswift.engine.kernels.triton_support import jit, next_power_of_2, tl, use_triton
from megaswift.plan import FP8_MULTIPLE

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
# Rows that are all zeros, or smaller than this, are scaled as if this were their largest value: 1 / scale stays finite.
SMALLEST = 2.0**-100
# With up to 256 tokens and many input channels cuBLASLt has no kernel for scaled rows (pytorch/ao issue 4582).
FEWEST_TOKENS = 512


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


_LONGEST_BLOCK = 32768  # elements of a row that a program holds in registers
_ROWS_TILE, _THREAD = 4096, 16  # elements of a program's tile of short rows, and of a thread
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
    whole = cols <= _LONGEST_BLOCK
    block = next_power_of_2(cols) if whole else _LONGEST_BLOCK // 2
    tile = max(1, _ROWS_TILE // block)
    warps = max(1, min(32, tile * block // (32 * _THREAD)))
    _rows_kernel[((padded + tile - 1) // tile,)](x, values, scales, rows, padded, cols, block, tile, whole, num_warps=warps)
    return Scaled(values, scales)


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


def scaled_product(a: Scaled, b: Scaled, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """a [m, k] @ b [n, k]^T, scales applied, as `dtype` [m, n]. On a GPU m, n and k are multiples of FP8_MULTIPLE.

    Args:
        fast: let the tensor cores add up with the 14 bits of mantissa that they have, instead of moving partial sums to
            fp32 on the way (Hopper; https://arxiv.org/abs/2412.19437, section 3.3.2).
    """
    if a.values.is_cuda:
        left, right = a.scales[:, None], b.scales[None, :]
        # The second operand is read column by column: the transpose of a contiguous matrix.
        return torch._scaled_mm(
            a.values, b.values.t(), scale_a=left, scale_b=right, out_dtype=dtype, use_fast_accum=fast
        )  # fmt: skip
    product = a.values.float() @ b.values.float().t()
    return (product * a.scales[:, None] * b.scales[None, :]).to(dtype)


class Fp8Products(Products):
    """Forward product and input gradient in e4m3 with scaled rows. NaN or infinity in a row comes out in all it meets.

    Partial sums of the forward product stay in the tensor cores, those of gradients do not: the usual choice.

    A weight is quantised in each forward and each backward pass. Inside `unchanged_weights` it is done once, for as long as
    that context lasts: nothing is ever kept over an update, which writes weights in ways that torch does not see. That
    takes 2 bytes a parameter, so it begins after a first pass has shown how much of the GPU's memory is left.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bool], Scaled] | None = None
        self._parameters: dict[int, int] = {}  # address of each weight -> its size
        self._room: bool | None = None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., k] @ weight [n, k]^T + bias [n], in x's type."""
        result = _product(x, self._quantized(weight, forward=True), fast=True)
        return result if bias is None else result.add_(bias)

    def forward_add(self, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """residual [..., n] + x [..., k] @ weight [n, k]^T; the product is rounded before the addition."""
        return self.forward(x, weight).add_(residual)

    def input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """grad [..., n] @ weight [n, k], in grad's type."""
        return _product(grad, self._quantized(weight, forward=False), fast=False)

    @contextmanager
    def unchanged_weights(self, micro_batches: int) -> Iterator[None]:
        """Keep quantised weights inside, if several micro batches run and there is room for them."""
        self._kept = {} if micro_batches > 1 and self._room else None
        try:
            yield
        finally:
            self._kept = None
        if self._room is None:
            self._room = has_room(2 * sum(self._parameters.values()))

    def _quantized(self, weight: Tensor, forward: bool) -> Scaled:
        quantize: Callable[[Tensor], Scaled] = quantize_rows if forward else quantize_columns
        if self._room is None:
            self._parameters[weight.data_ptr()] = weight.numel()
        if self._kept is None:
            return quantize(weight)
        key = (weight.data_ptr(), forward)
        if key not in self._kept:
            self._kept[key] = quantize(weight)
        return self._kept[key]


def has_room(needed: int) -> bool:
    """Whether `needed` bytes fit into GPU memory that nobody has taken so far, with a tenth of the GPU's left over."""
    if not torch.cuda.is_available():
        return True
    free, total = torch.cuda.mem_get_info()
    return free - needed > total // 10


def _product(x: Tensor, weight: Scaled, *, fast: bool) -> Tensor:
    """x [..., k] @ weight [n, k]^T; the number of tokens is padded to what the product takes."""
    flat = x.reshape(-1, x.shape[-1])
    tokens = flat.shape[0]
    padded = max(FEWEST_TOKENS, (tokens + FP8_MULTIPLE - 1) // FP8_MULTIPLE * FP8_MULTIPLE)
    result = scaled_product(quantize_rows(flat, padded), weight, x.dtype, fast=fast)
    return result[:tokens].view(*x.shape[:-1], result.shape[-1])
