"""Adapters in half precisions, with 8-bit moments, DoRA and 4 bits: a few steps, an export that PEFT confirms, a merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments
from megaswift.store.manifest import read_manifest
from tests.ranks import RankPool
from tests.training import tiny_start, train, write_rows

FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "bf16, DoRA, tp2": (2, {"dtype": "bf16", "use_dora": True, "lora_dropout": 0.0, "tp": 2}),
    "bf16, 4 bits, some modules, recomputed": (
        1, {"dtype": "bf16", "quantization_bit": 4, "target_modules": ["q_proj", "down_proj"], "gradient_checkpointing": True}
    ),
    "fp16": (1, {"dtype": "fp16"}),
    "8-bit moments, from the folder itself": (1, {"optim": "adamw_8bit", "folder": True}),
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    write_rows(root / "rows.jsonl")
    return tiny_start(root, "qwen2", tie_word_embeddings=True, hidden_size=128, intermediate_size=128)


@pytest.mark.parametrize("form", FORMS)
def test_it_learns_and_is_exported(form: str, start: Path, pool: RankPool, tmp_path: Path) -> None:
    world, options = FORMS[form]
    origin = {"resume_from_checkpoint": str(start)}
    if options.get("folder"):
        origin = {"model_id_or_path": str(start.parent / "hf"), "model_type": "tiny-chat"}
    run = train(
        pool, tmp_path / "out", world, **origin, dataset=[str(start.parent / "rows.jsonl")], sft_type="lora", learning_rate=2e-2,
        max_steps=6, gradient_accumulation_steps=8 // world, dataset_test_ratio=0.0, **{k: v for k, v in options.items() if k != "folder"},
    )  # fmt: skip
    assert run.losses[-1] < run.losses[0] - 0.2
    adapter = export_main(ExportArguments(ckpt_dir=str(run.directory), to_hf=True))
    assert read_manifest(adapter)["serves"]["peft"] == "loaded and compared"
    assert json.loads((adapter / "adapter_config.json").read_text())["use_dora"] == bool(options.get("use_dora"))
    merged = export_main(ExportArguments(ckpt_dir=str(run.directory), to_hf=True, merge_lora=True))
    assert read_manifest(merged)["merged"]["rounding"]["lost"] < 1e-3
