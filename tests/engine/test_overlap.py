"""`--overlap_grad_reduce true`: gradients are summed over data-parallel ranks during the backward pass, to the same numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.weights.torch_dist.reader import Reader
from tests.ranks import RankPool
from tests.training import Trained, long, run_job, tiny_start, train, write_rows


def in_small_buckets(path: str) -> tuple[int, int]:
    """The loop of one rank whose gradients are reduced in many pieces: how many, and how often one was sent off early."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    from megaswift.train import trainer as step

    groups: set[int] = set()
    early = [0]

    def start(self: Any, *arguments: Any, **options: Any) -> None:
        groups.add(id(self))
        early[0] += len(self.per_param_grad_ready_counts) == len(self.params) and not self.is_first_batch
        start_as_it_is(self, *arguments, **options)

    start_as_it_is = Group.start_grad_sync
    with mock.patch.object(step, "BUCKET_SIZE", 5000), mock.patch.object(Group, "start_grad_sync", start):
        run_job(path)
    return len(groups), early[0]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("overlap")
    return tiny_start(root, dtype="float32"), write_rows(root / "rows.jsonl")


def four_steps(pool: RankPool, start: tuple[Path, Path], output: Path, world: int, **options: Any) -> tuple[Trained, list[Any]]:
    results: list[Any] = []
    run = pool.run

    def noted(*arguments: Any) -> Any:
        results.append(run(*arguments))
        return results[-1]

    common = dict(batch_size=1, gradient_accumulation_steps=2, max_steps=4, save_steps=2)
    with mock.patch("tests.training.run_job", in_small_buckets), mock.patch.object(pool, "run", noted):
        ended = train(
            pool, output, world, resume_from_checkpoint=str(start[0]), dataset=[str(start[1])], **{**common, **options}
        )
    return ended, results[-1]


@pytest.mark.parametrize("layout", [pytest.param({}, marks=long), {"pp": 2}], ids=["dp2", "dp2 pp2"])
def test_the_same_training(layout: dict[str, int], start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """And a checkpoint of one goes on in the other: the optimizer's pieces lie elsewhere, which the saved state does not know."""
    world = 4 if "pp" in layout else 2
    plain, _ = four_steps(pool, start, tmp_path / "plain", world, **layout)
    overlapped, counts = four_steps(pool, start, tmp_path / "run", world, overlap_grad_reduce=True, **layout)
    # The parts of the norm are added in another order, no more.
    assert overlapped.losses == pytest.approx(plain.losses, rel=1e-6)
    assert overlapped.norms == pytest.approx(plain.norms, rel=1e-5)
    one, other = (Reader(run.directory / "iter_0000004") for run in (plain, overlapped))
    for key in one.keys:  # new weights are still under way when a checkpoint begins
        if one.read(key).is_floating_point():
            torch.testing.assert_close(other.read(key), one.read(key), rtol=1e-4, atol=1e-6, msg=key)
    groups, early = counts[0]  # of rank 0; Megatron-Core cuts only the first stage into pieces
    assert groups > 2 and early >= 3 * groups  # in each step but the first

    shutil.rmtree(overlapped.directory / "iter_0000004")
    again, _ = four_steps(pool, start, tmp_path / "run", world, resume=True, **layout)
    assert again.losses == pytest.approx(plain.losses, rel=1e-6)
    shutil.rmtree(plain.directory / "iter_0000004")
    back, _ = four_steps(pool, start, tmp_path / "plain", world, resume=True, overlap_grad_reduce=True, **layout)
    assert back.losses == pytest.approx(plain.losses, rel=1e-6)
