"""The training loop of one rank: load, step, evaluate, save, log. `swift sft` starts it on every rank.

    python -m megaswift.engine.loop JOB.json      (what torchrun runs; swift sft writes the file)
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaswift.arguments import SftArguments
from megaswift.checkpoint.load import load_training_state, load_weights
from megaswift.checkpoint.save import keep_newest, require_space, save
from megaswift.data.batches import Batches, EvalBatches, MicroBatch, prefetch
from megaswift.data.store import TokenRows
from megaswift.engine import ranks
from megaswift.engine.log import RunLog
from megaswift.errors import NonFiniteError
from megaswift.hf.config import load_config
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

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "plan": Plan(**values["plan"])})


def run(job: Job) -> None:
    """Train as the job says, as one rank. Raises MegaswiftError; all ranks raise alike."""
    plan, args = job.plan, SftArguments(**job.options)
    if args.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=False)
    with ranks.joined(plan.tp, plan.pp, args.seed) as rank:
        run_dir = _agreed_run_dir(plan)
        trainer = _trainer(job, args)
        train, validation = _batches(job, args, rank)
        log = RunLog(run_dir, plan, rank.is_first, rank.on_gpu)
        try:
            _train(job, args, rank, trainer, train, validation, run_dir, log)
        finally:
            log.close()


def _train(
    job: Job, args: SftArguments, rank: ranks.Rank, trainer: Any, train: Batches, validation: EvalBatches | None, run_dir: Path, log: RunLog
) -> None:
    plan, last = job.plan, job.plan.train_iters
    require_space(run_dir, plan.checkpoint_bytes, "one checkpoint")
    started = time.perf_counter()
    batches = prefetch(train, job.first_step, last, args.dataloader_num_workers)
    for place, micro_batches in batches:
        step = place + 1
        result = trainer.step(_move(micro_batches, rank.device))
        result.tokens = int(train.rows.lengths[train.sample_ids(place)].sum())
        seconds, started = time.perf_counter() - started, time.perf_counter()
        if result.nonfinite:
            _stop_nonfinite(run_dir, step, result, train, rank)
        log.step(step, result, seconds)
        if validation is not None and (step % args.eval_steps == 0 or step == last):
            log.evaluation(step, trainer.evaluate(_move(validation.step(k), rank.device) for k in range(len(validation))))
        if step % args.save_steps == 0 or step == last:
            _save(job, args, rank, trainer, run_dir, step, train, log)
        started = time.perf_counter() if step % args.save_steps == 0 else started


def _save(job: Job, args: SftArguments, rank: ranks.Rank, trainer: Any, run_dir: Path, step: int, train: Batches, log: RunLog) -> None:
    """One checkpoint, and the oldest ones beyond --save_total_limit removed once it is safe."""
    began = time.perf_counter()
    extra = {"consumed_samples": step * job.plan.global_batch, "data_fingerprint": train.fingerprint, "seed": args.seed}
    manifest = {
        "model_type": job.plan.model_type,
        "dtype": job.plan.dtype,
        "layout": {"tp": rank.tp, "pp": rank.pp, "dp": rank.dp},
        "resume": extra | {"global_batch": job.plan.global_batch, "train_iters": job.plan.train_iters},
        "started_from": Path(job.checkpoint).parent.name,
    }
    target = save(run_dir, step, trainer, only_model=args.save_only_model, extra=extra, manifest=manifest)
    keep_newest(run_dir, args.save_total_limit)
    dist.barrier()
    log.saved(step, target, time.perf_counter() - began)


def _agreed_run_dir(plan: Plan) -> Path:
    """The run's directory as rank 0 names it; on several machines the others learn it here."""
    name = [plan.megatron["save"]]
    dist.broadcast_object_list(name, src=0)
    return Path(name[0])


def _trainer(job: Job, args: SftArguments) -> Any:
    """Model and optimizer with the weights, or the whole state, of the job's checkpoint."""
    from megaswift.engine.model import ModelOptions, build
    from megaswift.engine.step import Trainer

    plan = job.plan
    options = ModelOptions(
        tp=plan.tp,
        pp=plan.pp,
        dtype=plan.dtype,
        padded_vocab=plan.padded_vocab,
        sequence_parallel=args.sequence_parallel,
        recompute=args.gradient_checkpointing,
        deterministic=args.deterministic,
        flash_attention=args.use_flash_attn,
        variable_lengths=plan.pp > 1,
    )
    model = build(load_config(Path(job.model_dir)), options)
    if job.first_step == 0:
        load_weights(model, Path(job.checkpoint))
        return Trainer(model, plan)
    trainer = Trainer(model, plan)
    load_training_state(trainer, Path(job.checkpoint), layout={"tp": plan.tp, "pp": plan.pp, "dp": plan.dp})
    return trainer


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
    train = Batches(TokenRows.open(job.train_data), seed=args.seed, shuffle=True, group_by_length=args.group_by_length, **common)
    if job.val_data is None:
        return train, None
    return train, EvalBatches(TokenRows.open(job.val_data), **common)


def _move(group: list[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """Micro batches on the rank's device; borders of packed rows stay on the host, which reads them."""
    if device.type == "cpu":
        return group
    names = ("tokens", "labels", "position_ids")
    return [replace(batch, **{name: getattr(batch, name).to(device, non_blocking=True) for name in names}) for batch in group]


def _stop_nonfinite(run_dir: Path, step: int, result: Any, train: Batches, rank: ranks.Rank) -> None:
    """Write down which rows the step saw and stop; the weights are those of the step before."""
    path = run_dir / f"nonfinite_step_{step}.json"
    if rank.is_first:
        rows = [int(row) for row in train.sample_ids(step - 1)]
        path.write_text(json.dumps({"step": step, "loss": result.loss, "grad_norm": result.grad_norm, "rows": rows}, default=str), encoding="utf-8")
    raise NonFiniteError(
        f"loss {result.loss} and gradient norm {result.grad_norm} at step {step} are not both finite; the weights were not touched.",
        where=f"the rows of this step are listed in {path}",
        fix="look at these rows, lower --learning_rate, or use --dtype bf16 in place of fp16",
    )


def main(argv: list[str]) -> int:
    """Entry point of one rank: errors go to a file that the launcher prints once."""
    from megaswift.engine.launch import report_from_rank

    return report_from_rank(lambda: run(Job.read(Path(argv[0]))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
