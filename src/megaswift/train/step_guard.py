"""Steps whose numbers are not finite or far off: no update is made, and where there are too many the run ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.data.batches import Batches
from megaswift.errors import NonFiniteError
from megaswift.run.spec import Guards
from megaswift.train.callbacks import Callback
from megaswift.train.spikes import NormHistory

if TYPE_CHECKING:
    from megaswift.train.log import RunLog
    from megaswift.train.trainer import StepResult, Trainer


class StepGuard(Callback):
    """Says which gradient norm is a spike, counts the steps without an update, and notes which rows they saw.

    Args:
        extra: what an earlier part of the run left (`state`).
        before_the_end: called before the run ends because of a step, so that a checkpoint on its way is not lost.
        active: whether this rank writes the files.
    """

    def __init__(
        self,
        guards: Guards,
        trainer: Trainer,
        train: Batches,
        run_dir: Path,
        log: RunLog,
        extra: dict[str, Any],
        *,
        last: int,
        before_the_end: Callable[[], None],
        active: bool,
    ) -> None:
        self.guards, self.trainer, self.train, self.run_dir, self.log = guards, trainer, train, run_dir, log
        self.last, self.before_the_end, self.active = last, before_the_end, active
        self.norms = NormHistory(guards.skip_spikes, extra.get("norms", ()))
        self.skipped = int(extra.get("skipped", 0))

    def state(self) -> dict[str, Any]:
        return {"norms": self.norms.values, "skipped": self.skipped}

    def begin(self, step: int) -> None:
        self.trainer.norm_limit = self.norms.limit

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        """Raises NonFiniteError, on all ranks alike."""
        if result.nonfinite or result.spike:
            self._without_update(step, result)
        elif result.skipped:
            self.log.note(
                f"step {step}/{self.last}  gradients overflowed in fp16: no update; the loss scale is now {result.loss_scale:g}"
            )
        elif result.grad_norm is not None:
            self.norms.add(result.grad_norm)
        self.trainer.norm_limit = self.norms.limit

    def _without_update(self, step: int, result: StepResult) -> None:
        path = self.run_dir / f"{'nonfinite' if result.nonfinite else 'spike'}_step_{step}.json"
        if self.active:
            rows = [int(row) for row in self.train.sample_ids(step - 1)]
            path.write_text(
                json.dumps({"step": step, "loss": result.loss, "grad_norm": result.grad_norm, "rows": rows}, default=str),
                encoding="utf-8",
            )
        what = f"loss {result.loss:.4g} and gradient norm {result.grad_norm:.4g} at step {step} "
        what += "are not both finite" if result.nonfinite else f"are a spike: the norm is above {self.trainer.norm_limit:.4g}"
        self.skipped += 1
        many = self.skipped > self.guards.max_skipped_steps
        if (result.nonfinite and self.guards.nonfinite == "stop") or many:
            self.before_the_end()
            more = f"; more than --max_skipped_steps {self.guards.max_skipped_steps} were skipped" if many else ""
            raise NonFiniteError(
                f"{what}; the weights were not touched{more}.",
                where=f"the rows of this step are listed in {path}",
                fix="look at these rows, lower --learning_rate, or use --dtype bf16 in place of fp16",
            )
        self.log.note(
            f"step {step}/{self.last}  {what}: skipped ({self.skipped} of at most {self.guards.max_skipped_steps}), rows in {path.name}"
        )
