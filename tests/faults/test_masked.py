"""Rows without a single label, in one micro batch, on one rank, in a whole step: the loss is finite and the others count as ever."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.run.spec import Run
from megaswift.weights.torch_dist.reader import Reader
from tests.faults.conftest import make_base
from tests.ranks import RankPool
from tests.runs import changed


@pytest.fixture(scope="module")
def job(start: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of one process; its ranks may be more, the global batch stays."""
    root = tmp_path_factory.mktemp("masked")
    made = make_base(start, root, 1, pp=1, eval_steps=100, weight_decay=0.0)
    changed(made, first_step=0).write(root / "run.json")
    return root / "run.json"


def _step(job: str, target: str, pp: int, which: str, left_out: bool) -> dict[str, Any]:
    """One step; some of its micro batches have no label, or are left out. Micro batch k of the step belongs to rank k modulo dp."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.train.checkpoint.save import save
    from megaswift.train.setup import open_batches, restore_trainer

    found = changed(Run.read(Path(job)), pp=pp)
    with ranks.joined(found.parallel, 42) as rank:
        trainer = restore_trainer(found)[0]
        batches = open_batches(found, rank)[0].step(0)
        numbers = range(rank.dp_rank, len(batches) * rank.dp, rank.dp)
        chosen = {"micro batch": {0}, "rank": set(range(1, 99, 2)), "step": set(range(99)), "none": set()}[which]
        result = []
        for number, batch in zip(numbers, batches):
            if number not in chosen:
                result.append(batch)
            elif not left_out:
                result.append(replace(batch, labels=torch.full_like(batch.labels, -100)))
        outcome = trainer.step(result)
        save(Path(target), 1, trainer, only_model=False, extra={}, manifest={})
        return {
            "loss": outcome.loss,
            "norm": outcome.grad_norm,
            "supervised": outcome.metrics["supervised"],
            "bad": outcome.nonfinite,
        }


@pytest.mark.parametrize(("which", "world", "pp"), [("micro batch", 2, 1), ("rank", 2, 1), ("micro batch", 2, 2)], ids=str)
def test_gradients_are_those_without_the_rows(
    which: str, world: int, pp: int, job: Path, pool: RankPool, tmp_path: Path
) -> None:
    [wanted] = pool.run(1, _step, str(job), str(tmp_path / "wanted"), 1, which, True)
    found = pool.run(world, _step, str(job), str(tmp_path / "found"), pp, which, False)
    assert found[0] == found[1]
    assert not found[0]["bad"]
    assert found[0]["supervised"] == wanted["supervised"]
    assert found[0]["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
    assert found[0]["norm"] == pytest.approx(wanted["norm"], rel=1e-5)
    one, two = Reader(tmp_path / "wanted" / "iter_0000001"), Reader(tmp_path / "found" / "iter_0000001")
    moments = [key for key in one.keys if "exp_avg" in key and "exp_avg_sq" not in key]
    assert len(moments) > 5
    for key in moments:  # a tenth of the gradient
        first, second = one.read(key), two.read(key)
        assert float(first.abs().max()) > 0
        torch.testing.assert_close(second, first, atol=1e-7, rtol=1e-4)


def test_a_step_without_any_label(job: Path, pool: RankPool, tmp_path: Path) -> None:
    found = pool.run(2, _step, str(job), str(tmp_path / "found"), 1, "step", False)
    assert found[0] == found[1] == {"loss": 0.0, "norm": 0.0, "supervised": 0, "bad": False}
    after = Reader(tmp_path / "found" / "iter_0000001")
    for key in after.keys:
        value = after.read(key)
        assert not value.is_floating_point() or math.isfinite(float(value.abs().max())), key
