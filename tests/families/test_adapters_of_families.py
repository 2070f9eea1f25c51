"""Adapters on layers of other kinds against PEFT: biases, tensors fused in the folder, norms behind; a part of `make test-families`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests import tiny
from tests.lora import test_layouts
from tests.lora.test_parity_command import LORA, parity
from tests.ranks import RankPool
from tests.training import tiny_start, write_rows

pytestmark = pytest.mark.skipif("MEGASWIFT_FAMILIES" not in os.environ, reason="a part of make test-families")

MORE: dict[str, dict[str, Any]] = {
    f"{name}, {'DoRA' if dora else 'LoRA'}": {
        "family": name, "tied": True, "lora": {"dora": dora}, "layouts": ("tp1 pp1 dp1", "tp2", "tp2 pp2, sequence parallel", "cp2"),
    }
    for name in tiny.OTHERS for dora in (False, True) if not dora or name in ("phi3", "starcoder2", "glm4", "deepseek_v3")
}  # fmt: skip
MORE["deepseek_v3, base in 4 bits, scales in 8"] = {
    "family": "deepseek_v3", "tied": False, "lora": {"bits": 4, "double": True}, "layouts": ("tp2", "tp2 pp2, sequence parallel"),
    "sizes": {  # rows of whole blocks of 64
        "hidden_size": 128, "intermediate_size": 128, "q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 16, "moe_intermediate_size": 128,
    },
}  # fmt: skip

# Bases held in 4 bits: rows of whole blocks of 64.
MORE |= {
    f"{name}, base in 4 bits": {
        "family": name, "tied": True, "lora": {"bits": 4}, "layouts": ("tp1 pp1 dp1", "tp2 pp2, sequence parallel"),
        "sizes": {"hidden_size": 128, "intermediate_size": 128, **sizes},
    }
    # A clamp that hardly a value meets: at its edge a rounding turns a gradient off.
    for name, sizes in (("qwen3_5_text", {"linear_value_head_dim": 16}), ("gpt_oss", {"swiglu_limit": 3.0}))
}  # fmt: skip


@pytest.mark.parametrize("case", MORE)
def test_gradients_are_those_of_peft(case: str, pool: RankPool, tmp_path: Path) -> None:
    with mock.patch.dict(test_layouts.CASES, MORE):
        test_layouts.test_gradients_are_those_of_peft(case, pool, tmp_path)


@pytest.mark.parametrize("name", [name for name in tiny.OTHERS if name not in tiny.dense_families()])
def test_parity_holds_for_experts(name: str, pool: RankPool, tmp_path: Path) -> None:
    """`swift parity` of all weights, and of adapters on every product, expert and router; where experts are shared out and cut."""
    start = tiny_start(tmp_path, name), write_rows(tmp_path / "rows.jsonl")
    adapters = {"target_modules": ["all-linear", "all-experts", "all-router"], "lora_dropout": 0.0}
    # Few tokens reach some experts of the whole model: Adam makes a step of the rounding of their gradients.
    steady = {"adam_epsilon": 1e-5} if name == "qwen3_5_moe" else {}
    for number, options in enumerate(({}, LORA | adapters | steady)):
        found = parity(pool, start, tmp_path / f"{number}", 2, **{"tp": 2, "ep": 2, "sequence_parallel": True, **options})
        assert found["problem"] is None and len(found["reference"]) == 3


@pytest.mark.parametrize("sp", [True, False], ids=["sp", "tp alone"])
def test_dropout_of_products_that_every_rank_makes_whole(sp: bool, pool: RankPool, tmp_path: Path) -> None:
    """Latent attention's first products see their own tokens alone under sequence parallelism, and drop what PEFT drops."""
    start = tiny_start(tmp_path, "deepseek_v3"), write_rows(tmp_path / "rows.jsonl")
    words = {"target_modules": [r".*\.self_attn\..*"], "packing": True, "max_length": 64}
    found = parity(pool, start, tmp_path / "out", 2, **LORA, **words, tp=2, sequence_parallel=sp)
    assert found["problem"] is None and len(found["reference"]) == 3
