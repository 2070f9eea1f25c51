"""Adapters on layers of other kinds against PEFT: biases, tensors fused in the folder, norms behind; a part of `make test-families`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests import tiny
from tests.lora import test_layouts
from tests.ranks import RankPool

pytestmark = pytest.mark.skipif("MEGASWIFT_FAMILIES" not in os.environ, reason="a part of make test-families")

MORE: dict[str, dict[str, Any]] = {
    f"{name}, {'DoRA' if dora else 'LoRA'}": {
        "family": name, "tied": True, "lora": {"dora": dora}, "layouts": ("tp1 pp1 dp1", "tp2", "tp2 pp2, sequence parallel", "cp2"),
    }
    for name in tiny.OTHERS for dora in (False, True) if not dora or name in ("phi3", "starcoder2", "glm4")
}  # fmt: skip


@pytest.mark.parametrize("case", MORE)
def test_gradients_are_those_of_peft(case: str, pool: RankPool, tmp_path: Path) -> None:
    with mock.patch.dict(test_layouts.CASES, MORE):
        test_layouts.test_gradients_are_those_of_peft(case, pool, tmp_path)
