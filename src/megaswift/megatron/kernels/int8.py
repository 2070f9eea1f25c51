"""Frozen weights in 8 bits: whole numbers from -127 to 127 with one scale a row, bit for bit as bitsandbytes holds them.

The scale of a row is the largest of its magnitudes (https://arxiv.org/abs/2208.07339, section 2.1, for rows of weights).
Inputs stay in their own precision; a product makes the weight anew, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 127.0
_STEP = torch.tensor(1 / _LARGEST, dtype=torch.float32).item()


@dataclass(frozen=True)
class PackedInt8:
    """A weight [n, k] in 8 bits.

    Args:
        data: int8 [n, k].
        scales: fp32 [n, 1], the largest magnitude of each whole row, also where data is a part of its columns.
    """

    data: Tensor
    scales: Tensor

    requires_grad = False  # what Megatron-Core asks a layer's weight

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.data.nbytes + self.scales.nbytes

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that it stands for, [n, k], rounded once, to `dtype`."""
        return torch.mul(self.data, self.scales * _STEP, out=torch.empty(self.data.shape, dtype=dtype, device=self.data.device))


def pack_int8(weight: Tensor) -> PackedInt8:
    """A weight [n, k] of any precision in 8 bits."""
    values = weight.float()
    scales = values.abs().amax(1, keepdim=True)
    shares = values * (_LARGEST / scales.clamp_min(torch.finfo(torch.float32).tiny))
    return PackedInt8(shares.round_().to(torch.int8), scales)
