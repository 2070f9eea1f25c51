"""Linear layers whose frozen weights are held in 4 bits: built without their weights, which are packed as they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.lora import LoraCall, Parts, lora_linear
from megaswift.megatron.kernels.nf4 import SECOND_BLOCK, Packed, PackedOps, SmallScales, pack, small_scales
from megaswift.megatron.kernels.parallel_linear import ColumnParallel, RowParallel
from megaswift.megatron.latent_attention import Replicated
from megaswift.models.adapters import linear, local_module
from megaswift.models.parameters import Arrangement, Parameter

PACKED_OPS = PackedOps()
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
    """A column-parallel layer; its weight is a `Packed` once `fill` has read it."""

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        _built_without_weight(self, config, lambda: super(PackedColumn, self).__init__(*args, config=config, **kwargs))

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _packed_product(input, weight, kwargs)


class PackedRow(RowParallel):
    """A row-parallel layer; its weight is a `Packed` once `fill` has read it."""

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        _built_without_weight(self, config, lambda: super(PackedRow, self).__init__(*args, config=config, **kwargs))

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _packed_product(input, weight, kwargs)


class PackedReplicated(Replicated):
    """A layer that every tensor-parallel rank has whole; its weight is a `Packed` once `fill` has read it."""

    def __init__(self, inputs: int, outputs: int, config: Any) -> None:
        self.bias = None
        _built_without_weight(self, config, lambda: super(PackedReplicated, self).__init__(inputs, outputs, config))

    def forward(self, x: Tensor) -> Tensor:
        return _packed_product(x, self.weight, {})


def fill(
    model: Any, base: Sequence[Parameter], first_layer: int, read: Callable[[Parameter], Tensor], double: bool = False
) -> None:
    """Pack the weights of a stage's layers, one matrix at a time, before an adapter is attached.

    Args:
        base: the model's parameters.
        first_layer: the stage's first layer in the whole model.
        read: the whole value of one of them.
        double: scales are held in 8 bits, too.
    """
    for parameter in linear(base):
        name = local_module(parameter.name.removesuffix(".weight"), first_layer, len(model.decoder.layers))
        if name is None:
            continue
        layer = model.get_submodule(name)
        tp, rank = layer.tp_group.size(), layer.tp_group.rank()
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        value, dtype = read(parameter), layer.config.params_dtype
        if double:  # the mean of all scales of a matrix is wanted, so it is packed as a whole
            layer.weight = doubly_packed(value.to(device, dtype), parameter.arrangement, tp, rank)
        else:
            layer.weight = pack(parameter.arrangement.shard(value, tp)[rank].to(device, dtype))


def doubly_packed(weight: Tensor, arrangement: Arrangement, tp: int, rank: int) -> Packed:
    """A rank's part of a whole matrix [n, k] in 4 bits, its scales in 8 bits by Hugging Face matrices."""
    packed = pack(weight)
    assert isinstance(packed.scales, Tensor)
    parts = [small_scales(own) for own in arrangement.unpack(packed.scales)]
    first, runs = [], 0
    for own in parts:
        first.append(own.starts + runs * SECOND_BLOCK)
        runs += len(own.second)
    columns = packed.scales.shape[1] // tp if arrangement.split == 1 else 0

    def rows(values: Sequence[Tensor]) -> Tensor:
        whole = arrangement.pack(values)
        return whole if arrangement.split else arrangement.shard(whole, tp)[rank]

    return Packed(
        arrangement.shard(packed.data, tp)[rank].contiguous(),
        SmallScales(
            codes=arrangement.shard(arrangement.pack([own.codes for own in parts]), tp)[rank].contiguous(),
            second=torch.cat([own.second for own in parts]),
            starts=rows(first) + rank * columns,
            offsets=rows([own.offsets for own in parts]),
        ),
    )
