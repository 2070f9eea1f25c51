"""Adapters in training: what is attached to a built model, and which parameters it adds to the model's own list."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from megaswift.megatron.lora_layers import attach
from megaswift.models import family_of
from megaswift.models.adapters import LORA_A, LORA_B, RANDOM, Lora

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.megatron.model import ChatModel
    from megaswift.models.family import Family
    from megaswift.models.parameters import Parameter


_RANDOM_B = 0.02  # deviation of a B that is not to begin at zero


class Adapter(Protocol):
    """Something that is trained beside, or in place of, a model's weights."""

    def attach(self, model: ChatModel) -> None:
        """Change a built model, or chunk, whose base weights are loaded, before it is wrapped for data parallelism."""

    def parameters(self, family: Family, config: PreTrainedConfig) -> list[Parameter]:
        """All that is trained and saved."""


class LoraAdapter:
    """A LoRA adapter of a run.

    Args:
        lora: what it is.
        config: of the model.
        seed: of the run.
        start: Hugging Face name -> value of an adapter that training goes on from; None: it begins anew.
    """

    def __init__(self, lora: Lora, config: PreTrainedConfig, seed: int, start: Mapping[str, Tensor] | None = None) -> None:
        self.lora, self.config, self.seed, self.start = lora, config, seed, start

    def parameters(self, family: Family, config: PreTrainedConfig) -> list[Parameter]:
        """A and B of every matrix that has an adapter, and what is trained whole."""
        return self.lora.parameters(family, config)

    def attach(self, model: ChatModel) -> None:
        """See `Adapter`; every rank makes the same first values, whatever the layout."""
        family = family_of(self.config.model_type)
        base, made = family.parameters(self.config), self.parameters(family, self.config)
        model.adapter = attach(model, self.lora, base, made, model.first_layer, self.seed, self._value)

    def _value(self, parameter: Parameter) -> Tensor | None:
        known = parameter.name.endswith((LORA_A, LORA_B))
        if not known and (self.start is None or any(part.name not in self.start for part in parameter.hf)):
            return None  # lengths of rows, and what is trained whole, begin as the base has them
        parts = [self._part(part.name, part.shape) for part in parameter.hf]
        return parameter.arrangement.pack(parts)

    def _part(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self.start is not None:
            return self.start[name].float()
        return first_value(name, shape, self.lora, self.seed)


def first_value(name: str, shape: tuple[int, ...], lora: Lora, seed: int) -> Tensor:
    """fp32: how a half of an adapter begins, a function of its Hugging Face name and the seed.

    A is uniform within 1 / sqrt(in), or normal with deviation 1 / r; B is zero.
    """
    if f".{LORA_B}." in name and lora.init != RANDOM:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # of a seed only 32 bits count
    if f".{LORA_B}." in name:
        return torch.randn(shape, generator=generator) * _RANDOM_B
    if lora.init == "gaussian":
        return torch.randn(shape, generator=generator) / lora.rank
    bound = 1.0 / math.sqrt(shape[1])
    return (torch.rand(shape, generator=generator) * 2.0 - 1.0) * bound


def trainable(model: Any) -> int:
    """How many values of a built model's part are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


__all__ = ["Adapter", "LoraAdapter", "first_value", "trainable"]
