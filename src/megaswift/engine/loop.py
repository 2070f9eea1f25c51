"""The training loop of one rank: load, step, evaluate, save, log. `swift sft` starts it on every rank.

python -m megaswift.engine.loop JOB.json      (what torchrun runs; swift sft writes the file)
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaswift.arguments import SftArguments
from megaswift.checkpoint.faults import reached
from megaswift.checkpoint.hf_load import is_hf_folder, load_hf_weights
from megaswift.checkpoint.keep import delete_beyond
from megaswift.checkpoint.layout import MANIFEST, iteration_directory
from megaswift.checkpoint.load import load_training_state, load_weights
from megaswift.checkpoint.manifest import ancestry, read_manifest
from megaswift.checkpoint.new_rows import fill_new_rows
from megaswift.checkpoint.save import Saving
from megaswift.data.batches import Batches, EvalBatches, MicroBatch, prefetch
from megaswift.data.store import TokenRows
from megaswift.engine import launch, ranks
from megaswift.engine.determinism import deterministic, measure_cost
from megaswift.engine.hf_copies import HFCopies
from megaswift.engine.log import RunLog
from megaswift.engine.signals import StopSignals
from megaswift.engine.spikes import NormHistory
from megaswift.engine.watchdog import Watchdog
from megaswift.errors import DataError, NonFiniteError, Stopped
from megaswift.hf.config import load_config
from megaswift.hf.folder import read_config
from megaswift.plan import Plan


@dataclass(frozen=True)
class Job:
    """What a rank needs to know; `swift sft` writes it, every rank reads it."""

    plan: Plan
    options: dict[str, Any]  # of SftArguments
    checkpoint: str  # torch_dist directory that training starts from
    model_dir: str  # directory with config.json
    train_data: str
    val_data: str | None
    pad_id: int
    first_step: int = 0  # steps that an earlier run already made
    other_dtypes: dict[str, str] = field(default_factory=dict)  # tensors that the source has in another precision than the rest
    rows_before: int | None = None  # of the embedding, where the checkpoint lacks rows for new tokens

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "plan": Plan(**values["plan"])})


def run(job: Job) -> None:
    """Train as the job says, as one rank. Raises MegaswiftError; all ranks raise alike."""
    plan, args = job.plan, SftArguments(**job.options)
    # The watchdog ends a rank that stands still, and leaves its stacks; the limit of the process groups is only the last resort.
    patience = max(args.start_timeout, args.step_timeout) + 60
    with (
        StopSignals(launch.stop_file()) as stop,
        deterministic(args.deterministic),
        ranks.joined(plan.tp, plan.pp, args.seed, plan.cp, start_timeout_s=patience) as rank,
    ):
        run_dir = _agreed_run_dir(plan)
        with Watchdog(run_dir, rank.rank, args.start_timeout, args.step_timeout) as watchdog:
            trainer, extra = _restored(job, args)
            train, validation = _batches(job, args, rank)
            log = RunLog(run_dir, plan, rank.is_first, rank.on_gpu, job.first_step)
            try:
                if rank.on_gpu:
                    log.note(f"attention: {trainer.bare_model.attention_kernel(args.padding_free or args.packing)}")
                training = Training(job, args, rank, trainer, train, validation, run_dir, log, stop, watchdog, extra)
                try:
                    training.run()
                finally:
                    training.copies.stop()
            finally:
                log.close()
                trainer.close()


class Training:
    """The steps of one rank from the first to the last, or to a signal."""

    def __init__(
        self,
        job: Job,
        args: SftArguments,
        rank: ranks.Rank,
        trainer: Any,
        train: Batches,
        validation: EvalBatches | None,
        run_dir: Path,
        log: RunLog,
        stop: StopSignals,
        watchdog: Watchdog,
        extra: dict[str, Any],
    ) -> None:
        self.job, self.plan, self.args, self.rank, self.trainer = job, job.plan, args, rank, trainer
        self.train, self.validation, self.run_dir = train, validation, run_dir
        self.log, self.stop, self.watchdog = log, stop, watchdog
        self.origin = _origin(job, run_dir)
        self.saving: Saving | None = None  # the checkpoint that is being written in the background
        self.began, self.waited = 0.0, 0.0  # when it was begun; seconds that training waited for it
        self.eval_loss: tuple[int, float] | None = None  # step and loss of the last evaluation
        self.norms = NormHistory(args.skip_spikes, extra.get("norms", ()))
        self.skipped = int(extra.get("skipped", 0))
        self.copies = HFCopies(run_dir, active=args.save_safetensors and rank.is_first)

    def run(self) -> None:
        """Raises NonFiniteError, Stopped or DataError, on all ranks alike."""
        first, last = self.job.first_step, self.plan.train_iters
        reached("loop.start")
        if self._agree()[0]:
            self._stopped(first)
        self.watchdog.long("the first step")  # kernels are compiled in it
        if self.args.deterministic:
            self.log.determinism(first, *measure_cost(self.trainer, _move(self.train.step(first), self.rank.device)))
        started = time.perf_counter()
        for place, micro_batches in prefetch(self.train, first, last, self.args.dataloader_num_workers):
            step = place + 1
            reached("loop.step")
            self.trainer.norm_limit = self.norms.limit
            result = self.trainer.step(_move(micro_batches, self.rank.device))
            result.tokens = int(self.train.rows.lengths[self.train.sample_ids(place)].sum())
            seconds, started = time.perf_counter() - started, time.perf_counter()
            self.watchdog.beat(f"step {step + 1}")
            self._judge(step, result)
            self.log.step(step, result, seconds)
            if note := self.trainer.graphs.take_note():
                self.log.note(note)
            due = step % int(self.plan.megatron["save_interval"]) == 0 or step == last
            if self.validation is not None and (step % self.args.eval_steps == 0 or step == last):
                self._evaluate(step, self.validation)
            reached("loop.boundary")
            stopping, written = self._agree()
            if stopping:
                self.copies.stop()  # whoever asked does not wait for it
            if self.saving is not None and (written or due or stopping):
                self._finish_saving(copy=not stopping)
            if due or stopping:
                self._save(step, wait=stopping or step == last)
            if stopping and step < last:
                self._stopped(step)
            started = time.perf_counter() if due else started

    def _agree(self) -> tuple[bool, bool]:
        """At a step boundary: whether a rank was asked to stop, and whether all have written their checkpoint files."""
        pending = self.saving is not None and not self.saving.written
        flags = torch.tensor([float(bool(self.stop.asked)), float(pending)], device=self.rank.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stopping, unwritten = flags.tolist()
        return bool(stopping), not unwritten

    def _stopped(self, step: int) -> None:
        what = f"stopped by {self.stop.asked or 'a signal to another rank'} "
        if step == self.job.first_step:
            raise Stopped(
                what + "before a step was made.",
                where=str(self.run_dir),
                fix="the same command with --resume true starts again",
            )
        raise Stopped(
            what + f"after step {step}, whose checkpoint is saved.",
            where=str(self.run_dir),
            fix="the same command with --resume true goes on from there",
        )

    def _judge(self, step: int, result: Any) -> None:
        """Count a step that made no update because of its numbers, or stop the run for it; note which rows it saw."""
        if not (result.nonfinite or result.spike):
            if result.skipped:
                self.log.note(
                    f"step {step}/{self.plan.train_iters}  gradients overflowed in fp16: no update; the loss scale is now {result.loss_scale:g}"
                )
            elif result.grad_norm is not None:
                self.norms.add(result.grad_norm)
            return
        path = self.run_dir / f"{'nonfinite' if result.nonfinite else 'spike'}_step_{step}.json"
        if self.rank.is_first:
            rows = [int(row) for row in self.train.sample_ids(step - 1)]
            path.write_text(
                json.dumps({"step": step, "loss": result.loss, "grad_norm": result.grad_norm, "rows": rows}, default=str),
                encoding="utf-8",
            )
        what = f"loss {result.loss:.4g} and gradient norm {result.grad_norm:.4g} at step {step} "
        what += "are not both finite" if result.nonfinite else f"are a spike: the norm is above {self.trainer.norm_limit:.4g}"
        self.skipped += 1
        many = self.skipped > self.args.max_skipped_steps
        if (result.nonfinite and self.args.nonfinite == "stop") or many:
            if self.saving is not None:
                self._finish_saving()
            more = f"; more than --max_skipped_steps {self.args.max_skipped_steps} were skipped" if many else ""
            raise NonFiniteError(
                f"{what}; the weights were not touched{more}.",
                where=f"the rows of this step are listed in {path}",
                fix="look at these rows, lower --learning_rate, or use --dtype bf16 in place of fp16",
            )
        self.log.note(
            f"step {step}/{self.plan.train_iters}  {what}: skipped ({self.skipped} of at most {self.args.max_skipped_steps}), rows in {path.name}"
        )

    def _evaluate(self, step: int, validation: EvalBatches) -> None:
        """The validation loss, unless a signal cuts it short."""
        reached("loop.evaluate")
        cut = False

        def groups() -> Iterator[list[MicroBatch]]:
            nonlocal cut
            for k in range(len(validation)):
                if k and self._agree()[0]:
                    cut = True
                    return
                yield _move(validation.step(k), self.rank.device)
                self.watchdog.beat(f"the evaluation after step {step}")

        loss = self.trainer.evaluate(groups())
        if not cut:
            self.eval_loss = (step, loss)
            self.log.evaluation(step, loss)

    def _save(self, step: int, wait: bool) -> None:
        """Begin a checkpoint; it is finished here, or with --async_save at a later boundary."""
        self.watchdog.long(f"saving after step {step}")
        self.began = time.perf_counter()
        extra = {
            "consumed_samples": step * self.plan.global_batch,
            "data_fingerprint": self.train.fingerprint,
            "seed": self.args.seed,
        }
        manifest = {
            "model_type": self.plan.model_type,
            "dtype": self.plan.dtype,
            "layout": {"tp": self.rank.tp, "pp": self.rank.pp, "dp": self.rank.dp},
            "resume": extra | {"global_batch": self.plan.global_batch, "train_iters": self.plan.train_iters},
            "eval_loss": self.eval_loss[1]
            if self.eval_loss and self.eval_loss[0] == step and math.isfinite(self.eval_loss[1])
            else None,
            **self.origin,
        }
        self.saving = Saving(
            self.run_dir,
            step,
            self.trainer,
            only_model=self.args.save_only_model,
            extra=extra | {"norms": self.norms.values, "skipped": self.skipped},
            manifest=manifest,
            needed=self.plan.checkpoint_bytes,
            background=self.args.async_save and not wait,
        )
        self.waited = time.perf_counter() - self.began
        if wait or not self.args.async_save:
            self._finish_saving(copy=not wait)
        self.watchdog.beat(f"step {step + 1}")

    def _finish_saving(self, copy: bool = False) -> None:
        """Publish the checkpoint on its way, and delete those beyond --save_total_limit once it is safe.

        With `copy` its Hugging Face copy begins, where these are wanted; that of the last step is made, and proven, when the
        ranks are gone.
        """
        assert self.saving is not None
        begun, saving, self.saving = time.perf_counter(), self.saving, None
        self.watchdog.long(f"saving after step {saving.iteration}")
        target = saving.finish()
        problem: list[str] = [""]
        if self.rank.is_first:
            copied = self.copies.wait()  # before its checkpoint may be deleted
            if copied:
                self.log.note(copied)
            try:
                delete_beyond(self.run_dir, self.args.save_total_limit, saving.iteration)
            except OSError as error:
                problem = [f"an old checkpoint could not be deleted: {error}"]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise DataError(
                problem[0], where=str(self.run_dir), fix="the newest checkpoint is safe; delete the old one yourself"
            )
        ended = time.perf_counter()
        self.waited += ended - begun
        self.log.saved(saving.iteration, target, ended - self.began, self.waited)
        if copy:
            self.copies.begin(saving.iteration)
        self.watchdog.beat(f"step {saving.iteration + 1}")


def _origin(job: Job, run_dir: Path) -> dict[str, Any]:
    """What the run's checkpoints are made from: the config, and the chain of manifests or the Hugging Face folder that has none.

    Read once, when the weights are: later the start may be gone (--save_total_limit deletes it), moved, or made anew.
    """
    start = Path(job.checkpoint)
    found: dict[str, Any] = {"config": read_config(Path(job.model_dir))}
    found |= {"other_dtypes": job.other_dtypes} if job.other_dtypes else {}
    own = read_manifest(start) if job.first_step else {"rows_before": job.rows_before}  # of this run's own checkpoint
    found |= {name: own[name] for name in ("rows_before", "source") if own.get(name)}
    if not (start / MANIFEST).exists():
        return {"source": {"origin": str(start)}, **found, "made_from": []}
    return found | {
        "made_from": ancestry(start, iteration_directory(run_dir, 0))
    }  # relative, and all checkpoints are neighbours


def _agreed_run_dir(plan: Plan) -> Path:
    """The run's directory as rank 0 names it; on several machines the others learn it here."""
    name = [plan.megatron["save"]]
    dist.broadcast_object_list(name, src=0)
    return Path(name[0])


