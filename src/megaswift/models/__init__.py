"""All model families: every module of models/families that defines a Family is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from megaswift.errors import UserError, nearest
from megaswift.models import families as files
from megaswift.models.family import Family
from megaswift.models.parameters import Parameter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@cache
def families() -> dict[str, Family]:
    """Hugging Face type name -> family."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(files.__path__):
        for value in vars(importlib.import_module(f"{files.__name__}.{module.name}")).values():
            if isinstance(value, Family):
                found.update(dict.fromkeys(value.hf_types, value))
    return found


def family_of(hf_type: str, where: str = "config.json") -> Family:
    """The family of a Hugging Face model type. Raises UserError for one that is not known."""
    known = families()
    if hf_type not in known:
        raise UserError(
            f"model_type {hf_type!r} is not supported.",
            where=f"{where}: model_type",
            fix=f"known families: {', '.join(sorted(known))}; nearest: {nearest(hf_type, sorted(known))}",
        )
    return known[hf_type]


def parameters_of(config: PreTrainedConfig) -> list[Parameter]:
    """All tensors of a model, in the order of the computation."""
    return family_of(config.model_type).parameters(config)
