"""Command R7B, Command A: Command R with a window in three of four layers; those without one know no positions (NoPE)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megaswift.models.families.cohere import COHERE
from megaswift.models.family import typed_window
from megaswift.models.kinds import MAIN, Kind


def _kind(config: Any, layer: int) -> Kind:
    window = typed_window(config, layer)
    return Kind(norm="wide_layer", beside=True, window=window, rotation=None if window is None else MAIN)


COHERE2 = replace(
    COHERE,
    name="cohere2",
    hf_types=("cohere2",),
    kind=_kind,
    extra_fields=COHERE.extra_fields | {"sliding_window_pattern", "_sliding_window_pattern"},
    tiny=COHERE.tiny | {"sliding_window": 9},
)
