"""`--recompute_modules`, `--gradient_checkpointing`: parts of layers, or all of them, are computed again, to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megaswift.errors import UserError
from tests.ranks import RankPool
from tests.runs import resolved_run
from tests.training import Trained, run_job, tiny_start, train, write_rows


def products_again(path: str) -> int:
    """The loop of one rank; how many first products were computed a second time."""
    from megaswift.megatron.kernels import swiglu_linear as module

    count = 0

    class Counted(module.FirstProduct):
        def __init__(self, *arguments: Any) -> None:
            nonlocal count
            count += 1
            super().__init__(*arguments)

    with mock.patch("megaswift.megatron.kernels.megatron_layer.FirstProduct", Counted):
        run_job(path)
    return count


def layers_passed(path: str) -> int:
    """The loop of one rank; how often a layer's MLP was gone through forward."""
    from megaswift.megatron.kernels.megatron_layer import FusedMLP

    count, plain = 0, FusedMLP.forward_and_add

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        return plain(self, *arguments)

    with mock.patch.object(FusedMLP, "forward_and_add", counted):
        run_job(path)
    return count


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("recompute")
    return tiny_start(root, dtype="float32"), write_rows(root / "rows.jsonl")


def three_steps(
    pool: RankPool, start: tuple[Path, Path], output: Path, world: int, counted: Any = products_again, **options: Any
) -> tuple[Trained, int]:
    """A run, and what its first rank counted."""
    counts: list[int] = []
    run = pool.run

    def noted(*arguments: Any) -> Any:
        counts.extend(run(*arguments))
        return counts

    common = dict(batch_size=2, gradient_accumulation_steps=2, max_steps=3, dataset_test_ratio=0.0)
    with mock.patch("tests.training.run_job", counted), mock.patch.object(pool, "run", noted):
        ended = train(pool, output, world, resume_from_checkpoint=str(start[0]), dataset=[str(start[1])], **common, **options)
    return ended, counts[0]


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}], ids=["tp1", "tp2 sp"])
def test_the_same_bits(layout: dict[str, Any], start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    world = layout.get("tp", 1)
    plain, none = three_steps(pool, start, tmp_path / "plain", world, **layout)
    again, some = three_steps(pool, start, tmp_path / "again", world, recompute_modules="mlp", **layout)
    assert none == 0 and some == 3 * (2 * world) * 4  # steps, micro batches, layers
    assert again.losses == plain.losses and again.norms == plain.norms


@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=["tp1", "pp2"])
def test_whole_layers_run_again(layout: dict[str, Any], start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """With --gradient_checkpointing true every layer runs twice for each micro batch, without it once."""
    world = layout.get("pp", 1)
    passes = 3 * (2 * world) * (4 // world)  # steps, micro batches, layers of a stage
    plain, once = three_steps(pool, start, tmp_path / "plain", world, layers_passed, **layout)
    again, twice = three_steps(pool, start, tmp_path / "again", world, layers_passed, gradient_checkpointing=True, **layout)
    assert (once, twice) == (passes, 2 * passes)
    assert again.losses == plain.losses and again.norms == plain.norms


def products_made(path: str) -> int:
    """The loop of one rank; how many second products were computed."""
    from megaswift.megatron.kernels.linear_ops import LinearOps

    count, plain = 0, LinearOps.swiglu_forward

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return plain(self, *arguments, **options)

    with mock.patch.object(LinearOps, "swiglu_forward", counted):
        run_job(path)
    return count


def test_a_result_that_nobody_reads_is_not_computed_again(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """The layer's last product only makes the layer's result, which is there already."""
    plain, once = three_steps(pool, start, tmp_path / "plain", 1, products_made)
    again, still = three_steps(pool, start, tmp_path / "again", 1, products_made, gradient_checkpointing=True)
    assert once == still == 3 * 2 * 4
    assert again.losses == plain.losses and again.norms == plain.norms


def test_whole_layers_and_parts_exclude_each_other() -> None:
    with pytest.raises(UserError, match="recomputes whole layers, --recompute_modules mlp parts of them"):
        resolved_run(gradient_checkpointing=True, recompute_modules="mlp")
