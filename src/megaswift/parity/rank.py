"""One rank of a parity run: a few steps of the engine, with gradients and weights written down after each.

python -m megaswift.parity.rank JOB.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaswift.arguments import SftArguments
from megaswift.engine import loop, ranks
from megaswift.engine.loop import Job

GRADIENTS, WEIGHTS, LOG = "gradients", "weights", "steps.jsonl"
STOP_AFTER, STATE = "stop_after", "state"  # a file with a number of steps, and where the whole state is saved then


def run(job: Job) -> None:
    """The steps of a job; losses go to steps.jsonl in the job's directory, gradients and weights beside it if asked for."""
    plan, args = job.plan, SftArguments(**job.options)
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
    out = Path(plan.megatron["save"])
    with ranks.joined(plan.tp, plan.pp, args.seed) as rank:
        trainer, _ = loop._restored(job, args)
        batches, _ = loop._batches(job, args, rank)
        stop = _stop_after(out) if job.first_step == 0 else None
        for place in range(job.first_step, stop or plan.train_iters):
            sums = trainer.gradients(loop._move(batches.step(place), rank.device))
            if dumps(out):
                _save(out / GRADIENTS, place + 1, _Gradients(trainer, trainer.gradient_divisor(sums)))
            result = trainer.update(sums)
            if dumps(out):
                _save(out / WEIGHTS, place + 1, trainer)
            if rank.is_first:
                row = {
                    "step": place + 1,
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "learning_rate": result.learning_rate,
                }
                with (out / LOG).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        if stop:
            _save(
                out / STATE, stop, trainer, only_model=False, manifest={"layout": {"tp": plan.tp, "pp": plan.pp, "dp": plan.dp}}
            )


def _stop_after(out: Path) -> int | None:
    path = out / STOP_AFTER
    return int(path.read_text(encoding="utf-8")) if path.exists() else None


def dumps(out: Path) -> bool:
    """Whether the run's directory asks for gradients and weights."""
    return (out / GRADIENTS).is_dir()


def _save(root: Path, step: int, state: Any, *, only_model: bool = True, manifest: dict[str, Any] | None = None) -> None:
    from megaswift.checkpoint.save import save

    save(root, step, state, only_model=only_model, extra={}, manifest=manifest or {})


class _Gradients:
    """A trainer's gradients in place of its weights, so that they are saved, read and compared in the same way."""

    def __init__(self, trainer: Any, divisor: float) -> None:
        self.trainer, self.divisor = trainer, divisor
        self.bare_model = self
        self.optimizer = self.scheduler = None

    def sharded_state_dict(self, prefix: str = "", metadata: Any = None) -> dict[str, Any]:
        """Megatron-Core's sharded state dict of the model with fp32 gradients as its data."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

        self._gather()
        state = self.trainer.bare_model.sharded_state_dict(prefix=prefix, metadata=metadata)
        result = {}
        for name, item in state.items():
            if isinstance(item, ShardedTensor):
                gradient = item.data.main_grad / self.divisor
                result[name] = replace(item, data=gradient, dtype=gradient.dtype)
            elif isinstance(item, ShardedTensorFactory):
                result[name] = replace(item, data=item.data.main_grad / self.divisor)
            else:
                result[name] = item
        return result

    def _gather(self) -> None:
        """Put the parts that the data-parallel ranks reduced together again: the distributed optimizer keeps them apart."""
        for buffer in self.trainer.model.buffers:
            for bucket in buffer.buckets:
                group = buffer.data_parallel_group
                size = dist.get_world_size(group)
                if size > 1:
                    own = bucket.grad_data.chunk(size)[dist.get_rank(group)].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def main(argv: list[str]) -> int:
    """Entry point of one rank."""
    from megaswift.engine.launch import report_from_rank

    return report_from_rank(lambda: run(Job.read(Path(argv[0]))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
