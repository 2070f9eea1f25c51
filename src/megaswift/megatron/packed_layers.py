"""Linear layers whose frozen weights are held in few bits: built without their weights, which `packed_weights.fill` brings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.lora import LoraCall, Parts, lora_linear
from megaswift.megatron.kernels.packed import PACKED_OPS
from megaswift.megatron.kernels.parallel_linear import ColumnParallel, RowParallel
from megaswift.megatron.latent_attention import Replicated

_NO_ADAPTER = LoraCall(Parts((), ()), 0.0, PACKED_OPS)


def _built_without_weight(layer: Any, config: Any, build: Callable[[], None]) -> None:
    """Run a constructor whose weight takes no memory, and take the weight away."""
    on_cpu, config.use_cpu_initialization = (
        config.use_cpu_initialization,
        True,
    )  # else the device is named and this one is not asked
    try:
        with torch.device("meta"):
            build()
    finally:
        config.use_cpu_initialization = on_cpu
    del layer.weight
    layer.weight = None
    if layer.bias is not None:
        device = "cpu" if on_cpu else torch.cuda.current_device()
        made = torch.nn.Parameter(torch.zeros(layer.bias.shape, dtype=layer.bias.dtype, device=device))
        vars(made).update(vars(layer.bias))
        layer.bias = made


def _packed_product(x: Tensor, weight: Any, options: dict[str, Any]) -> Tensor:
    call = LoraCall(
        _NO_ADAPTER.parts,
        0.0,
        PACKED_OPS,
        sequence=bool(options.get("sequence_parallel")),
        reduce_grad=bool(options.get("allreduce_dgrad")),
        group=options.get("tp_group"),
    )
    return lora_linear(x, weight, options.get("bias"), None, None, None, call)


class PackedColumn(ColumnParallel):
    """A column-parallel layer; its weight is a `PackedWeight` once it is read."""

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        _built_without_weight(self, config, lambda: super(PackedColumn, self).__init__(*args, config=config, **kwargs))

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _packed_product(input, weight, kwargs)


class PackedRow(RowParallel):
    """A row-parallel layer; its weight is a `PackedWeight` once it is read."""

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        _built_without_weight(self, config, lambda: super(PackedRow, self).__init__(*args, config=config, **kwargs))

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _packed_product(input, weight, kwargs)


class PackedReplicated(Replicated):
    """A layer that every tensor-parallel rank has whole; its weight is a `PackedWeight` once it is read."""

    def __init__(self, inputs: int, outputs: int, config: Any) -> None:
        self.bias = None
        _built_without_weight(self, config, lambda: super(PackedReplicated, self).__init__(inputs, outputs, config))

    def forward(self, x: Tensor) -> Tensor:
        return _packed_product(x, self.weight, {})
