"""Adapters for tests: random ones that PEFT made on a tiny model, PEFT's own losses and gradients, and an engine's run with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from megaswift.data.store import TokenRows
from megaswift.data.tokens import weights_of
from megaswift.models import family_of
from megaswift.models import parameters_of as parameters_of_model
from megaswift.models.adapters import Lora, saved_modules, target_modules
from megaswift.models.family import is_tied
from megaswift.models.parameters import Parameter
from megaswift.models.whole import text_of
from megaswift.parity.adapters import as_packed, peft_of, trained_of
from megaswift.run.spec import Method, Run
from megaswift.weights.hf.config import load_config
from tests import tiny

torch.set_num_threads(1)  # models this small only wait for each other's threads


def lora_of(folder: Path, words: list[str] | None = None, saved: list[str] | None = None, **changes: Any) -> Lora:
    """A description for a folder's model: rank 4, alpha 8, without dropout."""
    config = load_config(folder)
    base = family_of(config.model_type).parameters(config)
    whole = saved_modules(base, saved, is_tied(config)) if saved else ()
    return Lora(
        **{
            "rank": 4,
            "alpha": 8.0,
            "dropout": 0.0,
            "targets": target_modules(base, words or ["all-linear"]),
            "saved": whole,
            **changes,
        }
    )


def peft_model(folder: Path, lora: Lora, seed: int = 5, **changes: Any) -> Any:
    """PEFT's model in fp32 with random values everywhere in the adapter."""
    settings = load_config(folder)
    for field in family_of(settings.model_type).left_out:
        setattr(settings, field, 0.0)
    base = tiny.loaded(folder, config=settings)
    for module in base.modules():  # the pad token's row is trained as any other
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    listed = parameters_of_model(text_of(base.config))
    if lora.bits is not None:
        as_packed(base, listed, lora.bits, lora.double)
    model = peft_of(base, lora, listed, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trained_of(model, lora, listed).items():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.train()


def save_adapter(model: Any, lora: Lora, directory: Path) -> None:
    """An adapter as we write it, with each expert's matrices apart; where there are no experts that is how PEFT writes it."""
    listed = parameters_of_model(text_of(model.config))
    directory.mkdir(parents=True)
    values = {name: part.detach().clone() for name, part in trained_of(model, lora, listed).items()}
    save_file(values, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(lora.peft_config(listed, "base")))


def peft_step(model: Any, lora: Lora, data: TokenRows) -> tuple[float, float, dict[str, Tensor]]:
    """(mean loss, gradient norm, gradients by name) of all rows, sample by sample."""
    total = torch.zeros(())
    weight = 0.0
    for sample in (sample for row in range(len(data)) for sample in data.samples(row)):
        ids, weights = torch.tensor(sample.ids[None]).long(), torch.from_numpy(weights_of(sample))[1:]
        losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        summed = (losses * weights).sum()
        summed.backward()
        total, weight = total + summed.detach(), weight + float(weights.sum())
    listed = parameters_of_model(text_of(model.config))
    found = {name: part.grad / weight for name, part in trained_of(model, lora, listed).items()}
    norm = float(torch.stack([gradient.double().norm() for gradient in found.values()]).norm())
    return float(total / weight), norm, found


def adapted(made: Run, lora: Lora, start: Path | None) -> Run:
    """A run of full training as one that trains an adapter."""
    method = Method(sft_type="lora", adapter=lora, adapter_start=None if start is None else str(start))
    return replace(made, method=method)


def by_hf_name(directory: Path, parameters: list[Parameter]) -> dict[str, Tensor]:
    """Hugging Face name -> value of all that a checkpoint of an adapter holds; nothing else may be in it."""
    from megaswift.weights.convert.model import check_megatron, read_hf
    from megaswift.weights.torch_dist.reader import Reader

    reader = Reader(directory)
    check_megatron(reader, parameters)
    return {
        part.name: value
        for parameter in parameters
        for part, value in zip(parameter.hf, read_hf(reader, parameter), strict=True)
    }


def parameters_of(folder: Path, lora: Lora) -> list[Parameter]:
    """The adapter's list."""
    config = load_config(folder)
    return lora.parameters(family_of(config.model_type), config)
