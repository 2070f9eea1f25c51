"""Families beyond the core: the round trip bit for bit, and a training step at two layouts; the others are for `make test-families`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.engine.test_packed import LAYOUTS
from tests.ranks import RankPool
from tests.steps import Steps

from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader


@pytest.mark.parametrize("name", tiny.OTHERS)
def test_round_trip_and_a_step(name: str, pool: RankPool, tmp_path: Path) -> None:
    """Tied weights on two stages, packed rows; and two tensor-parallel ranks without sequence parallelism, padded ones."""
    steps = Steps(tmp_path, name, samples=16, tie_word_embeddings=True)
    source, reader = HFCheckpoint.open(tmp_path / "hf"), Reader(tmp_path / "start" / "release")
    back = {planned.name: planned.produce() for planned in planned_hf_tensors(reader, steps.config, Precisions(torch.float32))}
    assert set(back) == set(source.names)
    assert all(torch.equal(back[key], source.tensor(key)) for key in back)
    steps.check(pool, "pp2", LAYOUTS["pp2"], ["packed"])
    steps.check(pool, "tp2", LAYOUTS["tp2"], ["padded"])
