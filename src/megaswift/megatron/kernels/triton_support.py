"""Triton where it is installed: the names that kernels are written with, and the choice between a kernel and its twin."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # a machine without a GPU: kernels are never launched, but their files must still import
    HAS_TRITON = False

    class _Absent:
        constexpr = None

    triton = None
    tl = _Absent()

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit where Triton is installed; otherwise the function stays as it is and nobody calls it."""
    return triton.jit(function) if HAS_TRITON else function


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether a kernel takes this tensor: it is on a GPU, or Triton's interpreter was asked for (tests)."""
    return HAS_TRITON and (tensor.is_cuda or INTERPRETED)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number` (at least 1)."""
    return 1 << max(number - 1, 0).bit_length()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU, the unit that persistent grids are sized in; 1 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
