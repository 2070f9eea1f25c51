"""Random states go back to a device of the kind that they came from, and to no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaswift.checkpoint.load import _restore_random_state
from megaswift.checkpoint.save import _random_state
from tests.ranks import RankPool

SIZES = {"cuda": 16, "cpu": 5056}


@pytest.mark.parametrize("here", ["cuda", "cpu"])
@pytest.mark.parametrize("saved", ["cuda", "cpu"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "old"])
def test_a_run_that_changes_its_device(here: str, saved: str, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses a state of another size: such a run draws its numbers from the seed."""
    from megatron.core.tensor_parallel import random

    taken: list[int] = []

    def take(state: torch.Tensor) -> None:
        if state.numel() != SIZES[here]:
            raise RuntimeError("RNG state is wrong size")
        taken.append(state.numel())

    class Tracker:
        def set_states(self, states: dict[str, Any]) -> None:
            for state in states.values():
                take(state)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: here == "cuda")
    monkeypatch.setattr(torch.cuda, "set_rng_state", take)
    monkeypatch.setattr(random, "get_cuda_rng_tracker", Tracker)
    torch.manual_seed(7)
    state = torch.zeros(SIZES[saved], dtype=torch.uint8)
    states = {"torch": torch.get_rng_state(), "device": state, "tracker": {"model-parallel-rng": state}}
    want = torch.rand(3)
    _restore_random_state(states | ({"device_type": saved} if named else {}))
    assert torch.equal(torch.rand(3), want), "the host's own state is everywhere the same"
    assert taken == ([SIZES[here]] * 2 if here == saved else [])


def test_the_device_is_saved(pool: RankPool) -> None:
    assert pool.run(1, saved_device) == ["cuda" if torch.cuda.is_available() else "cpu"]


def saved_device() -> str:
    from megaswift.engine import ranks

    with ranks.joined(1, 1, 42):
        return str(_random_state().data["device_type"])
