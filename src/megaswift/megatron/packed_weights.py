"""Weights of frozen linear layers and experts, packed one matrix at a time as they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megaswift.megatron.kernels.int8 import PackedInt8, pack_int8
from megaswift.megatron.kernels.nf4 import Packed, SmallScales, pack, small_scales
from megaswift.megatron.kernels.packed import PackedExperts, PackedWeight, joined
from megaswift.megatron.layer_specs import local_name
from megaswift.models.adapters import is_expert, local_module, packable
from megaswift.models.parameters import Arrangement, Parameter


def fill(
    model: Any,
    base: Sequence[Parameter],
    first_layer: int,
    read: Callable[[Parameter], Tensor],
    bits: int,
    double: bool = False,
) -> None:
    """Pack the weights of a stage's layers before an adapter is attached.

    Args:
        base: the model's parameters.
        first_layer: the stage's first layer in the whole model.
        read: the whole value of one of them.
        bits: 4 or 8; double: with 4 bits, scales are held in 8 bits.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def part(parameter: Parameter, group: Any) -> PackedWeight:
        value = read(parameter).to(device, model.config.params_dtype)
        return packed_part(value, parameter.arrangement, group.size(), group.rank(), bits, double)

    ranks = parallel_state.get_expert_model_parallel_world_size()
    routed: dict[str, list[PackedWeight]] = {}
    for parameter in packable(base):
        name = local_module(parameter.name.removesuffix(".weight"), first_layer, len(model.decoder.layers))
        if name is None:
            continue
        if not is_expert(parameter):
            layer = model.get_submodule(name)
            layer.weight = part(parameter, layer.tp_group)
        elif _is_here(parameter):
            name = local_name(name)
            experts = routed.setdefault(name, [])
            experts.append(part(parameter, parallel_state.get_expert_tensor_parallel_group()))
            if len(experts) == parameter.counts[-1] // ranks:  # joined at once, or a whole model would be held twice
                model.get_submodule(name).weight = PackedExperts(joined(routed.pop(name)), len(experts))


def _is_here(parameter: Parameter) -> bool:
    """Whether this rank holds an expert, or a part of it."""
    here = parameter.counts[-1] // parallel_state.get_expert_model_parallel_world_size()
    return parameter.place[-1] // here == parallel_state.get_expert_model_parallel_rank()


def packed_part(value: Tensor, arrangement: Arrangement, tp: int, rank: int, bits: int, double: bool) -> PackedWeight:
    """A rank's part of a whole matrix [n, k]: what it would be packed as there, so that every layout has the same weights."""
    if bits == 8:
        whole = pack_int8(value)
        scales = whole.scales if arrangement.split else arrangement.shard(whole.scales, tp)[rank]
        return PackedInt8(arrangement.shard(whole.data, tp)[rank].contiguous(), scales.contiguous())
    if double:  # the mean of all scales of a matrix is wanted, so it is packed as a whole
        return _doubly_packed(value, arrangement, tp, rank)
    return pack(arrangement.shard(value, tp)[rank])


def _doubly_packed(weight: Tensor, arrangement: Arrangement, tp: int, rank: int) -> Packed:
    """In 4 bits, the scales in 8 bits by Hugging Face matrices."""
    packed = pack(weight)
    assert isinstance(packed.scales, Tensor)
    parts = [small_scales(own) for own in arrangement.unpack(packed.scales)]
    first, runs = [], 0
    for own in parts:
        first.append(own.starts + runs)
        runs += own.room
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
