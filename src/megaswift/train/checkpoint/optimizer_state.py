"""Optimizer state where it lies: each rank saves, and loads, only the part of the distributed optimizer that it holds.

Megatron-Core's reshardable form gathers the whole state, 12 bytes a parameter, in the host memory of every data-parallel
rank, to save as well as to load; and 0.16.1 loses its place where a buffer has padding between its buckets. Here a rank's
stretch of a flattened parameter is cut into boxes, which is what an index can describe. Keys, shapes and values are
Megatron-Core's: each reads what the other wrote, at any tp, pp and dp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaswift.errors import DataError
from megaswift.megatron import compat
from megaswift.weights.torch_dist.reader import Reader, key_of

STATES = ("param", "exp_avg", "exp_avg_sq")  # fp32 master weight and Adam's two moments


@dataclass(frozen=True)
class Box:
    """A box of a global tensor, and where its values lie, in order, in this rank's flat shard of the parameter."""

    key: str  # of the weight
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    first: int
    last: int
    is_main: bool  # whether this rank saves it: tensor-parallel ranks and tied stages may hold copies
    is_padded: bool  # whether the global tensor may be longer at another layout: vocabularies are


@dataclass(frozen=True)
class Shard:
    """What this rank's optimizer holds of one parameter."""

    optimizer: Any  # Megatron-Core's DistributedOptimizer
    parameter: Tensor
    count: int
    boxes: list[Box]

    def read(self) -> dict[str, Tensor]:
        """The states of STATES: flat, fp32, on the optimizer's device."""
        found = compat.state_of_shard(self.optimizer, self.parameter)
        return {name: found[name].detach().view(-1) for name in STATES}

    @torch.no_grad()
    def write(self, states: dict[str, Tensor]) -> None:
        """Take over all states, flat, from any device."""
        compat.set_state_of_shard(self.optimizer, self.parameter, states)


def small_state(optimizer: Any) -> Any:
    """What is no tensor of a parameter's size: groups with their steps, the loss scale."""
    found = optimizer.state_dict()
    return {**found, "param_state_sharding_type": "fully_reshardable"} if isinstance(found, dict) else found


def shards(optimizer: Any, model_state: dict[str, Any]) -> Iterator[Shard]:
    """This rank's part of the optimizer, parameter by parameter.

    Args:
        optimizer: Megatron-Core's chain of distributed optimizers.
        model_state: the model's sharded state dict, before its factories are applied.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    kinds = (ShardedTensor, ShardedTensorFactory)
    described = {item.data: item for item in nested_values(model_state) if isinstance(item, kinds)}
    for inner in optimizer.chained_optimizers:
        for ranges in inner.gbuf_ranges:
            for buckets in ranges.values():
                for bucket in buckets:
                    for parameter, places in bucket["param_map"].items():
                        held = places["param"]
                        boxes = list(_boxes(described[parameter], parameter, held.start, held.end))
                        yield Shard(inner, parameter, held.end - held.start, boxes)


def _boxes(item: Any, parameter: Tensor, first: int, last: int) -> Iterator[Box]:
    """Elements `first` to `last` of a flattened parameter as boxes of the global tensors that it is saved as."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    # A factory cuts the parameter (SwiGLU's two halves); its parts are views, whose place tells which elements they are.
    parts = [item] if isinstance(item, ShardedTensor) else list(nested_values(item.build()))
    for part in parts:
        begin = (part.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        start, stop = max(first, begin), min(last, begin + part.data.numel())
        lead = part.prepend_axis_num
        place = start - first
        for offset, shape in boxes_of(tuple(part.local_shape), start - begin, stop - begin):
            count = math.prod(shape)
            yield Box(
                key=part.key,
                global_shape=tuple(part.global_shape),
                offset=(*part.global_offset[:lead], *(a + b for a, b in zip(part.global_offset[lead:], offset))),
                shape=(*(1,) * lead, *shape),
                first=place,
                last=place + count,
                is_main=not any(part.replica_id[:-1]),  # the last is the data-parallel rank: here each has its own part
                is_padded=part.allow_shape_mismatch,
            )
            place += count


def boxes_of(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut elements `first` to `last` of a flattened tensor into (offset, shape) of boxes, in order.

    At most one box is whole rows; before and after it there may be parts of a row: 2 * len(shape) - 1 boxes at most.
    """
    if first >= last:
        return
    if len(shape) <= 1:
        yield ((first,), (last - first,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    (top, begin), (bottom, end) = divmod(first, row), divmod(last, row)
    if top == bottom:
        yield from _in_row(top, shape, begin, end)
        return
    if begin:
        yield from _in_row(top, shape, begin, row)
        top += 1
    if top < bottom:
        yield (top, *(0,) * (len(shape) - 1)), (bottom - top, *shape[1:])
    yield from _in_row(bottom, shape, 0, end)


def _in_row(row: int, shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, size in boxes_of(shape[1:], first, last):
        yield (row, *offset), (1, *size)


def load(optimizer: Any, model_state: dict[str, Any], reader: Reader) -> None:
    """Fill this rank's part of the optimizer. Raises DataError where the checkpoint does not hold all of it.

    Args:
        model_state: as for `shards`.
    """
    waiting = list(shards(optimizer, model_state))
    for shard, later in zip(waiting, [*waiting[1:], None]):
        for key, offset, shape in _places(later, reader) if later else ():
            reader.prefetch_box(key, offset, shape)
        shard.write({state: _read(shard, state, reader) for state in STATES})
        for key, offset, shape in _places(shard, reader):
            reader.release_box(key, offset, shape)


def _places(shard: Shard, reader: Reader) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    for box in shard.boxes:
        for state in STATES:
            key = key_of(state, box.key)
            yield key, box.offset, _stored_shape(box, key, reader)


def _stored_shape(box: Box, key: str, reader: Reader) -> tuple[int, ...]:
    """The shape of what the checkpoint has of a box: rows that only pad a vocabulary may be missing there."""
    stored = reader.shape(key)
    if stored == box.global_shape:
        return box.shape
    if not box.is_padded or stored[1:] != box.global_shape[1:]:
        raise DataError(
            f"the checkpoint does not fit the model: {key} has the shape {list(stored)}, not {list(box.global_shape)}.",
            where=str(reader.directory),
        )
    return (min(max(stored[0] - box.offset[0], 0), box.shape[0]), *box.shape[1:])


def _read(shard: Shard, state: str, reader: Reader) -> Tensor:
    """One state of a shard, flat: a view of the file where one chunk holds it all."""
    result: Tensor | None = None
    for box in shard.boxes:
        key = key_of(state, box.key)
        shape = _stored_shape(box, key, reader)
        if shape == box.shape and box.last - box.first == shard.count:
            return reader.read_box(key, box.offset, shape).reshape(-1)
        if result is None:
            result = torch.empty(shard.count)
        part = result[box.first : box.last]
        if shape != box.shape:
            part.copy_(shard.read()[state][box.first : box.last])  # padding keeps what it has
        if all(shape):
            part.view(box.shape)[: shape[0]] = reader.read_box(key, box.offset, shape)
    assert result is not None
    return result
