"""A thread that ends a rank which stands still: it writes the stacks of all its threads first.

One rank that is overdue tells the others by a file, so that the stacks of every rank are kept: the one that waits
shows in which collective, the one that is late shows where it is.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from megaswift.errors import RankLostError
from megaswift.launch import agent

GRACE_S = 3.0  # in which the other ranks write their stacks


class Watchdog:
    """Watches that `beat` is called in time.

    Args:
        directory: where hang-rankN.txt goes.
        start_s: seconds allowed for start-up, loading and saving.
        step_s: seconds allowed for one step.
    """

    def __init__(self, directory: Path, rank: int, start_s: float, step_s: float) -> None:
        self.directory, self.rank, self.start_s, self.step_s = directory, rank, start_s, step_s
        self._over = threading.Event()
        self._next = ("start-up", time.monotonic(), start_s, "--start_timeout")

    def beat(self, what: str) -> None:
        """Something was finished; the next thing has the time of a step."""
        self._stay()
        self._next = (what, time.monotonic(), self.step_s, "--step_timeout")

    def long(self, what: str) -> None:
        """What comes now may take as long as a start."""
        self._stay()
        self._next = (what, time.monotonic(), self.start_s, "--start_timeout")

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._stay()
        self._over.set()

    def _stay(self) -> None:
        """Where the run was found to hang it does not go on, even if the late rank came back: the verdict stands."""
        while agent.hang_reported():
            time.sleep(0.1)

    def _watch(self) -> None:
        while not self._over.wait(min(0.5, self.step_s / 10)):
            what, since, limit, option = self._next
            late = time.monotonic() - since
            if late < limit and not agent.hang_reported():
                continue
            agent.report_hang()
            file = self._write_stacks(what, late)
            if late >= limit:
                agent.report(
                    RankLostError(
                        f"rank {self.rank} stood still for {late:.0f} s in {what} ({option} is {limit:g}); the run was ended.",
                        where=f"stacks of all ranks: {file.parent}/hang-rank*.txt",
                        fix=f"look there which rank is late; the same command with --resume true goes on; raise {option} if it was only slow",
                    )
                )
            time.sleep(GRACE_S)
            os._exit(RankLostError.exit_code)

    def _write_stacks(self, what: str, late: float) -> Path:
        file = self.directory / f"hang-rank{self.rank}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as stacks:
            stacks.write(
                f"rank {self.rank}, process {os.getpid()}, {datetime.datetime.now():%Y-%m-%d %H:%M:%S}: {late:.1f} s in {what}\n\n"
            )
            stacks.flush()
            faulthandler.dump_traceback(stacks, all_threads=True)
        return file
