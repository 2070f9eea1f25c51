"""How many values a model and what is trained of it have: by layer, by how processes share them. Counted once a config.

A planner asks for hundreds of layouts of one model, and some models have 50,000 tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from megaswift.models import parameters_of
from megaswift.models.adapters import Lora, is_expert, packable
from megaswift.models.parameters import Parameter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BEFORE, AFTER = -1, -2  # in place of a layer's number: the embedding; final norm and output layer


@dataclass(frozen=True)
class Group:
    """Values of parameters that are alike in everything that a plan asks.

    Attributes:
        layer: its number in the whole model, BEFORE, or AFTER.
        expert: of experts among which tokens are routed.
        split: tensor parallelism cuts them.
        matrix: they are multiplied with every token that comes to them; the embedding is not.
        table: rows of the vocabulary: the embedding, the output layer.
        packable: they can be held in few bits.
    """

    layer: int
    expert: bool
    split: bool
    matrix: bool
    table: bool
    packable: bool


Tally = dict[Group, int]


class _Same:
    """A config as a key: two that say the same are one."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config, self.text = config, f"{config.model_type} {vars(config)}"

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.text == other.text


def tally(config: PreTrainedConfig) -> Tally:
    """Of the whole model, tied weights counted once."""
    return _whole(_Same(config))


def trained_tally(config: PreTrainedConfig, adapter: Lora | None, frozen: tuple[str, ...]) -> Tally:
    """Of what is trained: of an adapter, or of the model what is not frozen."""
    return tally(config) if adapter is None and not frozen else _trained(_Same(config), adapter, frozen)


@lru_cache(maxsize=16)
def _whole(same: _Same) -> Tally:
    base = parameters_of(same.config)
    return _grouped(base, {parameter.name for parameter in packable(base)})


@lru_cache(maxsize=64)
def _trained(same: _Same, adapter: Lora | None, frozen: tuple[str, ...]) -> Tally:
    config = same.config
    if adapter is not None:
        return _of_adapter(adapter, parameters_of(config))
    kept = set(frozen)
    return _grouped((parameter for parameter in parameters_of(config) if parameter.name not in kept), set())


def _grouped(parameters: Iterable[Parameter], packed: set[str]) -> Tally:
    found: Counter[Group] = Counter()
    for parameter in parameters:
        found[_group(parameter, parameter.name in packed)] += parameter.size
    return dict(found)


def _group(parameter: Parameter, packable: bool = False) -> Group:
    name = parameter.name
    first = name.startswith("embedding.")
    layer = int(name.split(".", 3)[2]) if name.startswith("decoder.layers.") else BEFORE if first else AFTER
    matrix = len(parameter.shape) == 2 and not first
    return Group(layer, is_expert(parameter), parameter.arrangement.split is not None, matrix, parameter.padded, packable)


def _of_adapter(adapter: Lora, base: list[Parameter]) -> Tally:
    """As of the list that `Lora.parameters` makes, without making it: an adapter of all experts has 25,000 tensors."""
    found: Counter[Group] = Counter()
    for site in adapter.sites(base):
        group, count = _group(site.base), len(site.tensors)
        rows = sum(site.base.hf[number].shape[0] for number in site.tensors)
        group = replace(group, table=False, matrix=True)
        found[replace(group, split=group.split and not site.is_column)] += count * adapter.rank * site.base.shape[1]
        found[replace(group, split=group.split and site.is_column)] += rows * adapter.rank
        if adapter.dora:
            found[replace(group, split=group.split and site.is_column, matrix=False)] += rows
    for parameter in adapter.whole(base):
        found[_group(parameter)] += parameter.size
    return dict(found)


def stage_of_layers(counts: Iterable[int]) -> list[int]:
    """The (virtual) stage of each layer, from the numbers of layers that stages have."""
    return [stage for stage, count in enumerate(counts) for _ in range(count)]


__all__ = ["AFTER", "BEFORE", "Group", "Tally", "stage_of_layers", "tally", "trained_tally"]
