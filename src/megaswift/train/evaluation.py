"""The validation loss, every --eval_steps and after the last step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from megaswift.data.batches import EvalBatches, MicroBatch
from megaswift.store.faults import fault_point
from megaswift.train.callbacks import Callback, Callbacks
from megaswift.train.objectives import shown
from megaswift.train.setup import to_device

if TYPE_CHECKING:
    from megaswift.launch.watchdog import Watchdog
    from megaswift.train.objectives import Objective
    from megaswift.train.trainer import StepResult, Trainer


class Evaluation(Callback):
    """Evaluates after every `every` steps and after the last, unless a signal cuts it short, and tells the others."""

    def __init__(
        self,
        trainer: Trainer,
        validation: EvalBatches,
        device: torch.device,
        callbacks: Callbacks,
        watchdog: Watchdog,
        *,
        every: int,
        last: int,
        objective: Objective | None = None,
    ) -> None:
        """`objective`: what the rows are judged by, where that is not the trainer's own."""
        self.trainer, self.validation, self.device = trainer, validation, device
        self.callbacks, self.watchdog = callbacks, watchdog
        self.every, self.last, self.objective = every, last, objective

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        if step % self.every and step != self.last:
            return
        fault_point("loop.evaluate")
        cut = False

        def groups() -> Iterator[list[MicroBatch]]:
            nonlocal cut
            for k in range(len(self.validation)):
                if k and self.callbacks.agree().stop:
                    cut = True
                    return
                yield to_device(self.validation.step(k), self.device)
                self.watchdog.beat(f"the evaluation after step {step}")

        loss, weight, sums = self.trainer.evaluated(groups(), self.objective)
        if not cut:
            self.callbacks.evaluated(step, loss, shown(sums, weight))
