"""Families beyond the core against transformers at every kind of layout, packed and padded: a part of `make test-families`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.engine.test_packed import LAYOUTS
from tests.ranks import RankPool
from tests.steps import FORMS, Steps

pytestmark = pytest.mark.skipif("MEGASWIFT_FAMILIES" not in os.environ, reason="a part of make test-families")

# Beside the layouts: other ways through a layer.
OTHERWISE: dict[str, dict[str, Any]] = {
    "deterministic": {"deterministic": True},
    "recomputed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", tiny.OTHERS)
def test_loss_norm_gradients_and_updates(name: str, tied: bool, pool: RankPool, tmp_path: Path) -> None:
    """A step of 48 samples in rows shared and not: loss, norm, every gradient and every weight after it."""
    steps = Steps(tmp_path, name, tie_word_embeddings=tied)
    for layout, sizes in LAYOUTS.items():
        if tied or layout in ("tp2", "pp2", "tp2 pp2, sequence parallel"):
            steps.check(pool, layout, sizes, list(FORMS))
    for word, options in OTHERWISE.items() if tied else ():
        steps.check(pool, word, LAYOUTS["tp2"], list(FORMS), **options)
