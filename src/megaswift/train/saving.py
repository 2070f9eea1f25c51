"""Checkpoints at step boundaries, in the background with --async_save; their Hugging Face copies; how many are kept."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megaswift.errors import DataError
from megaswift.store.manifest import MANIFEST, ancestry, read_manifest
from megaswift.store.paths import iteration_directory
from megaswift.store.retention import delete_beyond
from megaswift.train.callbacks import Callback, Callbacks, Verdict
from megaswift.train.checkpoint.save import Saving
from megaswift.train.hf_copies import HFCopies
from megaswift.weights.carried import FIELD as CARRIED
from megaswift.weights.hf.folder import read_config

if TYPE_CHECKING:
    from megaswift.launch.watchdog import Watchdog
    from megaswift.megatron.process_groups import Rank
    from megaswift.run.spec import Run
    from megaswift.train.log import RunLog
    from megaswift.train.trainer import Trainer


def saves_after(run: Run, step: int) -> bool:
    """Whether a checkpoint is due after a step: every --save_steps, and at the end."""
    return step % run.saving.save_steps == 0 or step == run.schedule.train_iters


class Checkpoints(Callback):
    """Saves where it is due or the run stops, and finishes what was begun in the background once all ranks have written."""

    def __init__(
        self,
        run: Run,
        rank: Rank,
        trainer: Trainer,
        data_fingerprint: str,
        run_dir: Path,
        log: RunLog,
        watchdog: Watchdog,
        callbacks: Callbacks,
    ) -> None:
        self.run, self.rank, self.trainer, self.run_dir = run, rank, trainer, run_dir
        self.log, self.watchdog, self.callbacks = log, watchdog, callbacks
        self.data_fingerprint = data_fingerprint
        self.origin = _origin(run, run_dir)
        self.saving: Saving | None = None  # the checkpoint that is being written in the background
        self.began, self.waited = 0.0, 0.0  # when it was begun; seconds that training waited for it
        self.eval_loss: tuple[int, float] | None = None  # step and loss of the last evaluation
        self.copies = HFCopies(run_dir, active=run.saving.hf_copies and rank.is_first)

    def evaluated(self, step: int, loss: float, metrics: dict[str, float]) -> None:
        self.eval_loss = (step, loss)

    def asks(self) -> Verdict:
        return Verdict(busy=self.saving is not None and not self.saving.written)

    def boundary(self, step: int, verdict: Verdict) -> None:
        """Raises DataError, on all ranks alike."""
        due = saves_after(self.run, step)
        if verdict.stop:
            self.copies.stop()  # whoever asked does not wait for it
        if not verdict.busy or due or verdict.stop:
            self.finish(copy=not verdict.stop)
        if due or verdict.stop:
            self._save(step, wait=verdict.stop or step == self.run.schedule.train_iters)

    def end(self) -> None:
        self.copies.stop()

    def finish(self, copy: bool = False) -> None:
        """Publish the checkpoint on its way, if there is one, and delete those beyond --save_total_limit once it is safe.

        With `copy` its Hugging Face copy begins, where these are wanted; that of the last step is made, and proven, when the
        ranks are gone.
        """
        if self.saving is None:
            return
        begun, saving, self.saving = time.perf_counter(), self.saving, None
        self.watchdog.long(f"saving after step {saving.iteration}")
        target = saving.finish()
        problem: list[str] = [""]
        if self.rank.is_first:
            copied = self.copies.wait()  # before its checkpoint may be deleted
            if copied:
                self.log.note(copied)
            try:
                delete_beyond(self.run_dir, self.run.saving.total_limit, saving.iteration)
            except OSError as error:
                problem = [f"an old checkpoint could not be deleted: {error}"]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise DataError(
                problem[0], where=str(self.run_dir), fix="the newest checkpoint is safe; delete the old one yourself"
            )
        ended = time.perf_counter()
        self.waited += ended - begun
        self.callbacks.saved(saving.iteration, target, ended - self.began, self.waited)
        if copy:
            self.copies.begin(saving.iteration)
        self.watchdog.beat(f"step {saving.iteration + 1}")

    def _save(self, step: int, wait: bool) -> None:
        """Begin a checkpoint; it is finished here, or with --async_save at a later boundary."""
        self.watchdog.long(f"saving after step {step}")
        self.began = time.perf_counter()
        extra = {
            "consumed_samples": step * self.run.batch.global_batch_size,
            "data_fingerprint": self.data_fingerprint,
            "seed": self.run.seed,
        }
        manifest = {
            "model_type": self.run.model.model_type,
            "dtype": self.run.precision.dtype,
            "layout": self.run.parallel.layout,
            "resume": extra | {"global_batch": self.run.batch.global_batch_size, "train_iters": self.run.schedule.train_iters},
            "eval_loss": self.eval_loss[1]
            if self.eval_loss and self.eval_loss[0] == step and math.isfinite(self.eval_loss[1])
            else None,
            **self.origin,
        }
        self.saving = Saving(
            self.run_dir,
            step,
            self.trainer,
            only_model=self.run.saving.only_model,
            extra=extra | self.callbacks.state(),
            manifest=manifest,
            needed=self.run.saving.checkpoint_bytes,
            background=self.run.saving.in_background and not wait,
        )
        self.waited = time.perf_counter() - self.began
        if wait or not self.run.saving.in_background:
            self.finish(copy=not wait)
        self.watchdog.beat(f"step {step + 1}")


def _origin(run: Run, run_dir: Path) -> dict[str, Any]:
    """What the run's checkpoints are made from: the config, and the chain of manifests or the Hugging Face folder that has none.

    Read once, when the weights are: later the start may be gone (--save_total_limit deletes it), moved, or made anew.
    """
    start = Path(run.model.checkpoint)
    found: dict[str, Any] = {"config": read_config(Path(run.model.directory))}
    found |= {"other_dtypes": run.model.other_dtypes} if run.model.other_dtypes else {}
    found |= {CARRIED: run.model.carried} if run.model.carried else {}
    method = run.method
    found |= {"adapter": method.adapter.record(), "base": method.base} if method.adapter is not None else {}
    found |= {"frozen": list(method.frozen)} if method.frozen else {}
    found |= {"new_head": True} if run.model.new_head else {}
    found |= {"objective": asdict(run.objective)} if run.objective.kind != "supervised" else {}
    own = (
        read_manifest(start) if run.schedule.first_step else {"rows_before": run.model.rows_before}
    )  # of this run's own checkpoint
    found |= {name: own[name] for name in ("rows_before", "source", "new_head") if own.get(name)}
    if not (start / MANIFEST).exists():
        return {"source": {"origin": str(start)}, **found, "made_from": []}
    return found | {
        "made_from": ancestry(start, iteration_directory(run_dir, 0))
    }  # relative, and all checkpoints are neighbours
