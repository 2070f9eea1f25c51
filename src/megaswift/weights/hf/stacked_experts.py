"""Folders that hold all experts of a layer as one tensor, seen as those that hold each expert's matrices apart: no byte is moved.

Qwen3.5 is published with gate_up_proj [e, 2 * inner, hidden] and down_proj [e, hidden, inner], and transformers writes gate_proj,
up_proj and down_proj of each expert when it saves it. Every matrix is one stretch of the file either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megaswift.weights.hf.header import TensorEntry

_MARK = ".mlp.experts."
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def apart(table: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of a folder with each expert's in the place of those of all; layers that predict ahead stay as they are."""
    found: dict[str, TensorEntry] = {}
    for name, entry in table.items():
        stem, _, leaf = name.rpartition(".")
        parts = _STACKED.get(leaf, ()) if f"{stem}.".endswith(_MARK) and not name.startswith("mtp.") else ()
        if not parts or len(entry.shape) != 3 or entry.shape[1] % len(parts):
            found[name] = entry
            continue
        count, rows, columns = entry.shape[0], entry.shape[1] // len(parts), entry.shape[2]
        size = entry.nbytes // (count * len(parts))
        for number in range(count):
            for place, part in enumerate(parts):
                start = entry.start + (number * len(parts) + place) * size
                own = f"{stem}.{number}.{part}.weight"
                found[own] = replace(entry, name=own, shape=(rows, columns), start=start, stop=start + size)
    return found


__all__ = ["apart"]
