"""Layers beside a model that predict tokens further ahead (multi-token prediction): some models are published with them, none trains them here."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from megaswift.models import family_of

FIELD = "num_nextn_predict_layers"


def layers_ahead(config: Any) -> tuple[str, ...]:
    """Patterns of the names of their tensors, which a folder may hold, and which are carried along; () where there are none."""
    return family_of(config.model_type).ahead(config)


def without_layers_ahead(names: Iterable[str], config: Any) -> list[str]:
    """Names of tensors that are none of theirs."""
    patterns = layers_ahead(config)
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]


def notes_on_carried(names: Iterable[str], config: Any) -> list[str]:
    """What a user must know of tensors that are carried along: of layers that predict ahead, and of all others."""
    names = list(names)
    others = without_layers_ahead(names, config)
    notes = []
    if others:
        marks = ", ".join(mark for mark in family_of(config.model_type).carried(config) if mark not in layers_ahead(config))
        notes.append(f"{marks}: {len(others)} tensors are carried along as they are, bit for bit; nothing trains them.")
    if len(others) < len(names):
        notes.append(
            f"{', '.join(layers_ahead(config))} (multi-token prediction): {len(names) - len(others)} tensors are carried along as they are, bit for "
            "bit. They were not trained, and guess ahead for the model as it was: swift verify DIR --mtp true measures how well they still do."
        )
    return notes


__all__ = ["layers_ahead", "notes_on_carried", "without_layers_ahead"]
