"""`swift parity --sft_type lora` holds beside PEFT, and names what is wrong with an adapter that is wrong on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megaswift.errors import DataError
from tests.parity.test_parity import parity
from tests.ranks import RankPool
from tests.training import tiny_start, write_rows

LORA: dict[str, Any] = {"sft_type": "lora", "lora_rank": 4, "lora_dropout": 0.2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("parity")
    return tiny_start(root, "qwen2"), write_rows(root / "rows.jsonl")


def test_the_engine_is_peft(pool: RankPool, start: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"tp": 2, "sequence_parallel": True, "packing": True, "max_length": 48, "use_rslora": True}
    found = parity(pool, start, tmp_path, 2, **LORA, **options)
    assert found["problem"] is None and len(found["reference"]) == 3
    assert set(found["reference"][0]["gradient_groups"]) == {"attention", "mlp"}
    assert ".lora_" in found["reference"][0]["worst_gradient"][1]


def test_experts_are_those_of_peft(pool: RankPool, tmp_path: Path) -> None:
    """Adapters on experts, which PEFT holds in one tensor, and on a shared expert, which has dropout by itself alone."""
    start = tiny_start(tmp_path, "qwen2_moe"), write_rows(tmp_path / "rows.jsonl")
    common = {"tp": 2, "ep": 2, "sequence_parallel": True, "use_rslora": True}
    routed = {"target_modules": ["all-linear", "all-experts", "all-router"], "lora_dropout": 0.0}
    for number, options in enumerate((routed, {})):
        found = parity(pool, start, tmp_path / f"{number}", 2, **{**LORA, **common, **options})
        assert found["problem"] is None and len(found["reference"]) == 3


def test_a_wrong_adapter_is_named(pool: RankPool, start: tuple[Path, Path], tmp_path: Path) -> None:
    """The reference scales by alpha / r where the run was told alpha / sqrt(r)."""
    from megaswift.parity.adapters import PeftSide

    honest = PeftSide.of

    def plain(run: Any) -> Any:
        side = honest(run)
        object.__setattr__(side.lora, "rslora", False)
        return side

    with (
        mock.patch.object(PeftSide, "of", plain),
        pytest.raises(DataError, match=r"step 1: the hidden states after model.layers.0"),
    ):
        parity(pool, start, tmp_path, 1, **LORA, use_rslora=True)
