"""Families beyond the core against transformers at every kind of layout, packed and apart: a part of `make test-families`.

`swift parity` runs the reference sample by sample, so packed rows are compared with separate ones.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.parity.test_parity import parity
from tests.ranks import RankPool
from tests.training import tiny_start, write_rows

pytestmark = pytest.mark.skipif("MEGASWIFT_FAMILIES" not in os.environ, reason="a part of make test-families")

PACKED = {"packing": True, "max_length": 96}
# processes, options
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one, packed": (1, PACKED),
    "tp2": (2, {"tp": 2, "sequence_parallel": False}),
    "tp2, sp, packed": (2, {"tp": 2, "sequence_parallel": True, **PACKED}),
    "pp2": (2, {"pp": 2, "batch_size": 2, "padding_free": False}),
    "cp2, packed": (2, {"cp": 2, **PACKED}),
    "cp2, padded": (2, {"cp": 2, "padding_free": False, "batch_size": 2}),
    "dp2, recompute": (2, {"gradient_checkpointing": True}),
    "deterministic": (1, {"deterministic": True}),
    "tp2, cp2, sp, packed": (4, {"tp": 2, "cp": 2, "sequence_parallel": True, **PACKED}),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", tiny.OTHERS)
def test_loss_norm_gradients_and_updates(name: str, tied: bool, pool: RankPool, tmp_path: Path) -> None:
    """Two steps: hidden states, loss, norm, every gradient and every weight; half of the layouts tied, half untied."""
    start = tiny_start(tmp_path, name, tie_word_embeddings=tied), write_rows(tmp_path / "rows.jsonl")
    for number, (layout, (world, options)) in enumerate(LAYOUTS.items()):
        if (number % 2 == 0) == tied or layout == "pp2":
            words = {"gradient_accumulation_steps": 4 // world if world < 4 else 1, "steps": 2, "tp": 1, "pp": 1, **options}
            if "packing" not in options and options.get("batch_size") != 2:
                words["gradient_accumulation_steps"] *= 2
            found = parity(pool, start, tmp_path / str(number), world, **words)
            assert found["problem"] is None, layout
