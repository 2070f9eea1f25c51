"""PEFT's own LoRA for the reference: with the run's first values, and with the run's dropout, mask for mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswift.megatron.compat import modules_by_name
from megaswift.megatron.kernels.counter_dropout import Dropout, token_keys
from megaswift.megatron.kernels.packed import rounded
from megaswift.models import parameters_of
from megaswift.models.adapters import LORA_A, LORA_B, PREFIX, Lora, is_expert, packable
from megaswift.models.whole import text_of
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
        config = text_of(model.config)
        base = parameters_of(config)
        if self.lora.bits is not None:
            as_packed(model, base, self.lora.bits, self.lora.double)
        wrapped = peft_of(model, self.lora, base, self.lora.dropout)
        trained = trained_of(wrapped, self.lora, base)
        begun = {} if self.start is None else load_adapter(self.start)
        with torch.no_grad():
            for name, parameter in trained.items():
                if name in begun:
                    parameter.copy_(begun[name])
                elif ".lora_" in name and not name.endswith("lora_magnitude_vector"):
                    parameter.copy_(first_value(name, tuple(parameter.shape), self.lora, self.seed).to(parameter.device))
            if self.lora.is_part_of_base:
                self._take_out(wrapped, trained)
        tokens = Tokens(self.seed)
        self._same_dropout(wrapped, tokens, config)
        return wrapped, trained, tokens

    def _take_out(self, wrapped: Any, trained: Mapping[str, Any]) -> None:
        """Let the frozen weights lack what the adapter begins as."""
        for name, a in trained.items():
            if f".{LORA_A}." in name:
                weight = wrapped.get_submodule(name.removesuffix(f".{LORA_A}.weight")).base_layer.weight
                b = trained[name.replace(LORA_A, LORA_B)]
                weight.copy_(weight.float() - self.lora.scale * b.detach().float() @ a.detach().float())

    def _same_dropout(self, wrapped: Any, tokens: Tokens, config: PreTrainedConfig) -> None:
        modules = {
            site.base.hf[number].in_model.removesuffix(".weight"): site.module
            for site in self.lora.sites(parameters_of(config))
            for number in site.tensors
        }
        for name, module in wrapped.named_modules():
            site = modules.get(name.removeprefix(PREFIX))
            if site is not None and self.lora.dropout > 0.0 and hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = _Masked(Dropout(self.lora.dropout, site), tokens)


def peft_of(model: Any, lora: Lora, base: Sequence[Parameter], dropout: float = 0.0, **changes: Any) -> Any:
    """PEFT's model of a transformers model, with an adapter as PEFT begins it; experts and routers are adapted as parameters.

    Args:
        changes: of what PEFT's LoraConfig is told.
    """
    from peft import LoraConfig, get_peft_model

    values = lora.peft_config(base, "")
    if "target_parameters" in values:
        sites = lora.sites(base)
        routed = {site.base.loaded or site.base.hf[0].in_model for site in sites if site.is_expert or site.is_router}
        dense = [site for site in sites if not (site.is_expert or site.is_router)]
        values["target_parameters"] = sorted(routed) or None
        values["target_modules"] = [
            site.base.hf[number].in_model.removesuffix(".weight") for site in dense for number in site.tensors
        ]
    names = (
        "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern",
    )  # fmt: skip
    chosen = {name: values[name] for name in names if name in values} | changes
    with modules_by_name():
        return get_peft_model(model, LoraConfig(task_type=values["task_type"], lora_dropout=dropout, **chosen))


def trained_of(wrapped: Any, lora: Lora, base: Sequence[Parameter]) -> dict[str, Any]:
    """What is trained of PEFT's model, by the names of PEFT's files; of experts each matrix by itself, as a Part."""
    own = {plain(name): parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    found: dict[str, Any] = {}
    taken: set[str] = set()
    for name, (held, view) in _held_otherwise(lora, base).items():
        found[name] = own[held] if view is None else Part(own[held], view)
        taken.add(held)
    return {name: parameter for name, parameter in own.items() if name not in taken} | found


class Part:
    """Some values of a parameter of PEFT's, as if they were one: what is read and written lies in it."""

    def __init__(self, parameter: torch.nn.Parameter, view: Callable[[Tensor], Tensor]) -> None:
        self.parameter, self.view = parameter, view

    @property
    def shape(self) -> torch.Size:
        return self.view(self.parameter).shape

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def grad(self) -> Tensor | None:
        return None if self.parameter.grad is None else self.view(self.parameter.grad)

    @grad.setter
    def grad(self, value: None) -> None:
        self.parameter.grad = value

    def detach(self) -> Tensor:
        """The values, without what they were computed from."""
        return self.view(self.parameter.detach())

    def copy_(self, value: Tensor) -> None:
        """Take over values."""
        self.view(self.parameter.data).copy_(value)


def _held_otherwise(lora: Lora, base: Sequence[Parameter]) -> dict[str, tuple[str, Callable[[Tensor], Tensor] | None]]:
    """Tensors of PEFT's files that its model holds under another name: that name, and which part of the tensor there.

    All experts of a layer are one A [experts * r, in] and one B [out, r * experts], whose last axis counts experts first; of gate
    and up r is twice as large, and B has zeros where one would meet the other.
    """
    found: dict[str, tuple[str, Callable[[Tensor], Tensor] | None]] = {}
    for site in lora.sites(base):
        if site.base.loaded is None or not (site.is_expert or site.is_router):
            continue
        container, _, leaf = site.base.loaded.rpartition(".")
        inner = ".base_layer" if leaf == "gate_up_proj" else ""  # gate and up are wrapped first
        for number, tensor in enumerate(site.base.hf):
            for half in (LORA_A, LORA_B):
                name = f"{PREFIX}{tensor.in_model.removesuffix('.weight')}.{half}.weight"
                view = _expert_view(site.base, number, half, lora.rank) if site.is_expert else None
                found[name] = (f"{PREFIX}{container}{inner}.{half}.weight", view)
    return found


def _expert_view(base: Parameter, number: int, half: str, rank: int) -> Callable[[Tensor], Tensor]:
    expert, experts, width = base.place[-1], base.counts[-1], len(base.hf) * rank
    ranks, run = slice(number * rank, (number + 1) * rank), base.arrangement.run(number)
    assert run is not None, "gate and up of an expert lie one above the other"
    if half == LORA_A:
        return lambda value: value.view(experts, width, -1)[expert, ranks]
    return lambda value: value.view(-1, width, experts)[run[0] : run[1], ranks, expert]


@torch.no_grad()
def as_packed(model: Any, base: Sequence[Parameter], bits: int, double: bool = False) -> None:
    """Give a model's linear layers and experts the values that 4 or 8 bits can hold; `double`: with scales in 8 bits."""
    weights = dict(model.named_parameters())
    for parameter in packable(base):
        if is_expert(parameter) and parameter.loaded is None:  # a folder holds all experts as transformers does
            own = tuple(part.of(weights[part.in_model]) for part in parameter.hf)
        elif is_expert(parameter):
            held = weights[parameter.loaded or parameter.hf[0].in_model][parameter.place[-1]]
            own = held.chunk(len(parameter.hf))
        else:
            own = tuple(weights[part.in_model] for part in parameter.hf)
        for matrix in own:
            matrix.copy_(rounded(matrix, bits, double))


def plain(name: str) -> str:
    """The name of a tensor in PEFT's files."""
    for long, short in _IN_MEMORY:
        name = name.replace(long, short)
    return name
