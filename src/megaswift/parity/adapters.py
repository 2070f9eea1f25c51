"""PEFT's own LoRA for the reference: with the run's first values, and with the run's dropout, mask for mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.counter_dropout import Dropout, token_keys
from megaswift.megatron.kernels.nf4 import pack
from megaswift.models import parameters_of
from megaswift.models.adapters import PREFIX, Lora, linear
from megaswift.train.adapters import first_value
from megaswift.weights.convert.lora import load_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.models.parameters import Parameter
    from megaswift.run.spec import Run

# PEFT's names in memory -> in its files.
_IN_MEMORY = (
    ("lora_magnitude_vector.default.weight", "lora_magnitude_vector"),
    (".modules_to_save.default", ""),
    (".default.weight", ".weight"),
)


class Tokens:
    """Which tokens the model is working on: their keys, set before each sample."""

    def __init__(self, seed: int) -> None:
        self.seed, self.current = seed, torch.zeros(0, dtype=torch.int32)

    def set(self, row: int, first: int, count: int, step: int) -> None:
        """Tokens `first` and on of a row of the data; `step`: steps made before."""
        origins = (row << 32) + torch.arange(first, first + count, dtype=torch.int64)
        self.current = token_keys(origins[None], self.seed, step)[0]


class _Masked(torch.nn.Module):
    def __init__(self, dropout: Dropout, tokens: Tokens) -> None:
        super().__init__()
        self.dropout, self.tokens = dropout, tokens

    def forward(self, x: Tensor) -> Tensor:
        """x [1, s, features]."""
        if not self.training:
            return x
        return x * self.dropout.factors(self.tokens.current.to(x.device), x.shape[-1], x.dtype)


@dataclass(frozen=True)
class PeftSide:
    """The adapter of a run on the reference's side."""

    lora: Lora
    seed: int
    start: Path | None = None

    @classmethod
    def of(cls, run: Run) -> PeftSide | None:
        """Of a run; None where it trains all weights."""
        method = run.method
        start = None if method.adapter_start is None else Path(method.adapter_start)
        return None if method.adapter is None else cls(method.adapter, run.seed, start)

    def wrap(self, model: Any, folder: Path) -> tuple[Any, dict[str, Any], Tokens]:
        """PEFT's model of a transformers model, its trained parameters by the names of PEFT's files, and its tokens."""
        from peft import LoraConfig, get_peft_model

        base = parameters_of(model.config)
        if self.lora.bits is not None:
            as_packed(model, base)
        values = self.lora.peft_config(base, str(folder))
        names = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "modules_to_save")
        wrapped = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=self.lora.dropout, **{name: values[name] for name in names})
        )
        trained = {plain(name): parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
        begun = {} if self.start is None else load_adapter(self.start)
        with torch.no_grad():
            for name, parameter in trained.items():
                if name in begun:
                    parameter.copy_(begun[name])
                elif ".lora_" in name and not name.endswith("lora_magnitude_vector"):
                    parameter.copy_(first_value(name, tuple(parameter.shape), self.lora, self.seed))
        tokens = Tokens(self.seed)
        self._same_dropout(wrapped, tokens, model.config)
        return wrapped, trained, tokens

    def _same_dropout(self, wrapped: Any, tokens: Tokens, config: PreTrainedConfig) -> None:
        modules = {
            site.base.hf[number].name.removesuffix(".weight"): site.module
            for site in self.lora.sites(parameters_of(config))
            for number in site.tensors
        }
        for name, module in wrapped.named_modules():
            site = modules.get(name.removeprefix(PREFIX))
            if site is not None and self.lora.dropout > 0.0 and hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = _Masked(Dropout(self.lora.dropout, site), tokens)


@torch.no_grad()
def as_packed(model: Any, base: list[Parameter]) -> None:
    """Give a model's linear layers the values that 4 bits can hold."""
    weights = dict(model.named_parameters())
    for parameter in linear(base):
        for part in parameter.hf:
            weights[part.name].copy_(pack(weights[part.name]).weight(weights[part.name].dtype))


def plain(name: str) -> str:
    """The name of a tensor in PEFT's files."""
    for long, short in _IN_MEMORY:
        name = name.replace(long, short)
    return name
