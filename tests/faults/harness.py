"""Ranks that really die: forked from a server that has everything imported, so that a run costs a second, not ten.

case = FaultRun(base, tmp_path)              # a copy of a run with a checkpoint after step 2
ended = case.run("save.writing:kill:1")      # what each rank's end was; the harness is the launcher here
case.newest()                                # the checkpoint that a resumed run would take, every byte verified
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaswift.launch import agent as launch
from megaswift.run.resume import newest_whole
from megaswift.run.spec import Run
from megaswift.store.faults import FAULT
from megaswift.store.paths import iteration_of
from megaswift.store.retention import clean
from tests.ranks import free_port
from tests.runs import changed

# The limit for steps and for saving in runs that are to stand still; the whole matrix runs two of them at a time. All others
# have minutes: a busy machine is no fault.
TIMEOUT_S = float(os.environ.get("MEGASWIFT_FAULTS_TIMEOUT", "15" if os.environ.get("MEGASWIFT_FAULTS") == "all" else "12"))
PATIENCE_S = 240.0
GONE_S = 30.0 + 2 * TIMEOUT_S  # by then every process must have ended

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.preload"])


@dataclass
class Ended:
    """How a run ended."""

    codes: list[int]  # of the ranks; negative: ended by that signal
    reports: list[dict[str, Any]]  # errors that ranks reported, in rank order
    output: str  # what ranks wrote to standard error
    seconds: float
    stacks: int  # hang-rank*.txt files

    @property
    def own(self) -> list[dict[str, Any]]:
        """Reports of causes, consequences left out."""
        return [report for report in self.reports if not report["second"]]


def _rank(environment: dict[str, str], job: str, errors: str, prepare: Callable[[], None] | None, nice: bool) -> None:
    """One rank; module level, so that the server can start it."""
    os.environ.update(environment)
    sys.stderr = open(errors, "w", buffering=1)  # noqa: SIM115 (open until the process ends)
    os.dup2(sys.stderr.fileno(), 2)
    sys.stdout = sys.stderr
    import torch

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    from megaswift.train.loop import train

    os._exit(launch.report_from_rank(lambda: train(Run.read(Path(job)))))


def run_ranks(
    job: Run,
    work: Path,
    fault: str = "",
    prepare: Callable[[], None] | None = None,
    watch: Callable[[list[Any]], None] | None = None,
) -> Ended:
    """Run a job on forked ranks and end what is left of it, as the launcher would.

    Args:
        fault: POINT:KIND:RANK[:HIT] of store/faults.py.
        prepare: called in each rank first.
        watch: called with the processes while they run.
    """
    notes = work / "notes"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    job.write(work / "run.json")
    port = free_port()
    world, began = job.parallel.world_size, time.monotonic()
    common = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        launch.ERROR_DIR: str(notes),
        FAULT: fault,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = []
    for rank in range(world):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context.Process(
            target=_rank, args=(environment, str(work / "run.json"), str(notes / f"stderr{rank}"), prepare, False)
        )
        process.start()
        processes.append(process)
    if watch is not None:
        watch(processes)
    _see_to_the_end(processes, notes, began)
    reports = [json.loads(path.read_text()) for path in sorted(notes.glob("rank*.json"))]
    output = "\n".join(
        f"[{rank}] {(notes / f'stderr{rank}').read_text()}" for rank in range(world) if (notes / f"stderr{rank}").exists()
    )
    run_dir = Path(job.saving.run_dir)
    return Ended(
        [process.exitcode for process in processes],
        reports,
        output,
        time.monotonic() - began,
        len(list(run_dir.glob("hang-rank*.txt"))),
    )


def _see_to_the_end(processes: list[Any], notes: Path, began: float) -> None:
    failed: float | None = None
    while any(process.is_alive() for process in processes):
        time.sleep(0.05)
        if (notes / "hang").exists():
            for process in processes:
                signalled(process, signal.SIGCONT)
        if failed is None and any(not process.is_alive() and process.exitcode != 0 for process in processes):
            failed = time.monotonic()
        if (failed is not None and time.monotonic() - failed > launch.LAST_WORDS_S) or time.monotonic() - began > 300:
            for process in processes:
                process.kill()
    for process in processes:
        process.join()


def signalled(process: Any, number: int) -> bool:
    """Send a signal to a process that may end at any moment; whether it was still there."""
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return False
    return True


class FaultRun:
    """A copy of a run that has a checkpoint after its second step of four."""

    def __init__(self, base: Run, work: Path, **values: Any) -> None:
        self.work, self.run_dir = work, work / "run"
        shutil.copytree(base.saving.run_dir, self.run_dir)
        own = {"run_dir": str(self.run_dir), "logging_dir": str(work / "runs")}
        self.job = changed(base.going_on(2, self.run_dir / "iter_0000002"), **own, **values)

    def run(self, fault: str = "", hangs: bool = False, **more: Any) -> Ended:
        """The ranks, with a fault; where one of them stops or `hangs`, the limits are so short that the test sees them."""
        patience = TIMEOUT_S if hangs or ":stop:" in fault else PATIENCE_S
        job = changed(self.job, start_timeout_s=patience, step_timeout_s=patience)
        return run_ranks(job, self.work, fault, **more)

    def newest(self) -> int:
        """Step of the checkpoint that a resumed run takes; every byte is verified."""
        return iteration_of(newest_whole(self.run_dir, verify=True)[0])

    def resume(self) -> Ended:
        """What the same command with --resume true does: clean, choose, go on to the end."""
        clean(self.run_dir)
        path, _ = newest_whole(self.run_dir, verify=True)
        if iteration_of(path) == self.job.schedule.train_iters:
            return Ended([0] * self.job.parallel.world_size, [], "", 0.0, 0)
        self.job = self.job.going_on(iteration_of(path), path)
        return run_ranks(self.job, self.work / "again")

    def rows(self) -> list[dict[str, Any]]:
        lines = (self.run_dir / "logging.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def losses(self) -> list[tuple[str, float, float]]:
        """Step, loss and learning rate of each step in the log."""
        return [(row["global_step/max_steps"], row["loss"], row["learning_rate"]) for row in self.rows() if "loss" in row]


__all__ = ["Ended", "FaultRun", "Run", "asdict", "run_ranks", "signalled"]
