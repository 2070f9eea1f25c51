"""Page-locked host memory, which a GPU reads and writes over PCIe by itself.

torch's own page-locked allocator rounds every size up to a power of two, up to twice what was asked for; this memory comes
from the system in whole pages and is registered with CUDA. On a machine without a GPU it is ordinary memory.
"""

from __future__ import annotations

import math
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

_PORTABLE_MAPPED = 1 | 2  # cudaHostRegisterPortable, cudaHostRegisterMapped
_SLAB, _OWN, _ALIGNMENT = 64 << 20, 8 << 20, 256  # bytes; tensors above _OWN get pages of their own


class PageLocked:
    """Page-locked memory, zeros at first.

    Args:
        size: in bytes, above 0; `bytes` is a uint8 [size] tensor of the CPU on it.

    Raises MemoryError where the machine does not give it.
    """

    def __init__(self, size: int) -> None:
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{size / 1e9:.2f} GB of host memory cannot be had: {error.strerror}") from error
        self.bytes = torch.frombuffer(pages, dtype=torch.uint8)
        if torch.cuda.is_available():
            runtime, address = torch.cuda.cudart(), self.bytes.data_ptr()
            code = int(runtime.cudaHostRegister(address, size, _PORTABLE_MAPPED))
            if code:
                raise MemoryError(f"{size / 1e9:.2f} GB of host memory cannot be page-locked (CUDA error {code})")
            weakref.finalize(self, _unregister, runtime, address).atexit = False

    def on_device(self) -> Tensor:
        """The same memory as a uint8 [size] tensor of the current GPU, which operations and kernels there take as theirs.

        Unified addressing gives it one address for both; the tensor keeps the memory alive. Without a GPU: `bytes`.
        """
        if not torch.cuda.is_available():
            return self.bytes
        tensor = torch.as_tensor(_Interface(self), device=torch.device("cuda", torch.cuda.current_device()))
        if tensor.data_ptr() != self.bytes.data_ptr():
            raise RuntimeError("the GPU does not reach page-locked host memory under its own address")
        return tensor


class _Interface:
    """How torch is told of memory that another library owns."""

    def __init__(self, memory: PageLocked) -> None:
        self.memory = memory  # torch holds this object for as long as its tensor lives
        place = (memory.bytes.data_ptr(), False)
        self.__cuda_array_interface__ = dict(shape=(memory.bytes.numel(),), typestr="|u1", data=place, strides=None, version=3)


def _unregister(runtime: Any, address: int) -> None:
    torch.cuda.synchronize()  # nothing may still read or write there
    runtime.cudaHostUnregister(address)


class HostTensors:
    """Tensors of the device that lie in page-locked host memory: made once, kept until the end."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)  # what is left of the newest one

    def zeros(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros."""
        size = math.prod(shape) * dtype.itemsize
        room = max(-(-size // _ALIGNMENT), 1) * _ALIGNMENT
        if room > _OWN:
            place = PageLocked(room).on_device()
        else:
            if room > self._slab.numel():
                self._slab = PageLocked(_SLAB).on_device()
            place, self._slab = self._slab[:room], self._slab[room:]
        return place[:size].view(dtype).view(shape)

    def copy_of(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, contiguous."""
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)
