"""Dropout whose mask is a function of counters alone: of the step, the module, the token and the feature.

No generator has a state, so a mask is the same at every layout, in a recomputed forward pass, in the backward pass, which
makes it anew in place of keeping it, and in a resumed run. A token is known by its row of the data and its place there,
wherever it is computed; a feature by its place in the whole width. The 32-bit hash of both is `lowbias32`
(https://nullprogram.com/blog/2018/07/31/), whose bits differ from fair ones by less than counting can tell.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_WORD = 1 << 32


def _signed(value: int) -> int:
    value %= _WORD
    return value - _WORD if value >= _WORD >> 1 else value


def _hash(x: Tensor) -> Tensor:
    """Mix the bits of int32 [...], in place."""
    for shift, factor in ((16, _FIRST), (15, _SECOND)):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)
        x *= _signed(factor)
    x ^= (x >> 16) & 0xFFFF
    return x


def token_keys(origins: Tensor, seed: int, step: int) -> Tensor:
    """int32 [b, s]: a key for each token of a step.

    Args:
        origins: int64 [b, s], row of the data x 2^32 + place in the row; padding may have any.
    """
    low = (origins & 0xFFFFFFFF).to(torch.int32)
    high = (origins >> 32).to(torch.int32)
    start = _hash(torch.tensor([_signed(seed * 0x9E3779B1 + 1)], dtype=torch.int32, device=origins.device))
    mixed = _hash(start ^ _signed(step + 1))
    return _hash(_hash(high ^ mixed) ^ low)


@dataclass(frozen=True)
class Dropout:
    """What one module drops.

    Args:
        probability: of a feature to be dropped.
        module: name of the module in the whole model, so that each has masks of its own.
        first: the first of this rank's features in the whole width.
    """

    probability: float
    module: str
    first: int = 0

    def factors(self, keys: Tensor, features: int, dtype: torch.dtype) -> Tensor:
        """[tokens, features]: 0, or 1 / (1 - probability); keys int32 [tokens]."""
        own = _hash(keys ^ _signed(zlib.crc32(self.module.encode())))
        columns = _hash(torch.arange(self.first + 1, self.first + 1 + features, dtype=torch.int32, device=keys.device))
        bits = _hash(own[:, None] + columns[None, :])
        kept = bits >= _signed(int(self.probability * _WORD) - (_WORD >> 1))
        return kept.to(dtype).mul_(1.0 / (1.0 - self.probability))
