"""Layers beside a model that predict tokens further ahead (multi-token prediction): some models are published with them, none trains them here."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from megaswift.models import family_of

FIELD = "num_nextn_predict_layers"


def layers_ahead(config: Any) -> tuple[str, ...]:
    """Patterns of the names of their tensors, which a folder may hold, and which stay where they are; () where there are none."""
    return family_of(config.model_type).ahead(config)


def without_layers_ahead(names: Iterable[str], config: Any) -> list[str]:
    """Names of tensors that are none of theirs."""
    patterns = layers_ahead(config)
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]


def note_on_layers_ahead(config: Any) -> str | None:
    """What a user must know of them; None where there are none."""
    patterns = layers_ahead(config)
    if not patterns:
        return None
    return (
        f"{', '.join(patterns)} (multi-token prediction, {FIELD} in config.json) is left out where the folder has it: it is not trained, and no folder that is "
        "written here holds it. transformers computes the same without it; to guess ahead while answering, take it from the base model."
    )


__all__ = ["layers_ahead", "note_on_layers_ahead", "without_layers_ahead"]