def _trainer(job: Job, args: SftArguments) -> Any:
    """Model and optimizer as the job's checkpoint has them."""
    return _restored(job, args)[0]


def _restored(job: Job, args: SftArguments) -> tuple[Any, dict[str, Any]]:
    """Model and optimizer with the weights, or the whole state, of the job's checkpoint; and what was saved beside it."""
    from megaswift.engine.model import ModelOptions, build
    from megaswift.engine.step import Trainer

    plan = job.plan
    options = ModelOptions(
        tp=plan.tp,
        pp=plan.pp,
        cp=plan.cp,
        dtype=plan.dtype,
        padded_vocab=plan.padded_vocab,
        sequence_parallel=args.sequence_parallel,
        recompute=args.gradient_checkpointing,
        deterministic=args.deterministic,
        flash_attention=args.use_flash_attn,
        variable_lengths=plan.pp > 1,
        fp8=args.fp8,
        offloaded_layers=plan.cpu_offloading_num_layers,
    )
    config = load_config(Path(job.model_dir))
    model = build(config, options)
    names = ("cuda_graphs", "overlap_grad_reduce", "overlap_param_gather", "recompute_modules")
    ways: dict[str, Any] = {name: getattr(args, name) for name in names}
    if job.first_step == 0:
        start = Path(job.checkpoint)
        (load_hf_weights if is_hf_folder(start) else load_weights)(model, start)
        if job.rows_before is not None:
            fill_new_rows(model, start, Path(job.model_dir), job.rows_before, config.vocab_size)
        return Trainer(model, plan, **ways), {}
    trainer = Trainer(model, plan, **ways)
    return trainer, load_training_state(trainer, Path(job.checkpoint), layout={"tp": plan.tp, "pp": plan.pp, "dp": plan.dp})


