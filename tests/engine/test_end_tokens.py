"""How sure a model is of where answers end: the mean probability of end tokens on validation rows is transformers', at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.data.store import TokenRows
from megaswift.data.tokens import weights_of
from megaswift.run.spec import Run
from tests.ranks import RankPool
from tests.training import tiny_start, train, write_rows

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "packed": (1, {"packing": True}),
    "tp2, sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2": (2, {"batch_size": 2, "padding_free": False}),
}


def expected(run: Run, folder: Path) -> tuple[float, float]:
    """The validation loss and the mean probability of the end tokens with loss, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert run.data.val is not None
    rows, loss, weight, sure = TokenRows.open(Path(run.data.val)), 0.0, 0.0, []
    for sample in (sample for row in range(len(rows)) for sample in rows.samples(row)):
        ids, weights = torch.from_numpy(sample.ids.astype("int64")), torch.from_numpy(weights_of(sample))[1:].double()
        with torch.no_grad():
            said = model(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        loss, weight = loss - float((said * weights).sum()), weight + float(weights.sum())
        sure += [
            float(value.exp()) for value, label, w in zip(said, ids[1:], weights) if w > 0 and int(label) in run.data.end_ids
        ]
    return loss / weight, sum(sure) / len(sure)


def test_it_is_that_of_transformers(pool: RankPool, tmp_path: Path) -> None:
    start, rows, wanted = tiny_start(tmp_path), write_rows(tmp_path / "rows.jsonl"), None
    for name, (world, options) in LAYOUTS.items():
        made = train(
            pool, tmp_path / name.replace(", ", "-"), world, resume_from_checkpoint=str(start), dataset=[str(rows)], max_steps=1,
            learning_rate=1e-12, gradient_accumulation_steps=1, dataset_test_ratio=0.25, **options,
        )  # fmt: skip
        wanted = wanted or expected(Run.read(made.directory / "run.json"), tmp_path / "hf")
        (found,) = [row for row in made.rows if "eval_loss" in row]
        assert found["eval_loss"] == pytest.approx(wanted[0], abs=2e-6), name
        assert found["eval_end_token_probability"] == pytest.approx(wanted[1], rel=1e-4), name
        assert "ends" not in str(found) and not any("end_token_probability" in row for row in made.rows if "loss" in row)
    assert 0 < wanted[1] < 1 / 50 and abs(wanted[1] - torch.tensor(-wanted[0]).exp().item()) > 1e-5
