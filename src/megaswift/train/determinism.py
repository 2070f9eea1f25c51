"""--deterministic true: only operations that give the same bits in each run, and what they cost here."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megaswift.train.callbacks import Callback
from megaswift.train.setup import to_device

if TYPE_CHECKING:
    from megaswift.data.batches import Batches, MicroBatch
    from megaswift.train.log import RunLog

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATS = 3  # timed forward and backward passes of one micro batch, each way


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside this context torch takes deterministic operations or raises; everything is put back at its end.

    To be entered before the first matrix product on a GPU: cuBLAS reads its workspace's size then, and only with a fixed
    one does it sum in a fixed order.
    """
    if not wanted:
        yield
        return
    switches: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    # Without this torch fills every new tensor, which nothing here reads before it is written.
    filled, switches.fill_uninitialized_memory = switches.fill_uninitialized_memory, False
    workspace = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = filled
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)


class CostOfDeterminism(Callback):
    """Tells, before the first step, what deterministic operations cost here."""

    def __init__(self, trainer: Any, train: Batches, device: torch.device, log: RunLog) -> None:
        self.trainer, self.train, self.device, self.log = trainer, train, device, log

    def begin(self, step: int) -> None:
        self.log.determinism(step, *measure_cost(self.trainer, to_device(self.train.step(step), self.device)))


def measure_cost(trainer: Any, batches: list[MicroBatch]) -> tuple[float, float]:
    """Milliseconds of a forward and backward pass of one micro batch: with deterministic operations, and with any.

    Runs on all ranks at once, before the first step; it leaves nothing but gradients, which every step begins by clearing.
    The two ways take turns, and the fastest pass of each counts.
    """
    config = trainer.bare_model.config
    one = batches[
        : 1 if len(trainer.wrapped) == 1 else config.pipeline_model_parallel_size
    ]  # chunks need so many to take turns
    times: dict[bool, list[float]] = {True: [], False: []}
    try:
        for turn in range(REPEATS + 1):  # the first of each compiles kernels and is not counted
            for strict in (True, False):
                torch.use_deterministic_algorithms(strict)
                config.deterministic_mode = strict
                seconds = _timed(lambda: trainer.gradients(one))
                if turn:
                    times[strict].append(seconds)
    finally:
        torch.use_deterministic_algorithms(True)
        config.deterministic_mode = True
    fastest = torch.tensor([min(times[True]), min(times[False])], device=torch.cuda.current_device())
    dist.all_reduce(fastest, op=dist.ReduceOp.MAX)
    with_it, without = (1e3 * fastest / len(one)).tolist()
    return with_it, without


def _timed(work: Any) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began
