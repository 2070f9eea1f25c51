"""Signals and kills at the real launcher and the real ranks: no orphan, no open port, the right exit code, and it goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megaswift.checkpoint.layout import iteration_of
from megaswift.checkpoint.resume import newest_whole
from tests.faults import table
from tests.faults.conftest import ALL
from tests.faults.live import LOOPBACK, Live, listening, send

thorough = pytest.mark.skipif(not ALL, reason="a part of make faults")


def goes_on(run: Live, live: Callable[..., Live], least: int) -> None:
    """The same command takes the saved step up, and the lock of the ended run."""
    again = live()
    again.wait_for_steps(1)
    send(again.process.pid, signal.SIGTERM)
    assert again.process.wait(60) == 75, again.text()
    assert again.run_dir == run.run_dir or least == 0
    steps = again.steps()
    assert steps == list(range(1, len(steps) + 1)), "each step stands in the log once"
    assert len(steps) > least
    table.add(f"{run.fault}: the same command again", f"went on from step {least}", "each step stands in the log once")


@thorough
def test_a_job_that_is_requeued_again_and_again(live: Callable[..., Live]) -> None:
    """Three times the same command and SIGTERM: every time it goes on, and each step stands in the log once."""
    last = 0
    for _ in range(3):
        run = live()
        run.wait_for_steps(1)
        send(run.process.pid, signal.SIGTERM)
        assert run.end("the same command ended by SIGTERM, three times") == 75, run.text()
        steps = run.steps()
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > last
        last = len(steps)


def test_sigterm_to_the_launcher(live: Callable[..., Live]) -> None:
    """It saves and ends with 75; meanwhile nobody else may use the run, and nothing listens beyond this machine."""
    run = live()
    run.wait_for_steps()
    found = listening([run.process.pid, *run.ranks])
    assert found
    assert set(found) <= LOOPBACK, found
    second = live("--max_steps", "3")
    assert second.process.wait(90) == 2, second.text()
    assert "in use by" in second.text()
    send(run.process.pid, signal.SIGTERM)
    assert run.end("SIGTERM to the launcher") == 75, run.text()
    assert run.text().count("error:") == 1
    assert "stopped by SIGTERM after step" in run.text()
    saved = iteration_of(newest_whole(run.run_dir, verify=True)[0])
    assert saved == run.steps()[-1]
    assert json.loads((run.run_dir / "job.json").read_text())["first_step"] == 0
    goes_on(run, live, saved)


def test_kill_of_the_launcher(live: Callable[..., Live]) -> None:
    """The ranks do not outlive it; its lock is taken over."""
    run = live("--save_steps", "2")
    run.wait_for_steps(4)
    ranks = run.ranks
    send(run.process.pid, signal.SIGKILL)
    assert run.end("SIGKILL of the launcher", within=20) == -9
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]
    goes_on(run, live, 2)


def test_a_stopped_rank(live: Callable[..., Live]) -> None:
    """The others find out in time; every rank leaves its stacks, the late one too."""
    run = live("--step_timeout", "6", "--start_timeout", "100")
    run.wait_for_steps()
    send(run.ranks[1], signal.SIGSTOP)
    assert run.end("SIGSTOP of a rank, --step_timeout 6", within=60) == 5, run.text()
    assert "stood still for" in run.text()
    assert "--step_timeout is 6" in run.text()
    assert run.text().count("error:") == 1
    stacks = sorted(path.name for path in run.run_dir.glob("hang-rank*.txt"))
    assert stacks == ["hang-rank0.txt", "hang-rank1.txt"]
    assert "engine/step.py" in (run.run_dir / "hang-rank0.txt").read_text()


@thorough
def test_control_c(live: Callable[..., Live]) -> None:
    """A terminal sends SIGINT to the launcher and to all that belong to it."""
    run = live()
    run.wait_for_steps()
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end("Ctrl-C") == 75, run.text()
    assert "stopped by SIGINT after step" in run.text()


@thorough
def test_sigterm_to_every_process(live: Callable[..., Live]) -> None:
    """Some schedulers signal each process of a job."""
    run = live()
    run.wait_for_steps()
    for pid in [run.process.pid, *run.ranks]:
        send(pid, signal.SIGTERM)
    assert run.end("SIGTERM to the launcher and all ranks") == 75, run.text()


@thorough
def test_the_second_signal(live: Callable[..., Live]) -> None:
    run = live("--step_timeout", "100")
    run.wait_for_steps()
    send(run.ranks[0], signal.SIGSTOP)  # so that the first cannot be obeyed
    send(run.process.pid, signal.SIGTERM)
    time.sleep(1)
    began = time.monotonic()
    send(run.process.pid, signal.SIGTERM)
    assert run.end("SIGTERM twice to the launcher, a rank stopped") == 128 + signal.SIGTERM
    assert time.monotonic() - began < 10


@thorough
@pytest.mark.parametrize("wait", [0.4, 3.0, 8.0])
def test_sigterm_before_the_first_step(wait: float, live: Callable[..., Live]) -> None:
    run = live()
    time.sleep(wait)
    if run.process.poll() is None and b"megaswift" in Path(f"/proc/{run.process.pid}/cmdline").read_bytes():
        send(run.process.pid, signal.SIGTERM)
    assert run.end(f"SIGTERM {wait:g} s after the start") in (75, -15), run.text()
    assert "Traceback" not in run.text()


@thorough
def test_kill_of_a_rank(live: Callable[..., Live]) -> None:
    run = live("--save_steps", "2")
    run.wait_for_steps(4)
    send(run.ranks[1], signal.SIGKILL)
    assert run.end("SIGKILL of rank 1") == 5, run.text()
    assert "rank 1 was ended by SIGKILL" in run.text()
    assert "Traceback" not in run.text()
    goes_on(run, live, 2)
