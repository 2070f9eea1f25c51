"""Weights of a Hugging Face folder straight into a sharded model: each rank reads only the parts that it holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaswift.errors import DataError
from megaswift.models import parameters_of
from megaswift.models.head import SCORE
from megaswift.models.parameters import Parameter, Shape
from megaswift.weights.hf.config import check_source, load_config
from megaswift.weights.hf.folder import incomplete
from megaswift.weights.hf.read import HFCheckpoint, nonfinite


def is_hf_folder(path: Path) -> bool:
    """Whether a directory is a whole Hugging Face model folder."""
    return path.is_dir() and not incomplete(path)


def load_hf_weights(model: Any, folder: Path, new_head: bool = False) -> None:
    """Fill a model (of this rank's layout) from a Hugging Face folder; no converted copy is needed.

    Args:
        model: ChatModel of one pipeline stage; values are cast to its precision.
        new_head: its head of scores, which the folder has not, is left as it is; an output layer of the folder is left out.

    Raises DataError unless the folder holds exactly the tensors of its config, and for NaN or infinite weights.
    """
    source = HFCheckpoint.open(folder)
    config = load_config(folder)
    check_source(source, config)
    parameters = {(parameter.key, parameter.place): parameter for parameter in parameters_of(config)}
    places = {parameter.key: len(parameter.place) for parameter in parameters.values()}
    unknown = []
    for part in held_parts(model):
        for held in _single(part, places.get(part.key, 0)):
            parameter = parameters.get((held.key, held.place))
            if parameter is None:
                if not (new_head and held.key == SCORE):
                    unknown.append(held.key)
                continue
            _fill(held, parameter, source)
    if unknown:
        raise DataError(
            f"the model has weights that the folder does not: {', '.join(sorted(set(unknown))[:5])}.", where=str(folder)
        )


def held_parts(model: Any) -> list[Any]:
    """Megatron-Core's description of what this rank holds: names, places in the whole tensors, and the memory itself."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict(prefix="", metadata=None)
    apply_factories(state)
    return [item for item in nested_values(state) if isinstance(item, ShardedTensor)]


@dataclass(frozen=True)
class _Held:
    """What this rank holds of one parameter: where the parameter lies, where the part begins in it, and its memory."""

    key: str
    place: Shape
    offset: Shape
    data: torch.Tensor


def _single(part: Any, axes: int) -> Iterator[_Held]:
    """A part of a tensor whose first `axes` axes count layers and experts, taken apart: one rank's experts are one part."""
    lead = part.prepend_axis_num
    first, offset = part.global_offset[:axes], tuple(part.global_offset[max(axes, lead) :])
    for index in itertools.product(*(range(count) for count in part.local_shape[: max(axes - lead, 0)])):
        place = (*first[:lead], *(start + number for start, number in zip(first[lead:], index)))
        yield _Held(part.key, place, offset, part.data.detach()[index])


def _fill(part: _Held, parameter: Parameter, source: HFCheckpoint) -> None:
    """Copy one part of a tensor from the mapped files."""
    offset, shape = part.offset, tuple(part.data.shape)
    # The vocabulary may be padded.
    stop = tuple(min(start + size, limit) for start, size, limit in zip(offset, shape, parameter.shape))
    if any(last <= first for first, last in zip(offset, stop)):
        return
    pieces = [
        source.part(parameter.hf[piece.tensor])[piece.first : piece.last : piece.step]
        for piece in parameter.arrangement.rows(offset[0], stop[0])
    ]
    value = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    value = value[(slice(None), *(slice(first, last) for first, last in zip(offset[1:], stop[1:])))]
    names = [piece.name for piece in parameter.hf]
    if nonfinite(value.contiguous()):
        raise DataError(
            f"tensor {names[0]}{' or one fused with it' if names[1:] else ''} has NaN or infinite values.",
            where=f"{source.path}: {', '.join(names)}",
            fix="use another model",
        )
    with torch.no_grad():
        part.data[tuple(slice(0, last - first) for first, last in zip(offset, stop))].copy_(value)
    del value, pieces
    for name in names:
        source.release(name)
