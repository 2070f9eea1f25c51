"""The training loop of one rank: load, step, evaluate, save, log. `swift sft` starts it on every rank.

python -m megaswift.train.loop run.json      (what torchrun runs; swift sft writes the file)
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megaswift.data.batches import Batches, EvalBatches, prefetch
from megaswift.errors import Stopped
from megaswift.launch import agent
from megaswift.launch.signals import StopSignals
from megaswift.launch.watchdog import Watchdog
from megaswift.megatron import process_groups
from megaswift.run.spec import Run
from megaswift.store.faults import fault_point
from megaswift.train.callbacks import Callbacks, GraphNotes, Heartbeat, StopOnSignal
from megaswift.train.determinism import CostOfDeterminism, deterministic
from megaswift.train.evaluation import Evaluation
from megaswift.train.log import RunLog
from megaswift.train.objectives import EvaluatedTokens
from megaswift.train.saving import Checkpoints, saves_after
from megaswift.train.setup import open_batches, restore_trainer, to_device
from megaswift.train.step_guard import StepGuard

if TYPE_CHECKING:
    from megaswift.megatron.model import ChatModel, Chunks
    from megaswift.train.trainer import Trainer


def train(run: Run) -> None:
    """Train as the run says, as one rank. Raises MegaswiftError; all ranks raise alike."""
    limits = (run.guards.start_timeout_s, run.guards.step_timeout_s)
    # The watchdog ends a rank that stands still, and leaves its stacks; the limit of the process groups is only the last resort.
    with (
        StopSignals(agent.stop_file()) as signals,
        deterministic(run.precision.deterministic),
        process_groups.joined(run.parallel, run.seed, start_timeout_s=max(limits) + 60) as rank,
    ):
        run_dir = _agreed_run_dir(run)
        with Watchdog(run_dir, rank.rank, *limits) as watchdog:
            batches, validation = open_batches(run, rank)
            loaded = partial(_attach_reference, run, run_dir, batches, validation, rank, watchdog, signals)
            trainer, extra = restore_trainer(run, loaded if run.objective.needs_reference else None)
            with (
                closing(trainer),
                closing(RunLog(run_dir, run, rank.is_first, rank.on_gpu)) as log,
                Callbacks(rank.device) as callbacks,
            ):
                if rank.on_gpu:
                    packed = run.batch.padding_free or run.batch.packing
                    log.note(f"attention: {trainer.chunks[0].attention_kernel(packed)}")
                training = Training(run, rank, run_dir, trainer, batches, callbacks, signals)
                training.attend(log, watchdog, validation, extra)
                training.run()


def _attach_reference(
    run: Run,
    run_dir: Path,
    batches: Batches,
    validation: EvalBatches | None,
    rank: process_groups.Rank,
    watchdog: Watchdog,
    signals: StopSignals,
    model: ChatModel | Chunks,
) -> None:
    """What the model says of all answers before it is trained. Raises Stopped, on all ranks alike, where a signal asks for it."""
    from megaswift.train.reference import attach

    def beat(what: str) -> None:
        watchdog.long(what)
        asked = torch.tensor(float(bool(signals.asked)), device=rank.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked.item():
            raise Stopped(
                f"stopped by {signals.asked or 'a signal to another rank'} before a step was made, during {what}.",
                where=str(run_dir),
                fix="the same command with --resume true starts again",
            )

    stores = {"train": batches.rows} | ({} if validation is None else {"val": validation.rows})
    attach(run, run_dir, stores, rank.device, beat, model)


class Training:
    """The steps of one rank from the first to the last, or to a signal."""

    def __init__(
        self,
        run: Run,
        rank: process_groups.Rank,
        run_dir: Path,
        trainer: Trainer,
        batches: Batches,
        callbacks: Callbacks,
        signals: StopSignals,
    ) -> None:
        self.spec, self.rank, self.run_dir = run, rank, run_dir
        self.trainer, self.batches, self.callbacks, self.signals = trainer, batches, callbacks, signals

    def attend(self, log: RunLog, watchdog: Watchdog, validation: EvalBatches | None, extra: dict[str, Any]) -> None:
        """Have everything beside the steps done, in this order."""
        from megaswift.train.expert_health import ExpertHealth

        spec, trainer, callbacks, last = self.spec, self.trainer, self.callbacks, self.spec.schedule.train_iters
        checkpoints = Checkpoints(spec, self.rank, trainer, self.batches.fingerprint, self.run_dir, log, watchdog, callbacks)
        callbacks.add(StopOnSignal(self.signals))
        callbacks.add(Heartbeat(watchdog))
        if spec.precision.deterministic:
            callbacks.add(CostOfDeterminism(trainer, self.batches, self.rank.device, log))
        callbacks.add(
            StepGuard(
                spec.guards, trainer, self.batches, self.run_dir, log, extra,
                last=last, before_the_end=checkpoints.finish, active=self.rank.is_first,
            )
        )  # fmt: skip
        callbacks.add(log)
        callbacks.add(GraphNotes(trainer.graphs, log))
        config = trainer.bare_model.config
        if config.num_moe_experts:
            callbacks.add(
                ExpertHealth(
                    trainer, validation, self.rank.device, self.run_dir, log, extra, layers=config.num_layers,
                    experts=config.num_moe_experts, every=spec.saving.logging_steps, last=last, active=self.rank.is_first,
                )
            )  # fmt: skip
        if validation is not None:
            ends = spec.data.end_ids if spec.objective.of_tokens else ()
            callbacks.add(
                Evaluation(
                    trainer, validation, self.rank.device, callbacks, watchdog, every=spec.saving.eval_steps, last=last,
                    objective=EvaluatedTokens(ends) if ends else None,
                )
            )  # fmt: skip
        callbacks.add(checkpoints)

    def run(self) -> None:
        """Raises NonFiniteError, Stopped or DataError, on all ranks alike."""
        first, last = self.spec.schedule.first_step, self.spec.schedule.train_iters
        fault_point("loop.start")
        if self.callbacks.agree().stop:
            raise self._stopped(first)
        self.callbacks.begin(first)
        started = time.perf_counter()
        for place, micro_batches in prefetch(self.batches, first, last, self.spec.batch.workers):
            step = place + 1
            fault_point("loop.step")
            result = self.trainer.step(to_device(micro_batches, self.rank.device))
            result.tokens = int(self.batches.rows.lengths[self.batches.sample_ids(place)].sum())
            seconds, started = time.perf_counter() - started, time.perf_counter()
            self.callbacks.step(step, result, seconds)
            fault_point("loop.boundary")
            verdict = self.callbacks.agree()
            self.callbacks.boundary(step, verdict)
            if verdict.stop and step < last:
                raise self._stopped(step)
            if saves_after(self.spec, step):
                started = time.perf_counter()  # saving is no part of a step

    def _stopped(self, step: int) -> Stopped:
        what = f"stopped by {self.signals.asked or 'a signal to another rank'} "
        if step == self.spec.schedule.first_step:
            return Stopped(
                what + "before a step was made.",
                where=str(self.run_dir),
                fix="the same command with --resume true starts again",
            )
        return Stopped(
            what + f"after step {step}, whose checkpoint is saved.",
            where=str(self.run_dir),
            fix="the same command with --resume true goes on from there",
        )


def _agreed_run_dir(run: Run) -> Path:
    """The run's directory as rank 0 names it; on several machines the others learn it here."""
    name = [run.saving.run_dir]
    dist.broadcast_object_list(name, src=0)
    return Path(name[0])


def main(argv: list[str]) -> int:
    """Entry point of one rank: errors go to a file that the launcher prints once."""
    return agent.report_from_rank(lambda: train(Run.read(Path(argv[0]))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
