"""Tiny random Hugging Face models of every family, in which no weight is zero or one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megaswift.families import families

FAMILIES = tuple(sorted({family.name for family in families().values()}))


def tiny_config(name: str, **changes: Any) -> Any:
    """The tiny config of a family, with changes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = next(family for family in families().values() if family.name == name)
    return CONFIG_MAPPING[family.hf_types[0]](**{**family.tiny, **changes})


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model with random weights everywhere: biases and norms too, so that nothing hides behind zeros and ones."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.08)
    return model.eval()


def save_tiny(directory: Path, name: str, seed: int = 0, **changes: Any) -> Any:
    """Write a tiny model as a Hugging Face folder and return the model."""
    model = tiny_model(name, seed, **changes)
    model.save_pretrained(directory)
    return model
