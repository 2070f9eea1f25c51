"""Random states go back to a device of the kind that they came from, and to no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.run.spec import Parallel
from megaswift.train.checkpoint.load import _restore_random_state
from megaswift.train.checkpoint.save import _random_state
from tests.ranks import RankPool
from tests.training import tiny_start, write_rows, written_job

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
    from megaswift.megatron import process_groups as ranks

    with ranks.joined(Parallel(), 42):
        return str(_random_state().data["device_type"])


def drawn(path: str, target: str) -> list[bool]:
    """On one rank: whether all generators are the save's again after a load at another layout, and at the same one."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megaswift.megatron import process_groups as ranks
    from megaswift.run.spec import Run
    from megaswift.train.checkpoint.load import load_training_state
    from megaswift.train.checkpoint.save import save
    from megaswift.train.setup import restore_trainer

    job = Run.read(Path(path))
    layout, found = job.parallel.layout, []

    def states() -> list[Any]:
        return [torch.get_rng_state(), torch.cuda.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]

    with ranks.joined(job.parallel, job.seed) as rank:
        trainer = restore_trainer(job)[0]
        torch.manual_seed(1000 + rank.rank)  # each stage has its own
        before = [state.clone() for state in states()]
        save(Path(target), 1, trainer, only_model=False, extra={}, manifest={"layout": layout})
        for other in ({**layout, "dp": 7}, layout):
            torch.rand(5)
            torch.cuda.set_rng_state(torch.get_rng_state())
            load_training_state(trainer, Path(target, "iter_0000001"), layout=other)
            found.append(all(torch.equal(a, b) for a, b in zip(states(), before, strict=True)))
        trainer.close()
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU torch.cuda's generator is the host's, as it is taken here")
def test_they_are_those_of_the_save_again(pool: RankPool, tmp_path: Path) -> None:
    """On every stage at the same layout; another layout has others, and takes none."""
    start, rows = tiny_start(tmp_path, num_hidden_layers=2), write_rows(tmp_path / "rows.jsonl")
    more = dict(dataset=[str(rows)], output_dir=str(tmp_path / "out"), max_steps=2, max_length=128, pp=2)
    job = written_job(2, resume_from_checkpoint=str(start), **more)
    assert pool.run(2, drawn, str(job), str(tmp_path / "saved")) == [[False, True], [False, True]]
