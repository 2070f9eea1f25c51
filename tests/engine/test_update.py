"""One update and one evaluation as arithmetic: what clipping leaves of a gradient, in each precision, and what is averaged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megaswift.run.spec import Parallel
from tests.ranks import RankPool
from tests.runs import changed
from tests.training import tiny_start, write_rows, written_job

NORMS = (0.1, 10.0)  # below and above --max_grad_norm, which is 1


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("update")
    more = dict(
        dataset=[str(write_rows(root / "rows.jsonl"))],
        dataset_test_ratio=0.2,
        max_steps=2,
        output_dir=str(root / "out"),
        max_grad_norm=1.0,
    )
    start = tiny_start(root, num_hidden_layers=2)
    return str(
        written_job(1, resume_from_checkpoint=str(start), max_length=128, batch_size=2, gradient_accumulation_steps=2, **more)
    )


def trainer_of(path: str, dtype: str, rank: Any) -> Any:
    """A trainer, its training batches and its validation batches, in the process of its only rank."""
    from megaswift.run.spec import Run
    from megaswift.train.setup import open_batches, restore_trainer

    job = changed(Run.read(Path(path)), dtype=dtype)
    return restore_trainer(job)[0], *open_batches(job, rank)


def first_moments(path: str, dtype: str) -> list[tuple[float, float]]:
    """On one rank: (norm as reported, norm of the first moments) after a first step whose gradient was given a norm."""
    import torch

    from megaswift.megatron import process_groups as ranks

    found = []
    with ranks.joined(Parallel(), 42) as rank:
        for wanted in NORMS:
            trainer, train, _ = trainer_of(path, dtype, rank)
            sums = trainer.gradients(train.step(0))
            buffers = [weight.main_grad for weight in trainer.bare_model.parameters()]
            scale = trainer.gradient_divisor(sums) * (trainer._loss_scale() or 1.0)
            norm = math.sqrt(sum(float(buffer.double().square().sum()) for buffer in buffers)) / scale
            for buffer in buffers:
                buffer.mul_(wanted / norm)
            result = trainer.update(sums)
            states = [state for part in trainer.optimizer.chained_optimizers for state in part.optimizer.state.values()]
            moments = torch.cat([state["exp_avg"].double().reshape(-1) for state in states])
            found.append((result.grad_norm, float(moments.norm())))
            trainer.close()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_gradient_is_clipped_before_the_update_and_only_where_it_is_too_long(dtype: str, job: str, pool: RankPool) -> None:
    """The first moment is 0.1 x the clipped gradient; the weights would hide it, because Adam's update has no scale."""
    for wanted, (norm, moment) in zip(NORMS, pool.run(1, first_moments, job, dtype)[0], strict=True):
        assert norm == pytest.approx(wanted, rel=1e-5), "the norm is told from before clipping"
        assert moment == pytest.approx(0.1 * min(wanted, 1.0), rel=1e-5)


def evaluations(path: str) -> tuple[list[tuple[float, int]], float]:
    """On one rank: loss and supervised tokens of each validation step alone, and the loss of all."""
    from megaswift.megatron import process_groups as ranks

    with ranks.joined(Parallel(), 42) as rank:
        trainer, _, validation = trainer_of(path, "fp32", rank)
        groups = [validation.step(k) for k in range(len(validation))]
        alone = [
            (trainer.evaluate(iter([group])), sum(int((batch.labels != -100).sum()) for batch in group)) for group in groups
        ]
        whole = trainer.evaluate(iter(groups))
        trainer.close()
    return alone, whole


def test_the_validation_loss_is_a_mean_over_tokens(job: str, pool: RankPool) -> None:
    """Not over steps: the last one has fewer rows, and rows have fewer tokens than others."""
    alone, whole = pool.run(1, evaluations, job)[0]
    assert len(alone) > 1
    tokens = sum(count for _, count in alone)
    mean = sum(loss * count for loss, count in alone) / tokens
    assert whole == pytest.approx(mean, rel=1e-6)
    assert abs(sum(loss for loss, _ in alone) / len(alone) - mean) > 1e-5 * mean, "the two means must differ for this to tell"
