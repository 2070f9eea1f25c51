"""What a run tells while it goes on: the live line, logging.jsonl and TensorBoard; only rank 0 writes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaswift.store.publish import put
from megaswift.terminal import LiveLine, duration
from megaswift.train.callbacks import Callback
from megaswift.train.objectives import END_TOKEN, SUPERVISED, shown

if TYPE_CHECKING:
    from megaswift.run.spec import Run
    from megaswift.train.trainer import StepResult

# What TensorBoard shows of every line, beside the objective's own metrics.
FIGURES = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "supervised_tokens_per_second", "memory_gb")


class RunLog(Callback):
    """Collects step results and writes them every logging_steps; on other ranks it does nothing."""

    def __init__(self, run_dir: Path, run: Run, active: bool, on_gpu: bool) -> None:
        self.active, self.on_gpu = active, on_gpu
        self.last, self.rows_a_step = run.schedule.train_iters, run.batch.global_batch_size
        self.interval = run.saving.logging_steps
        self.began = time.perf_counter()
        self.first_step: int | None = None
        self.window: list[tuple[StepResult, float]] = []
        self.run_dir = run_dir
        if active:
            from torch.utils.tensorboard import SummaryWriter

            self.line = LiveLine()
            first_step = run.schedule.first_step
            forget_after(run_dir / "logging.jsonl", first_step)
            self.file = (run_dir / "logging.jsonl").open("a", encoding="utf-8")
            self.board = SummaryWriter(run.saving.logging_dir, purge_step=first_step + 1 if first_step else None)

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        """One step is done; `seconds` is its time, data and logging included."""
        if not self.active:
            return
        self.first_step = self.first_step or step
        self.window.append((result, seconds))
        row = self._row(step)
        due = step % self.interval == 0 or step in (1, self.last)
        self.line.show(self._text(step, row), keep=due)
        if due:
            self._write(row)
            for name in (*FIGURES, *self._own_metrics()):
                if row.get(name) is not None:
                    self.board.add_scalar(f"train/{name}", row[name], step)
            self.window = []

    def evaluated(self, step: int, loss: float, metrics: dict[str, float]) -> None:
        """The validation loss after a step, and the objective's metrics of the validation rows."""
        if self.active:
            own = {name: value for name, value in metrics.items() if name != SUPERVISED}
            row = {"eval_loss": _rounded(loss)} | {f"eval_{name}": _rounded(value) for name, value in own.items()}
            self._write(row | {"global_step/max_steps": f"{step}/{self.last}"})
            for name, value in (own | {"loss": loss}).items():
                self.board.add_scalar(f"eval/{name}", value, step)
            ends = "" if END_TOKEN not in own else f"  answers end with probability {own[END_TOKEN]:.3f}"
            self.line.show(f"step {step}/{self.last}  validation loss {loss:.4f}{ends}", keep=True)

    def saved(self, step: int, directory: Path, seconds: float, waited: float) -> None:
        """A checkpoint is safe: seconds since it was begun, and those of them in which training waited for it."""
        if self.active:
            row = {"checkpoint": directory.name, "save_seconds": round(seconds, 3), "save_waited_seconds": round(waited, 3)}
            self._write(row | {"global_step/max_steps": f"{step}/{self.last}"})
            self.line.show(
                f"step {step}/{self.last}  saved {directory.name} in {seconds:.1f} s, training waited {waited:.1f} s",
                keep=True,
            )

    def determinism(self, step: int, with_it: float, without: float) -> None:
        """What deterministic operations cost: milliseconds of one micro batch's forward and backward pass, with and without."""
        if self.active:
            row = {"deterministic_ms": round(with_it, 3), "not_deterministic_ms": round(without, 3)}
            self._write(row | {"global_step/max_steps": f"{step}/{self.last}"})
            self.note(
                f"deterministic operations: {with_it:.1f} ms for a micro batch's forward and backward pass, {without:.1f} ms "
                f"without them, so they cost {100.0 * (with_it / without - 1.0):+.0f} %"
            )

    def experts(self, step: int, row: dict[str, Any], text: str) -> None:
        """What the routers did since the last line, as figures and in words."""
        if self.active:
            self._write(row | {"global_step/max_steps": f"{step}/{self.last}"})
            for name, value in row.items():
                self.board.add_scalar(f"experts/{name}", value, step)
            self.note(text)

    def note(self, text: str) -> None:
        """A line that stays in the terminal."""
        if self.active:
            self.line.show(text, keep=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self.active:
            self.line.close()
            self.file.close()
            self.board.close()

    def _row(self, step: int) -> dict[str, Any]:
        """The figures of the steps since the last written line."""
        results, times = [result for result, _ in self.window], [seconds for _, seconds in self.window]
        supervised = sum(int(result.metrics.get(SUPERVISED, 0)) for result in results)
        used = [result for result in results if not (result.nonfinite or result.spike)]
        weight = sum(result.weight for result in used)
        loss = sum(result.loss * result.weight for result in used) / (weight or 1.0) if used else None
        done = step - (self.first_step or step) + 1
        elapsed = time.perf_counter() - self.began
        return {
            "loss": _rounded(loss),
            "grad_norm": _rounded(results[-1].grad_norm),
            "learning_rate": _rounded(results[-1].learning_rate),
            "consumed_samples": step * self.rows_a_step,
            "global_step/max_steps": f"{step}/{self.last}",
            "tokens_per_second": round(sum(result.tokens for result in results) / sum(times), 1),
            "supervised_tokens_per_second": round(supervised / sum(times), 1),
            **({} if results[-1].loss_scale is None else {"loss_scale": results[-1].loss_scale}),
            **self._means(used, weight),
            "skipped_steps": sum(result.skipped or result.nonfinite or result.spike for result in results),
            "memory_gb": round(memory_gb(self.on_gpu), 2),
            "elapsed_s": round(elapsed, 1),
            "remaining_s": round(elapsed / done * (self.last - step), 1),
        }

    def _own_metrics(self) -> list[str]:
        """Metrics of the objective that are shown as means; tokens with loss have a figure of their own."""
        return list(self._means([result for result, _ in self.window], 1.0))

    def _means(self, results: list[StepResult], weight: float) -> dict[str, float | None]:
        """Over all steps together, divided as the loss is, or as `shown` says."""
        names = [name for name in self.window[-1][0].metrics if name != SUPERVISED]
        if not results:
            return dict.fromkeys(shown(dict.fromkeys(names, 1.0), 1.0))
        sums = {name: sum(result.metrics[name] for result in results) for name in names}
        return {name: _rounded(value) for name, value in shown(sums, weight or 1.0).items()}

    def _text(self, step: int, row: dict[str, Any]) -> str:
        norm = "overflow" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
        loss = "none (skipped)" if row["loss"] is None else f"{row['loss']:.4f}"
        return (
            f"step {step}/{self.last}  loss {loss}  grad norm {norm}  lr {row['learning_rate']:.3g}  "
            f"{row['tokens_per_second']:,.0f} tokens/s  {row['memory_gb']:.1f} GB  "
            f"{duration(row['elapsed_s'])} elapsed, {duration(row['remaining_s'])} left"
        )

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`: a run that goes on from there makes them again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if 0 <= _step_of(line) <= step]
    put(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> int:
    """The step of a line of logging.jsonl; -1 for a line that a crash cut off."""
    try:
        return int(json.loads(line)["global_step/max_steps"].split("/")[0])
    except (ValueError, KeyError, TypeError, AttributeError):
        return -1


def memory_gb(on_gpu: bool) -> float:
    """Largest memory of this rank so far, in 10^9 bytes: on the GPU, else of the process."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _rounded(value: float | None) -> float | None:
    """Eight digits after the point; None for what JSON cannot hold."""
    return round(value, 8) if value is not None and math.isfinite(value) else None
