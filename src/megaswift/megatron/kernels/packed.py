"""Frozen weights held in few bits, whichever way: what a layer's products ask of them, and those of many experts as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.megatron.kernels.int8 import PackedInt8, pack_int8
from megaswift.megatron.kernels.linear_ops import LinearOps
from megaswift.megatron.kernels.nf4 import Packed, SmallScales, pack, small_scales


class PackedWeight(Protocol):
    """A frozen weight that a product makes anew whenever it needs it."""

    @property
    def data(self) -> Tensor:
        """The bytes of its values."""
        ...

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        ...

    @property
    def nbytes(self) -> int:
        """What it takes."""
        ...

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that it stands for."""
        ...


@dataclass(frozen=True)
class PackedExperts:
    """The matrices of several experts, [experts, n, k], held as one matrix [experts * n, k]."""

    whole: PackedWeight
    experts: int

    requires_grad = False

    @property
    def data(self) -> Tensor:
        """The bytes of its values."""
        return self.whole.data

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        rows, columns = self.whole.shape
        return torch.Size((self.experts, rows // self.experts, columns))

    def __len__(self) -> int:
        return self.experts

    @property
    def nbytes(self) -> int:
        """What they take."""
        return self.whole.nbytes

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weights that they stand for, [experts, n, k]."""
        return self.whole.weight(dtype).view(self.shape)


def dense(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    """A weight as it is, or made anew of what it is held as."""
    return weight if isinstance(weight, Tensor) else weight.weight(dtype)


def rounded(weight: Tensor, bits: int, double: bool) -> Tensor:
    """What 4 or 8 bits keep of one Hugging Face matrix [n, k]; `double`: with 4 bits, scales in 8 bits."""
    if bits == 8:
        return pack_int8(weight).weight(weight.dtype)
    packed = pack(weight)
    if double and isinstance(packed.scales, Tensor):
        packed = Packed(packed.data, small_scales(packed.scales))
    return packed.weight(weight.dtype)


def joined(parts: Sequence[Any]) -> PackedWeight:
    """Matrices [n, k] of one kind as one, each below the one before."""
    data = torch.cat([part.data for part in parts])
    if isinstance(parts[0], PackedInt8):
        return PackedInt8(data, torch.cat([part.scales for part in parts]))
    if isinstance(parts[0].scales, Tensor):
        return Packed(data, torch.cat([part.scales for part in parts]))
    return Packed(data, _joined_scales([part.scales for part in parts]))


def _joined_scales(parts: Sequence[SmallScales]) -> SmallScales:
    starts, runs = [], 0
    for part in parts:
        starts.append(part.starts + runs)
        runs += part.room
    return SmallScales(
        codes=torch.cat([part.codes for part in parts]),
        second=torch.cat([part.second for part in parts]),
        starts=torch.cat(starts),
        offsets=torch.cat([part.offsets for part in parts]),
    )


class PackedOps(LinearOps):
    """The products of a layer whose weight is packed."""

    def forward(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x [..., k] @ weight [n, k]^T + bias [n]."""
        return F.linear(x, weight.weight(x.dtype), bias)

    def input_grad(self, grad: Tensor, weight: PackedWeight) -> Tensor:  # type: ignore[override]
        """grad [..., n] @ weight [n, k]."""
        return torch.matmul(grad, weight.weight(grad.dtype))

    def add_forward(self, onto: Tensor, x: Tensor, weight: PackedWeight) -> Tensor:
        """onto [tokens, n] += x [tokens, k] @ weight [n, k]^T."""
        return super().add_forward(onto, x, weight.weight(x.dtype))

    def add_input_grad(self, onto: Tensor, grad: Tensor, weight: PackedWeight) -> Tensor:
        """onto [tokens, k] += grad [tokens, n] @ weight [n, k]."""
        return super().add_input_grad(onto, grad, weight.weight(grad.dtype))


PACKED_OPS = PackedOps()
