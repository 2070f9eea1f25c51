"""Callbacks: their order, what ranks agree to, and the moments of a real run as one that was added sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.train.callbacks import Callback, Callbacks, Verdict
from tests.ranks import RankPool
from tests.training import tiny_start, write_rows, written_job


class Noted(Callback):
    """Writes down what it is told."""

    def __init__(self, moments: list[Any]) -> None:
        self.moments = moments

    def begin(self, step: int) -> None:
        self.moments.append(["begin", step])

    def step(self, step: int, result: Any, seconds: float) -> None:
        self.moments.append(["step", step])

    def evaluated(self, step: int, loss: float, metrics: dict[str, float]) -> None:
        self.moments.append(["evaluated", step])

    def saved(self, step: int, directory: Path, seconds: float, waited: float) -> None:
        self.moments.append(["saved", step, directory.name])

    def boundary(self, step: int, verdict: Verdict) -> None:
        self.moments.append(["boundary", step, verdict.stop])

    def asks(self) -> Verdict:
        return Verdict(stop=["step", 3] in self.moments)

    def state(self) -> dict[str, Any]:
        return {"noted": len(self.moments)}

    def end(self) -> None:
        self.moments.append(["end"])


def test_all_end_whatever_happens() -> None:
    moments: list[Any] = []

    class Broken(Noted):
        def end(self) -> None:
            super().end()
            raise OSError("no end")

    with pytest.raises(OSError, match="no end"), Callbacks(torch.device("cpu")) as callbacks:
        callbacks.add(Noted(moments))
        callbacks.add(Broken(moments))
        callbacks.begin(7)
    assert moments == [["begin", 7], ["begin", 7], ["end"], ["end"]]


def moments_of_a_run(path: str) -> list[Any]:
    """On one rank: the moments of a run that one more callback, on the last rank, asks to stop after three steps."""
    import os

    from megaswift.errors import Stopped
    from megaswift.run.spec import Run
    from megaswift.train.loop import Training, train

    moments: list[Any] = []
    attend = Training.attend

    def with_mine(self: Training, *args: Any) -> None:
        attend(self, *args)
        mine = self.callbacks.add(Noted(moments))
        if os.environ["RANK"] == "0":
            mine.asks = Verdict  # type: ignore[method-assign]

    with mock.patch.object(Training, "attend", with_mine), pytest.raises(Stopped, match="after step 3"):
        train(Run.read(Path(path)))
    return moments


def test_the_moments_of_a_run(pool: RankPool, tmp_path: Path) -> None:
    """Both ranks see the same, stop where one asks for it, and the checkpoint keeps the state."""
    made = written_job(
        2, resume_from_checkpoint=str(tiny_start(tmp_path)), dataset=[str(write_rows(tmp_path / "rows.jsonl"))], max_length=128,
        max_steps=6, save_steps=2, eval_steps=2, dataset_test_ratio=0.2, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    first, second = pool.run(2, moments_of_a_run, str(made))
    assert first == second == [
        ["begin", 0],
        ["step", 1],
        ["boundary", 1, False],
        ["evaluated", 2],
        ["step", 2],
        ["saved", 2, "iter_0000002"],
        ["boundary", 2, False],
        ["step", 3],
        ["saved", 3, "iter_0000003"],
        ["boundary", 3, True],
        ["end"],
    ]  # fmt: skip
    common = torch.load(made.parent / "iter_0000003" / "common.pt", weights_only=True)["megaswift"]
    assert common["noted"] == 8 and "norms" in common
    assert json.loads((made.parent / "iter_0000002" / "manifest.json").read_text())["eval_loss"] is not None