def _batches(job: Job, args: SftArguments, rank: ranks.Rank) -> tuple[Batches, EvalBatches | None]:
    common: dict[str, Any] = dict(
        micro_batch_size=args.batch_size,
        global_batch_size=job.plan.global_batch,
        dp_rank=rank.dp_rank,
        dp_size=rank.dp,
        pad_multiple=job.plan.pad_multiple,
        padding_free=args.padding_free,
        pad_id=job.pad_id,
    )
    data = [TokenRows.open(path) for path in (job.train_data, job.val_data) if path is not None]
    for rows in data:
        rows.require_within(load_config(Path(job.model_dir)).vocab_size, job.pad_id)
    train = Batches(data[0], seed=args.seed, shuffle=True, group_by_length=args.group_by_length, **common)
    return train, EvalBatches(data[1], **common) if job.val_data is not None else None


def _move(group: list[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """Micro batches on the rank's device; borders of packed rows stay on the host, which reads them."""
    if device.type == "cpu":
        return group
    names = ("tokens", "position_ids")
    return [replace(batch, **{name: getattr(batch, name).to(device, non_blocking=True) for name in names}) for batch in group]


def main(argv: list[str]) -> int:
    """Entry point of one rank: errors go to a file that the launcher prints once."""
    return launch.report_from_rank(lambda: run(Job.read(Path(argv[0]))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
