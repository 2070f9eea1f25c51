"""The tensors of a Hugging Face folder, planned from a Megatron checkpoint and made one at a time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from megaswift.convert.model import FiniteCheck, MegatronReader, Model, check_megatron, checkpoint_key
from megaswift.convert.precision import Precisions
from megaswift.families.rules import GateUp, Rule
from megaswift.hf.shards import PlannedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def planned_hf_tensors(
    reader: MegatronReader, config: PreTrainedConfig, precisions: Precisions, finite: FiniteCheck | None = None
) -> list[PlannedTensor]:
    """Every Hugging Face tensor with the way to get its values, in the order of the computation.

    Args:
        precisions: of the tensors to be made; values are cast to them.
        finite: judges every tensor; default: NaN and infinity are refused.

    Parts of one fused tensor are unpacked together and kept only until the last of them was taken.
    """
    model = Model(config)
    check_megatron(reader, model)
    check = finite or FiniteCheck()
    planned = (_Planned(reader, model, rule, layer, precisions, check) for rule, layer in model.each())
    return [tensor for one in planned for tensor in one.tensors()]


class _Planned:
    """The Hugging Face tensors of one rule and layer."""

    def __init__(
        self, reader: MegatronReader, model: Model, rule: Rule, layer: int, precisions: Precisions, finite: FiniteCheck
    ) -> None:
        self.reader, self.model, self.rule, self.layer = reader, model, rule, layer
        self.precisions, self.finite = precisions, finite
        self.shared: dict[int, Tensor] = {}

    def tensors(self) -> list[PlannedTensor]:
        planned = []
        for number, (name, shape) in enumerate(
            zip(self.model.names(self.rule, self.layer), self.rule.hf_shapes(self.model.sizes))
        ):
            make, release = partial(self._make, number, name), partial(self._release, number)
            planned.append(PlannedTensor(name, self.precisions.of(name), shape, make, self._prepare, release))
        return planned

    def _make(self, number: int, name: str) -> Tensor:
        if isinstance(self.rule, GateUp):
            value = self.model.read_part(self.reader, self.rule, self.layer, number)
        else:
            if number not in self.shared:
                self.shared.update(enumerate(self.model.read_hf(self.reader, self.rule, self.layer)))
            value = self.shared.pop(number)
        value = value.to(self.precisions.of(name)).contiguous()
        self.finite(name, value)
        return value

    def _prepare(self) -> None:
        self.reader.prefetch(checkpoint_key(self.rule), self.model.place(self.rule, self.layer))

    def _release(self, number: int) -> None:
        if number == len(self.rule.hf) - 1:
            self.shared.clear()
            self.reader.release(checkpoint_key(self.rule), self.model.place(self.rule, self.layer))
