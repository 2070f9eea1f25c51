"""What the first layers keep for the backward pass lies in host memory between a micro batch's two passes.

Copies run on a stream of their own. Forward: a layer's activations leave while the next one computes, and their memory is
free when the second layer after it begins. Backward: a layer's activations come back while the layer behind it runs, and
the computation waits only for the tensor that it needs. Whole storages are copied, each once, so every tensor comes back
with the strides, the offset and the bits that it had.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megaswift.megatron.compat import become
from megaswift.megatron.kernels.pinned import PageLocked

SMALLEST = 1 << 20  # bytes; what is smaller stays on the device

Place = tuple[int, int]  # forward pass and layer


class HostPool:
    """Page-locked buffers that are used again: page-locking takes longer than many copies."""

    def __init__(self) -> None:
        self._free: list[PageLocked] = []
        self.made = 0

    def take(self, size: int) -> PageLocked:
        """A buffer of `size` bytes, at most twice as long."""
        fitting = [buffer for buffer in self._free if size <= buffer.bytes.numel() <= 2 * size]
        if fitting:
            best = min(fitting, key=lambda buffer: buffer.bytes.numel())
            self._free.remove(best)
            return best
        self.made += 1
        step = max(1 << 12, 1 << (size.bit_length() - 3))  # rows of other lengths then find a buffer too
        return PageLocked(-(-size // step) * step)

    def give(self, buffer: PageLocked) -> None:
        """Take a buffer back; copies on the stream that used it may still be on their way."""
        self._free.append(buffer)


class _Copy:
    """A storage in host memory; from its fetch to its last use it is on the device too."""

    def __init__(self, offload: ActivationOffload, place: Place, size: int, device: torch.device) -> None:
        self.offload, self.place, self.size, self.device = offload, place, size, device
        self.buffer: PageLocked | None = offload.pool.take(size)
        self.fetched: Tensor | None = None
        self.coming: Any = None  # the event of a copy that nobody has waited for

    def release(self) -> None:
        """Give the host's buffer back: later copies use the same stream, so they come after this one's."""
        if self.buffer is not None:
            self.offload.pool.give(self.buffer)
            self.buffer = None

    def __del__(self) -> None:
        self.release()
        if self.coming is not None and self.fetched is not None and self.fetched.is_cuda:
            self.fetched.record_stream(self.offload.stream)  # fetched, but not needed after all


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps in place of a tensor."""

    copy: _Copy
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class ActivationOffload:
    """The copies of one block's first `layers` layers.

    Forward passes may overlap with backward passes of earlier ones, as in a pipeline; each has a number.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.pool = HostPool()
        self.stream: Any = torch.cuda.Stream()
        self.number = 0  # of the newest forward pass
        self.layer: int | None = None  # that runs forward, while a pass does
        self.stay: set[int] = set()  # addresses of storages that are not copied
        self._hooks = contextlib.ExitStack()
        self._waiting: dict[Place, dict[tuple[int, int], weakref.ref[_Copy]]] = {}  # not fetched yet
        self._leaving: deque[tuple[int, Tensor, Any]] = deque()  # layer, storage on the device, event of its copy
        self._reached: Place | None = None

    @contextlib.contextmanager
    def forward_pass(self, stay: set[int]) -> Iterator[None]:
        """Around a forward pass of the block. After it nothing that was copied is left on the device.

        Args:
            stay: addresses of storages that are not copied: parameters, tables that all layers share.
        """
        self.number, self.layer, self.stay = self.number + 1, 0, stay
        self._forget_lost()
        self._hooks.enter_context(saved_tensors_hooks(self._pack, self._unpack))
        try:
            yield
        finally:
            self._hooks.close()
            self._leave(None)
            self.layer = None

    def enter(self, layer: int) -> None:
        """A layer begins, or what comes behind the last one; also when it is recomputed for the backward pass."""
        if self.layer is None:
            if layer == self.layers and torch.is_grad_enabled() and self._waiting:
                self.fetch((min(self._waiting)[0], layer - 1))  # recomputed, and backward passes keep the order
            return
        self.layer = layer
        if layer == self.layers:
            self._hooks.close()
        self._leave(layer - 1)

    def fetch_after(self, output: Tensor) -> None:
        """Fetch the last layer's activations of this forward pass when the gradient of `output`, behind it, is known."""
        if output.requires_grad:
            place = (self.number, self.layers - 1)
            output.register_hook(lambda _: self.fetch(place))

    def fetch(self, place: Place) -> None:
        """Begin to copy a layer's activations back; without effect if that has begun."""
        waiting = self._waiting.pop(place, None)
        if waiting is None:
            return
        # The memory below belongs to the computing stream: it is free once that has done what it was given before.
        self.stream.wait_stream(torch.cuda.current_stream())
        for reference in reversed(waiting.values()):  # as the backward pass needs them
            copy = reference()
            if copy is None or copy.buffer is None:
                continue
            copy.fetched = torch.empty(copy.size, dtype=torch.uint8, device=copy.device)
            with torch.cuda.stream(self.stream):
                copy.fetched.copy_(copy.buffer.bytes[: copy.size], non_blocking=True)
                copy.coming = torch.cuda.Event()
                copy.coming.record(self.stream)
            copy.release()

    def _pack(self, tensor: Tensor) -> Any:
        """Autograd saves a tensor: what it shall keep."""
        storage = tensor.untyped_storage()
        if not tensor.is_floating_point() or storage.nbytes() < SMALLEST or storage.data_ptr() in self.stay:
            return tensor
        assert self.layer is not None
        copies = self._waiting.setdefault((self.number, self.layer), {})
        # The storage outlives this layer's forward pass in `_leaving`, so its address stands for it.
        key = (storage.data_ptr(), tensor._version)
        copy = copies[key]() if key in copies else None
        if copy is None:
            copy = self._send(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
            copies[key] = weakref.ref(copy)
        return _Saved(copy, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _send(self, source: Tensor) -> _Copy:
        """Begin to copy a whole storage, as bytes, to the host."""
        assert self.layer is not None
        copy = _Copy(self, (self.number, self.layer), source.numel(), source.device)
        assert copy.buffer is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            copy.buffer.bytes[: copy.size].copy_(source, non_blocking=True)
            gone = torch.cuda.Event()
            gone.record(self.stream)
        self._leaving.append((self.layer, source, gone))
        return copy

    def _leave(self, before: int | None) -> None:
        """Free the device's memory of the layers before this one, or of all; the computation waits for their copies.

        Without that wait (`record_stream`) the allocator could not use the memory again until the GPU, which is behind
        this process, has made the copies: a whole forward pass would be in flight.
        """
        while self._leaving and (before is None or self._leaving[0][0] < before):
            torch.cuda.current_stream().wait_event(self._leaving[0][2])
            self._leaving.popleft()

    def _unpack(self, saved: Any) -> Tensor:
        """Autograd needs a tensor: it is fetched if it has not been, and the layer before it is on its way."""
        if not isinstance(saved, _Saved):
            return saved
        copy = saved.copy
        if copy.place != self._reached:
            self._reached = copy.place
            self.fetch(copy.place)
            self.fetch((copy.place[0], copy.place[1] - 1))
        assert copy.fetched is not None
        if copy.coming is not None:
            torch.cuda.current_stream().wait_event(copy.coming)
            copy.coming = None
        result = torch.empty(0, dtype=saved.dtype, device=copy.device)
        return result.set_(copy.fetched.untyped_storage(), saved.offset, saved.shape, saved.stride)

    def _forget_lost(self) -> None:
        """Drop the places of graphs that ended without a backward pass."""
        for place in [place for place, copies in self._waiting.items() if not any(copy() for copy in copies.values())]:
            del self._waiting[place]


class OffloadingBlock(TransformerBlock):
    """A TransformerBlock that trains with an ActivationOffload; `offload_activations` makes one of an existing block."""

    offload: ActivationOffload

    def forward(self, hidden_states: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """As the parent's; [s, b, h] to [s, b, h]."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, *args, **kwargs)
        layout = kwargs.get("packed_seq_params")
        shared = [table for pair in getattr(layout, "tables", {}).values() for table in pair]
        stay = {tensor.untyped_storage().data_ptr() for tensor in (*self.parameters(), *shared)}
        with self.offload.forward_pass(stay):
            output = super().forward(hidden_states, *args, **kwargs)
        if self.offload.layers == len(self.layers):
            self.offload.fetch_after(output)
        return output


def offload_activations(block: TransformerBlock, layers: int) -> ActivationOffload:
    """Let the first `layers` of a block's layers keep their activations in host memory.

    With recomputation of whole layers that is each layer's input alone.

    Raises TypeError for a subclass of TransformerBlock, whose own forward would be lost.
    """
    if type(block) is not TransformerBlock:
        raise TypeError(f"activations of a {type(block).__name__} cannot be offloaded; it must be a TransformerBlock")
    offload = ActivationOffload(layers)
    become(block, OffloadingBlock).offload = offload
    behind = [] if block.final_layernorm is None else [block.final_layernorm]
    for number, module in enumerate((*block.layers, *behind)):
        module.register_forward_pre_hook(lambda _, __, number=number: offload.enter(number))
    if layers < len(block.layers):
        block.layers[layers].register_forward_hook(
            lambda _, __, output: offload.fetch_after(output[0]) if offload.layer is not None else None
        )
    return offload
