"""A memory-bound kernel beside a matrix product, each on its own part of the GPU's multiprocessors.

A matrix product leaves most of the memory's bandwidth unused, and a memory-bound kernel needs only a part of the
processors. cuBLAS is asked to use fewer of them (cublasSetSmCountTarget), and the kernel takes the rest on another stream.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from megaswift.megatron.kernels.triton_support import processors

# Of 132 processors, 36 gave the shortest backward pass of an MLP at three model sizes (docs/performance.md).
_SHARE = 36 / 132


@functools.cache
def _set_target() -> Any:
    """cublasSetSmCountTarget of the cuBLAS that torch has loaded, or None."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split()[-1] for line in maps if "libcublas.so" in line}
        function = ctypes.CDLL(sorted(paths)[0]).cublasSetSmCountTarget
    except (OSError, IndexError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return function


@functools.cache
def _side(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def can_run_beside(tensor: torch.Tensor) -> bool:
    """Whether `beside` would overlap anything: an NVIDIA GPU whose cuBLAS can be told how many processors to use."""
    if not tensor.is_cuda or torch.version.hip is not None:
        return False
    torch.cuda.current_blas_handle()  # loads cuBLAS
    return _set_target() is not None


def beside(kernel: Callable[[int | None], None], product: Callable[[], Any], device: torch.device) -> None:
    """Run kernel(number of processors) and product() at once; the current stream goes on when both are done.

    Both may use what the current stream has computed so far, and neither the other's result. Every tensor they touch must
    live until this returns. Without a GPU they run one after the other, the kernel with None: no limit.
    """
    if device.type != "cuda" or _set_target() is None:
        kernel(None)
        product()
        return
    total = processors(device)
    share = max(1, round(total * _SHARE))
    main, side = torch.cuda.current_stream(device), _side(device.index)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        kernel(share)
    handle = torch.cuda.current_blas_handle()
    _set_target()(handle, total - share)
    try:
        product()
    finally:
        _set_target()(handle, 0)
    main.wait_stream(side)
