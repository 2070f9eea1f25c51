"""Frozen weights in 4 bits: NF4 of QLoRA (https://arxiv.org/abs/2305.14314), byte for byte as bitsandbytes packs it.

64 values of a row share a scale, the largest of their magnitudes (fp32); each is the nearest of 16 quantiles of a normal
distribution. Blocks run along rows, so rows, and columns in multiples of 64, can be cut: a part of a matrix is packed as
it is in the whole. A product makes the weight anew, forward and backward; nothing of it is kept in between.

With double quantisation the scales of a Hugging Face matrix, less their mean, are held in 8 bits themselves (section 3 of
the same paper; the values are those of dynamic tree quantisation, https://arxiv.org/abs/1511.04561), in runs of 256 through
all its rows: 0.52 bytes a weight in place of 0.56.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.megatron.kernels.triton_support import jit, tl, use_triton

BLOCK = 64
SECOND_BLOCK = 256  # scales that share a scale of their own
# The 16 values of appendix E, in the fp32 digits that bitsandbytes has.
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class SmallScales:
    """Scales [n, k / 64] in 8 bits, of one or several Hugging Face matrices, or of a part of their rows or columns.

    Args:
        codes: uint8 [n, k / 64], places in `dynamic_code`.
        second: fp32, a scale for each run of 256 of all scales of a matrix, matrix after matrix.
        starts: int64 [n], where a row's first scale stands, counted as if each matrix began with a run of its own.
        offsets: fp32 [n], the mean of all scales of the row's matrix.
    """

    codes: Tensor
    second: Tensor
    starts: Tensor
    offsets: Tensor

    @property
    def room(self) -> int:
        """How far to count on for the starts of what comes behind."""
        return len(self.second) * SECOND_BLOCK

    @property
    def nbytes(self) -> int:
        """What they take."""
        return self.codes.nbytes + self.second.nbytes + self.starts.nbytes + self.offsets.nbytes

    def values(self) -> Tensor:
        """fp32 [n, k / 64]."""
        columns = torch.arange(self.codes.shape[1], device=self.codes.device)
        run = (self.starts.unsqueeze(1) + columns) // SECOND_BLOCK
        return dynamic_code(self.codes.device)[self.codes.long()] * self.second[run] + self.offsets.unsqueeze(1)


def small_scales(scales: Tensor) -> SmallScales:
    """fp32 scales [n, k / 64] of one Hugging Face matrix in 8 bits."""
    offset, code = scales.mean(), dynamic_code(scales.device)
    flat = (scales - offset).flatten()
    runs = F.pad(flat, (0, -flat.numel() % SECOND_BLOCK)).view(-1, SECOND_BLOCK)
    second = runs.abs().amax(1)
    shares = runs * second.clamp_min(torch.finfo(torch.float32).tiny).reciprocal().unsqueeze(1)  # not divided: as bitsandbytes
    codes = torch.bucketize(shares, (code[1:] + code[:-1]) / 2).to(torch.uint8).flatten()[: flat.numel()].view(scales.shape)
    starts = torch.arange(len(scales), device=scales.device) * scales.shape[1]
    return SmallScales(codes, second, starts, offset.expand(len(scales)).clone())


@functools.cache
def dynamic_code(device: torch.device | str) -> Tensor:
    """fp32 [256], rising: of each power of ten from 1e-6 to 1 the middles of 1, 2, 4, ... 64 equal parts, both signs; 0 and 1."""
    found = [0.0, 1.0]
    for power in range(7):
        borders = torch.linspace(0.1, 1, 2**power + 1)
        middles = (10 ** (power - 6) * ((borders[:-1] + borders[1:]) / 2)).tolist()
        found += middles + [-value for value in middles]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Packed:
    """A weight [n, k] in 4 bits.

    Args:
        data: uint8 [n, k / 2], the first of two neighbours in the upper half of a byte.
        scales: fp32 [n, k / 64], or the same in 8 bits.
    """

    data: Tensor
    scales: Tensor | SmallScales

    requires_grad = False  # what Megatron-Core asks a layer's weight

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return torch.Size((self.data.shape[0], self.data.shape[1] * 2))

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.data.nbytes + self.scales.nbytes

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that it stands for, [n, k]."""
        return unpack(self.data, self.scales.values() if isinstance(self.scales, SmallScales) else self.scales, dtype)


@functools.cache
def _code(device: torch.device) -> Tensor:
    """CODE on a device, copied there once: each copy from the host waits for it."""
    return torch.tensor(CODE, dtype=torch.float32, device=device)


def pack(weight: Tensor) -> Packed:
    """A weight [n, k] of any precision in 4 bits; k is a multiple of 64."""
    code = _code(weight.device)
    blocks = weight.float().reshape(weight.shape[0], -1, BLOCK)
    scales = blocks.abs().amax(-1)
    shares = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    index = torch.bucketize(shares, (code[1:] + code[:-1]) / 2).to(torch.uint8).reshape(weight.shape)
    return Packed(index[:, ::2] << 4 | index[:, 1::2], scales)


@jit
def _unpack_kernel(packed, scales, code, out, count, BLOCK_BYTES: tl.constexpr, HALF: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK_BYTES
    place = start + tl.arange(0, BLOCK_BYTES)
    inside = place < count
    byte = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + place // HALF, mask=inside, other=0.0)
    first = tl.load(code + (byte >> 4)) * scale
    second = tl.load(code + (byte & 15)) * scale
    # Both halves as one row of neighbours: stores of every other value would take twice the memory's time.
    both = tl.interleave(first.to(out.dtype.element_ty), second.to(out.dtype.element_ty))
    here = 2 * start + tl.arange(0, 2 * BLOCK_BYTES)
    tl.store(out + here, both, mask=here < 2 * count)


def unpack(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [n, k] of packed bytes [n, k / 2] and scales [n, k / 64]: reads half a byte a value, writes one."""
    code = _code(data.device)
    if use_triton(data):
        out = torch.empty((data.shape[0], data.shape[1] * 2), dtype=dtype, device=data.device)
        _unpack_kernel[((data.numel() + 1023) // 1024,)](data, scales, code, out, data.numel(), 1024, BLOCK // 2, num_warps=4)
        return out
    index = torch.stack((data >> 4, data & 15), -1).flatten(1)
    return (code[index.long()].view(*scales.shape, BLOCK) * scales.unsqueeze(-1)).flatten(1).to(dtype)
