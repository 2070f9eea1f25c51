"""A whole `swift sft` in processes of its own, for signals that must find the real launcher and the real ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megaswift.errors import DataError
from megaswift.run.resume import newest_whole
from megaswift.store.paths import candidates, iteration_of
from tests.faults.table import add

PATIENCE_S = 150.0  # start-up on a busy machine
# 127.0.0.1, ::1 and ::ffff:127.0.0.1 as /proc/net writes them
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


class Live:
    """`swift sft` on a tiny model, in a session of its own as a terminal would make it."""

    def __init__(
        self,
        start: tuple[Path, Path],
        output: Path,
        *words: str,
        processes: int = 2,
        before: tuple[str, ...] = (),
        cwd: Path | None = None,
        **environment: str,
    ) -> None:
        self.output, self.fault = output, ""
        self.log = output.parent / f"{output.name}{time.monotonic_ns()}.log"
        command = [
            *before, sys.executable, "-P", "-m", "megaswift", "sft", "--resume_from_checkpoint", str(start[0]), "--dataset", str(start[1]), "--max_steps", "5000", "--pp", "2",
            "--output_dir", str(output), "--logging_steps", "1", "--learning_rate", "1e-4", "--save_steps", "4000", "--eval_steps", "4000", "--resume", "true", *words,
        ]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=cwd,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests themselves may run under nohup
                env={**os.environ, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": str(processes), **environment},
            )  # fmt: skip

    @property
    def ranks(self) -> list[int]:
        """Process ids of the ranks, in rank order."""
        found = []
        for pid in children(self.process.pid):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:  # it ended meanwhile
                continue
            rank = [word for word in environment if word.startswith(b"RANK=")]
            if rank:
                found.append((int(rank[0][5:]), pid))
        return [pid for _, pid in sorted(found)]

    @property
    def run_dir(self) -> Path:
        return next(self.output.rglob("run.json")).parent

    def steps(self) -> list[int]:
        try:
            lines = (self.run_dir / "logging.jsonl").read_text().splitlines()
        except (FileNotFoundError, StopIteration):
            return []
        return [int(row["global_step/max_steps"].split("/")[0]) for row in map(json.loads, lines) if "loss" in row]

    def wait_for_steps(self, more: int = 2) -> None:
        """Until it has made some steps from where it began."""
        first, deadline = len(self.steps()), time.monotonic() + PATIENCE_S
        while len(self.steps()) < first + more:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def end(self, fault: str, within: float = 60.0) -> int:
        """Its exit code; every process must be gone, and every port closed, in time."""
        began, ranks = time.monotonic(), self.ranks
        code = self.process.wait(within)
        while any(alive(pid) for pid in ranks):
            assert time.monotonic() - began < within, f"orphans: {ranks}"
            time.sleep(0.1)
        self.fault = fault
        add(fault, f"all processes gone after {time.monotonic() - began:.0f} s, exit code {code}", self.left())
        return code

    def left(self) -> str:
        """What a resumed run would find, every byte of it read."""
        if not list(self.output.rglob("run.json")):
            return "no run had begun"
        try:
            return f"the checkpoint of step {iteration_of(newest_whole(self.run_dir, verify=True)[0])} is whole"
        except DataError:
            assert not candidates(self.run_dir), "a checkpoint that is not whole"
            return "no checkpoint had been due"

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def stop(self) -> None:
        """For the end of a test, however it went."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in task.read_text().split()]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def listening(pids: list[int]) -> list[str]:
    """Addresses on which processes listen, as /proc writes them: hexadecimal, in the machine's byte order."""
    sockets: set[str] = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(handle)
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in sockets:
                found.append(words[1].split(":")[0])
    return found


def send(pid: int, number: int) -> None:
    """A signal to one process."""
    os.kill(pid, number)
