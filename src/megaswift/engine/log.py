"""What a run tells while it goes on: the live line, logging.jsonl and TensorBoard; only rank 0 writes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaswift.terminal import LiveLine, duration

if TYPE_CHECKING:
    from megaswift.engine.step import StepResult
    from megaswift.plan import Plan


class RunLog:
    """Collects step results and writes them every logging_steps; on other ranks it does nothing."""

    def __init__(self, run_dir: Path, plan: Plan, active: bool, on_gpu: bool) -> None:
        self.active, self.on_gpu, self.plan = active, on_gpu, plan
        self.interval = int(plan.megatron["log_interval"])
        self.began = time.perf_counter()
        self.first_step: int | None = None
        self.window: list[tuple[StepResult, float]] = []
        self.run_dir = run_dir
        if active:
            from torch.utils.tensorboard import SummaryWriter

            self.line = LiveLine()
            self.file = (run_dir / "logging.jsonl").open("a", encoding="utf-8")
            self.board = SummaryWriter(plan.megatron["tensorboard_dir"])

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        """One step is done; `seconds` is its time, data and logging included."""
        if not self.active:
            return
        self.first_step = self.first_step or step
        self.window.append((result, seconds))
        row = self._row(step)
        due = step % self.interval == 0 or step in (1, self.plan.train_iters)
        self.line.show(self._text(step, row), keep=due)
        if due:
            self._write(row)
            for name in (
                "loss",
                "grad_norm",
                "learning_rate",
                "tokens_per_second",
                "supervised_tokens_per_second",
                "memory_gb",
            ):
                if row[name] is not None:
                    self.board.add_scalar(f"train/{name}", row[name], step)
            self.window = []

    def evaluation(self, step: int, loss: float) -> None:
        """The validation loss after a step."""
        if self.active:
            self._write({"eval_loss": _rounded(loss), "global_step/max_steps": f"{step}/{self.plan.train_iters}"})
            self.board.add_scalar("eval/loss", loss, step)
            self.line.show(f"step {step}/{self.plan.train_iters}  validation loss {loss:.4f}", keep=True)

    def saved(self, step: int, directory: Path, seconds: float) -> None:
        """A checkpoint was written."""
        if self.active:
            self.line.show(f"step {step}/{self.plan.train_iters}  saved {directory.name} in {seconds:.1f} s", keep=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self.active:
            self.line.close()
            self.file.close()
            self.board.close()

    def _row(self, step: int) -> dict[str, Any]:
        """The figures of the steps since the last written line."""
        results, times = [result for result, _ in self.window], [seconds for _, seconds in self.window]
        supervised = sum(result.supervised for result in results)
        loss = sum(result.loss * result.supervised for result in results) / max(supervised, 1)
        done = step - (self.first_step or step) + 1
        elapsed = time.perf_counter() - self.began
        return {
            "loss": _rounded(loss),
            "grad_norm": _rounded(results[-1].grad_norm),
            "learning_rate": _rounded(results[-1].learning_rate),
            "consumed_samples": step * self.plan.global_batch,
            "global_step/max_steps": f"{step}/{self.plan.train_iters}",
            "tokens_per_second": round(sum(result.tokens for result in results) / sum(times), 1),
            "supervised_tokens_per_second": round(supervised / sum(times), 1),
            "skipped_steps": sum(result.skipped for result in results),
            "memory_gb": round(memory_gb(self.on_gpu), 2),
            "elapsed_s": round(elapsed, 1),
            "remaining_s": round(elapsed / done * (self.plan.train_iters - step), 1),
        }

    def _text(self, step: int, row: dict[str, Any]) -> str:
        norm = "overflow" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
        return (
            f"step {step}/{self.plan.train_iters}  loss {row['loss']:.4f}  grad norm {norm}  lr {row['learning_rate']:.3g}  "
            f"{row['tokens_per_second']:,.0f} tokens/s  {row['memory_gb']:.1f} GB  "
            f"{duration(row['elapsed_s'])} elapsed, {duration(row['remaining_s'])} left"
        )

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()


def memory_gb(on_gpu: bool) -> float:
    """Largest memory of this rank so far, in 10^9 bytes: on the GPU, else of the process."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _rounded(value: float | None) -> float | None:
    """Eight digits after the point; None for what JSON cannot hold."""
    return round(value, 8) if value is not None and math.isfinite(value) else None
