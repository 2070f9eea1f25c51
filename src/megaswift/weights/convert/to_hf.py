"""The tensors of a Hugging Face folder, planned from a Megatron checkpoint and made one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaswift.models import parameters_of
from megaswift.models.parameters import Parameter
from megaswift.weights.convert.model import FiniteCheck, MegatronReader, check_megatron, read_hf, read_part
from megaswift.weights.convert.precision import Precisions
from megaswift.weights.hf.shards import PlannedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def planned_hf_tensors(
    reader: MegatronReader,
    config: PreTrainedConfig,
    precisions: Precisions,
    finite: FiniteCheck | None = None,
    parameters: list[Parameter] | None = None,
) -> list[PlannedTensor]:
    """Every Hugging Face tensor with the way to get its values, in the order of the computation.

    Args:
        precisions: of the tensors to be made; values are cast to them.
        finite: judges every tensor; default: NaN and infinity are refused.
        parameters: what the checkpoint holds where it is not the model itself: an adapter's.

    Parts of one fused tensor are unpacked together and kept only until the last of them was taken.
    """
    parameters = parameters_of(config) if parameters is None else parameters
    check_megatron(reader, parameters)
    check = finite or FiniteCheck()
    sources: dict[str, list[tuple[_Source, int]]] = {}  # by name of the Hugging Face tensor: where its parts come from
    for parameter in parameters:
        source = _Source(reader, parameter)
        for number, part in enumerate(parameter.hf):
            sources.setdefault(part.name, []).append((source, number))
    return [_planned(name, parts, precisions, check) for name, parts in sources.items()]


def _planned(name: str, parts: list[tuple[_Source, int]], precisions: Precisions, finite: FiniteCheck) -> PlannedTensor:
    """One tensor of the folder: a part of one parameter, or those of several (experts), one after the other."""
    first, number = parts[0]
    shape = first.parameter.hf[number].stored_shape

    def produce() -> Tensor:
        made = [source.parameter.hf[number].stored(source.take(number)) for source, number in parts]
        value = made[0] if first.parameter.hf[number].index is None else torch.stack(made)
        value = value.to(precisions.of(name)).contiguous()
        finite(name, value)
        return value

    def prepare() -> None:
        for source, _ in parts:
            source.prefetch()

    def release() -> None:
        for source, number in parts:
            source.release(number)

    return PlannedTensor(name, precisions.of(name), shape, produce, prepare, release)


class _Source:
    """A parameter whose Hugging Face tensors are taken one by one; what is unpacked together is kept until it is taken."""

    def __init__(self, reader: MegatronReader, parameter: Parameter) -> None:
        self.reader, self.parameter = reader, parameter
        self.shared: dict[int, Tensor] = {}

    def take(self, number: int) -> Tensor:
        alone = read_part(self.reader, self.parameter, number)
        if alone is not None:
            return alone
        if number not in self.shared:
            self.shared.update(enumerate(read_hf(self.reader, self.parameter)))
        return self.shared.pop(number)

    def prefetch(self) -> None:
        self.reader.prefetch(self.parameter.key, self.parameter.place)

    def release(self, number: int) -> None:
        if number == len(self.parameter.hf) - 1:
            self.shared.clear()
            self.reader.release(self.parameter.key, self.parameter.place)
