"""One rank of a parity run: a few steps of the engine, with gradients and weights written down after each.

python -m megaswift.parity.rank run.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from megaswift.data.batches import MicroBatch
from megaswift.launch.agent import report_from_rank
from megaswift.megatron import process_groups
from megaswift.parity.layers import of_engine
from megaswift.parity.noise import perturb
from megaswift.run.spec import Run
from megaswift.train.checkpoint.save import save
from megaswift.train.determinism import deterministic
from megaswift.train.gradients import Gradients
from megaswift.train.setup import open_batches, restore_trainer, to_device

GRADIENTS, WEIGHTS, LOG = "gradients", "weights", "steps.jsonl"
STOP_AFTER, STATE = "stop_after", "state"  # a file with a number of steps, and where the whole state is saved then
LAYERS = "layers.json"  # hidden states after every layer, as one number each, before the first step
NOISE = "noise_seed"  # a file with the seed of the rounding noise that the weights get before the first step


def trace(run: Run) -> None:
    """The steps of a run; losses go to steps.jsonl in its directory, gradients and weights beside it if asked for."""
    out, first, end = Path(run.saving.run_dir), run.schedule.first_step, run.schedule.train_iters
    with deterministic(run.precision.deterministic), process_groups.joined(run.parallel, run.seed) as rank:
        trainer, _ = restore_trainer(run)
        try:
            batches, _ = open_batches(run, rank)
            seed, stop = _number(out / NOISE), _number(out / STOP_AFTER)
            if first == 0 and seed is not None:
                perturb(trainer, seed)
            last = stop if first == 0 and stop else end
            for place in range(first, last):
                micro_batches = to_device(batches.step(place), rank.device)
                if dumps(out) and place == 0:
                    numbers = of_engine(trainer, micro_batches, batches.rows)
                    if rank.is_first:
                        (out / LAYERS).write_text(json.dumps(numbers), encoding="utf-8")
                row = _step(trainer, micro_batches, place + 1, out)
                if rank.is_first:
                    with (out / LOG).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
            if last < end:
                _save(out / STATE, last, trainer, only_model=False, manifest={"layout": run.parallel.layout})
        finally:
            trainer.close()


def _step(trainer: Any, micro_batches: list[MicroBatch], number: int, out: Path) -> dict[str, Any]:
    """One step, with its gradients and weights saved where the run's directory asks for them; its figures."""
    began = time.perf_counter()
    sums = trainer.gradients(micro_batches)
    if dumps(out):
        _save(out / GRADIENTS, number, Gradients(trainer, trainer.gradient_divisor(sums)))
    result = trainer.update(sums)  # the loss comes to the host, so the step is over
    milliseconds = 1e3 * (time.perf_counter() - began)
    if dumps(out):
        _save(out / WEIGHTS, number, trainer)
    return {
        "step": number,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "ms": round(milliseconds, 3),  # saved gradients included, where they are asked for
    }


def _number(path: Path) -> int | None:
    return int(path.read_text(encoding="utf-8")) if path.exists() else None


def dumps(out: Path) -> bool:
    """Whether the run's directory asks for gradients and weights."""
    return (out / GRADIENTS).is_dir()


def _save(root: Path, step: int, state: Any, *, only_model: bool = True, manifest: dict[str, Any] | None = None) -> None:
    save(root, step, state, only_model=only_model, extra={}, manifest=manifest or {})


def main(argv: list[str]) -> int:
    """Entry point of one rank."""
    return report_from_rank(lambda: trace(Run.read(Path(argv[0]))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
