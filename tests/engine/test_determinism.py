"""--deterministic true: bit-equal runs at one layout, nothing left switched on, and a cost that is measured and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.megatron.kernels import embedding
from megaswift.train.determinism import deterministic
from megaswift.weights.torch_dist.reader import Reader
from tests.engine.test_training import options
from tests.ranks import RankPool
from tests.training import Trained, tiny_start, train, write_rows


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("deterministic")
    return tiny_start(root, "qwen2"), write_rows(root / "rows.jsonl")


def weights(run: Trained) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint, optimizer state included."""
    reader = Reader(max(run.directory.glob("iter_*")))
    return {key: reader.read(key) for key in reader.keys}


@pytest.mark.parametrize(
    ("world", "layout", "more"),
    [
        (1, (1, 1, False), dict(batch_size=2, packing=True, max_length=64)),
        (2, (2, 1, True), {}),
        (4, (1, 2, False), dict(dtype="bf16")),
    ],
    ids=["packed", "tp2,sp", "pp2,dp2,bf16"],
)
def test_two_runs_are_equal_bit_by_bit(
    world: int, layout: tuple[int, int, bool], more: dict[str, Any], start: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    """Losses, norms, and every tensor of the last checkpoint."""
    more = (
        dict(deterministic=True, max_steps=4, dataset_test_ratio=0.1, gradient_accumulation_steps=1 if world == 4 else 2) | more
    )
    one, two = (train(pool, tmp_path / name, world, **options(*start, *layout, **more)) for name in ("one", "two"))
    assert one.losses == two.losses and len(one.losses) == 4
    assert one.norms == two.norms
    assert one.eval_losses == two.eval_losses
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() and any(key.startswith("optimizer") for key in first)
    for key, value in first.items():
        assert torch.equal(value.view(torch.uint8), second[key].view(torch.uint8)), key


def test_the_cost_is_measured_and_told(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """It stands in logging.jsonl and in the terminal, and measuring it changes no loss."""
    found = train(pool, tmp_path / "with", 2, **options(*start, 1, 2, deterministic=True, max_steps=3))
    rows = [row for row in found.rows if "deterministic_ms" in row]
    assert len(rows) == 1
    assert 0 < rows[0]["deterministic_ms"] < 1e4 and 0 < rows[0]["not_deterministic_ms"] < 1e4
    plain = train(pool, tmp_path / "without", 2, **options(*start, 1, 2, max_steps=3))
    assert not any("deterministic_ms" in row for row in plain.rows)
    assert found.losses == pytest.approx(plain.losses, rel=1e-6)
    state = pool.run(2, switched_on)
    assert state == [(False, True)] * 2


def switched_on() -> tuple[bool, bool]:
    """Whether this rank still has deterministic operations, and fills new tensors, after its run."""
    return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory


def test_operations_without_a_fixed_order_are_refused() -> None:
    """An operation that has no deterministic form raises inside, and works again outside."""
    target, places = torch.zeros(4), torch.tensor([1, 1])

    def any_order() -> None:
        target.put_(places, torch.ones(2), accumulate=False)

    with deterministic(True), pytest.raises(RuntimeError, match="deterministic"):
        any_order()
    any_order()
    with deterministic(False):
        any_order()


def test_the_embedding_kernel_with_atomic_additions_is_not_used() -> None:
    target, grad, ids = torch.zeros(5, 3), torch.ones(4, 3), torch.tensor([1, 1, 2, 4])
    with (
        mock.patch.object(embedding, "use_triton", return_value=True),
        mock.patch.object(embedding, "_scatter_kernel", {(4,): mock.Mock(side_effect=ZeroDivisionError)}),
    ):
        with pytest.raises(ZeroDivisionError):
            embedding.scatter_add(target, grad, ids, 0)
        with deterministic(True):
            embedding.scatter_add(target, grad, ids, 0)
    assert target[:, 0].tolist() == [0.0, 2.0, 1.0, 0.0, 1.0]


def test_parity_shows_what_it_costs(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """`swift parity --layouts "tp1 deterministic"` times both."""
    from tests.parity.test_parity import parity

    found = parity(pool, start, tmp_path, 1, layouts="tp1 deterministic", steps=3)
    assert found["problem"] is None
    assert set(found["milliseconds"]) == {"tp1", "deterministic"}
    assert all(value > 0 for value in found["milliseconds"].values())
    assert json.dumps(found)
