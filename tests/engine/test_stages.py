"""Pipelines whose stages have different numbers of layers: the same losses, gradients and weights as one stage, at every change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.models.stages import stage_layers, stage_weights
from megaswift.weights.torch_dist.reader import Reader
from tests import tiny
from tests.ranks import RankPool
from tests.training import Trained, tiny_start, train, write_rows

STEPS = 4


@pytest.mark.parametrize(
    ("layers", "vocab", "pp", "wanted"),
    [
        (4, 131, 2, (2, 2)), (4, 10_000, 4, (1, 1, 1, 1)), (5, 131, 2, (3, 2)), (5, 131, 3, (2, 2, 1)), (30, 131, 4, (7, 8, 8, 7)),
        (30, 10_000, 4, (9, 10, 10, 1)), (5, 10_000, 2, (4, 1)), (3, 131, 3, (1, 1, 1)),
    ],
)  # fmt: skip
def test_layers_are_dealt_out_by_work(layers: int, vocab: int, pp: int, wanted: tuple[int, ...]) -> None:
    """An output layer of 10,000 tokens is worth ten of the layers."""
    assert stage_layers(tiny.tiny_config("llama", num_hidden_layers=layers, vocab_size=vocab), pp) == wanted


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_stages(tied: bool) -> None:
    model = tiny.tiny_model("llama", num_hidden_layers=5, tie_word_embeddings=tied)
    layer = sum(value.numel() for name, value in model.named_parameters() if name.startswith("model.layers.0."))
    table, norm = model.model.embed_tokens.weight.numel(), model.model.norm.weight.numel()
    assert stage_weights(model.config, 3) == [2 * layer + table, 2 * layer, layer + table + norm]
    assert stage_weights(model.config, 1) == [5 * layer + table * (1 if tied else 2) + norm]


def run(pool: RankPool, root: Path, name: str, world: int, **options: Any) -> Trained:
    """Four steps of 12 rows."""
    common = {"dataset": [str(root / "rows.jsonl")], "dataset_test_ratio": 0.1, "gradient_accumulation_steps": 12 // world}
    return train(pool, root / name, world, max_steps=STEPS, save_steps=2, eval_steps=2, **{**common, **options})


def equal(one: Trained, other: Trained, name: str) -> None:
    """Losses, norms, validation losses, and every value of the last checkpoint, moments too."""
    assert other.losses == pytest.approx(one.losses[-len(other.losses) :], rel=1e-5), name
    assert other.norms == pytest.approx(one.norms[-len(other.norms) :], rel=2e-5), name
    assert other.eval_losses[-1] == pytest.approx(one.eval_losses[-1], rel=1e-5), name
    reader, wanted = (Reader(run.directory / f"iter_{STEPS:07d}") for run in (other, one))
    assert sorted(reader.keys) == sorted(wanted.keys)
    for key in wanted.keys:
        if wanted.dtype(key).is_floating_point:
            torch.testing.assert_close(reader.read(key), wanted.read(key), rtol=1e-3, atol=2e-6, msg=f"{name}: {key}")


def test_uneven_stages_train_as_one(pool: RankPool, tmp_path: Path) -> None:
    """Also packed with sequence parallelism, tied embeddings, and a run that goes on with other stages than it was saved with."""
    write_rows(tmp_path / "rows.jsonl")
    start = tiny_start(tmp_path, "qwen3", num_hidden_layers=5, tie_word_embeddings=True)
    one = run(pool, tmp_path, "one", 1, resume_from_checkpoint=str(start))
    equal(
        one, run(pool, tmp_path, "tp2 pp2", 4, resume_from_checkpoint=str(start), tp=2, pp=2, sequence_parallel=True), "tp2 pp2"
    )
    three = run(pool, tmp_path, "pp3", 3, resume_from_checkpoint=str(start), pp=3)
    equal(one, three, "pp3")
    assert json.loads((three.directory / "plan.json").read_text())["stages"] == [2, 2, 1]
    shutil.rmtree(three.directory / f"iter_{STEPS:07d}")
    (three.directory / "latest_checkpointed_iteration.txt").write_text("2")
    equal(one, run(pool, tmp_path, "pp3", 2, resume_from_checkpoint=str(three.directory), pp=2), "pp3 gone on with as pp2")


def test_uneven_stages_from_a_folder(pool: RankPool, tmp_path: Path) -> None:
    """Untied, and the weights come from the Hugging Face folder itself."""
    write_rows(tmp_path / "rows.jsonl")
    tiny_start(tmp_path, num_hidden_layers=3)
    options = {"model_type": "tiny-chat", "model_id_or_path": str(tmp_path / "hf")}
    one = run(pool, tmp_path, "one", 1, **options)
    equal(one, run(pool, tmp_path, "pp2", 2, pp=2, **options), "pp2")
