"""`swift parity --learning true`: a whole run through `swift sft` and through transformers, on the same global batches.

The rows of each step, the schedule, clipping and the optimizer's numbers are read from what the run left behind, so that
the reference follows the run that really was.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaswift.config.options import SftArguments
from megaswift.parity.compare import relative
from megaswift.run.spec import RUN_FILE, Run
from megaswift.terminal import console, say
from megaswift.weights.hf.folder import side_files

LIMIT = 5e-3  # largest relative difference of the final validation losses


@dataclass
class Curves:
    """Losses of a whole run on both sides.

    Attributes:
        loss: (engine, reference) of steps 1, 2, ...
        eval_loss: step -> (engine, reference) on the validation rows.
        rows, eval_rows, tokens: training rows of one epoch, validation rows, and tokens of all steps together.
    """

    loss: list[tuple[float, float]]
    eval_loss: dict[int, tuple[float, float]]
    rows: int
    eval_rows: int
    tokens: int

    @property
    def difference(self) -> float:
        """Relative difference of the final validation losses."""
        engine, reference = self.eval_loss[max(self.eval_loss)]
        return relative(engine, reference)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"difference": self.difference, "limit": LIMIT}


def options_of_run(args: SftArguments, out: Path) -> SftArguments:
    """Options of the run itself, in a directory of its own: every step is logged, and only the end is saved."""
    return args.changed(
        output_dir=str(out),
        add_output_dir_suffix=False,
        logging_steps=1,
        save_only_model=True,
        save_steps=10**9,
        resume=False,
    )


def follow(run_dir: Path, args: SftArguments, folder: Path, save_to: Path | None) -> Curves:
    """The same run through transformers, from the Hugging Face folder that it started from.

    Args:
        run_dir: a finished run of `swift sft` that evaluated and logged every step.
        args: its options.
        save_to: where the trained model goes; None: nowhere.
    """
    from megaswift.data.batches import Batches
    from megaswift.data.store import TokenRows
    from megaswift.parity.adapters import PeftSide
    from megaswift.parity.reference import Reference

    run = Run.read(run_dir / RUN_FILE)
    steps = run.schedule.train_iters
    train, validation = TokenRows.open(run.data.train), TokenRows.open(str(run.data.val))
    batches = Batches(
        train, micro_batch_size=1, global_batch_size=run.batch.global_batch_size, dp_rank=0, dp_size=1, seed=args.seed,
        pad_id=run.data.pad_id,
        group_by_length=run.batch.group_by_length,
    )  # fmt: skip
    ids = [batches.sample_ids(step) for step in range(steps)]
    logged = [json.loads(line) for line in (run_dir / "logging.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [float(row["loss"]) for row in logged if "loss" in row]
    evaluated = {
        int(row["global_step/max_steps"].split("/")[0]): float(row["eval_loss"]) for row in logged if "eval_loss" in row
    }
    side = PeftSide.of(run)
    reference = Reference(folder, args, run.precision.dtype, steps, run.schedule.warmup_iters, side)
    curves = Curves([], {}, len(train), len(validation), int(sum(int(train.lengths[step].sum()) for step in ids)))
    for number, (step, engine) in enumerate(zip(reference.run(train, ids, keep=False), losses), start=1):
        curves.loss.append((engine, step.loss))
        if number in evaluated:
            curves.eval_loss[number] = (evaluated[number], reference.evaluate(validation))
        say(f"transformers: step {number}/{steps}  loss {step.loss:.4f}, engine {engine:.4f}")
    if save_to is not None:
        save_model(reference, folder, save_to)
    return curves


def save_model(reference: Any, folder: Path, target: Path) -> None:
    """The reference's model with tokenizer and config of the one that it started from."""
    import shutil

    reference.save(target)
    for file in side_files(folder):
        shutil.copyfile(file, target / file.name)


def verdict(curves: Curves) -> str | None:
    """None if the final validation losses agree."""
    if curves.difference <= LIMIT:
        return None
    engine, reference = curves.eval_loss[max(curves.eval_loss)]
    return (
        f"after {len(curves.loss)} steps the validation loss is {engine:.4f} in the engine and {reference:.4f} in transformers: "
        f"they differ by {100 * curves.difference:.2f} %, allowed {100 * LIMIT:.1f} %"
    )


def print_curves(curves: Curves) -> None:
    """Losses of some steps, and every validation loss."""
    out = console()
    out.print(f"\n{'step':>5}  {'loss, engine':>13}  {'transformers':>12}  {'validation, engine':>18}  {'transformers':>12}")
    every = max(1, len(curves.loss) // 12)
    for number, (engine, reference) in enumerate(curves.loss, start=1):
        pair = curves.eval_loss.get(number)
        if pair or number == 1 or number % every == 0:
            evaluated = f"{pair[0]:>18.4f}  {pair[1]:>12.4f}" if pair else ""
            out.print(f"{number:>5}  {engine:>13.4f}  {reference:>12.4f}  {evaluated}".rstrip())
    out.print(f"final validation losses differ by {100 * curves.difference:.3f} %, allowed {100 * LIMIT:.1f} %\n")
