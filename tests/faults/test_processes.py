"""Signals and kills at the real launcher and the real ranks: no orphan, no open port, the right exit code, and it goes on.

And what surrounds a launcher: terminals that close, other machines that do not come, the caller's own processes and files.
"""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from megaswift.run.resume import newest_whole
from megaswift.store.paths import iteration_of
from tests.faults import table
from tests.faults.conftest import ALL
from tests.faults.live import LOOPBACK, PATIENCE_S, Live, alive, children, listening, send
from tests.ranks import free_port
from tests.training import write_rows

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
    assert json.loads((run.run_dir / "run.json").read_text())["schedule"]["first_step"] == 0
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
    assert "train/trainer.py" in (run.run_dir / "hang-rank0.txt").read_text()


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


def until(there: Callable[[], Any], run: Live | None = None, within: float = PATIENCE_S) -> Any:
    """What `there` gives, once it gives something."""
    deadline = time.monotonic() + within
    while not (found := there()):
        assert time.monotonic() < deadline, run.text() if run else "it did not come"
        assert run is None or run.process.poll() is None, run.text()
        time.sleep(0.05)
    return found


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_nohup(live: Callable[..., Live]) -> None:
    """A closed terminal does nothing to it, neither to the launcher nor to the ranks."""
    run = live(before=("nohup",))
    run.wait_for_steps()
    for pid in [run.process.pid, *run.ranks]:
        send(pid, signal.SIGHUP)
    time.sleep(1)
    run.wait_for_steps()
    send(run.process.pid, signal.SIGTERM)
    assert run.end("SIGHUP under nohup, then SIGTERM") == 75, run.text()
    assert "stopped by SIGTERM after step" in run.text()


@thorough
def test_sighup(live: Callable[..., Live]) -> None:
    """It orders a stop as SIGTERM does, however often it comes, and is not taken for the second order."""
    run = live()
    run.wait_for_steps()
    for _ in range(3):
        send(run.process.pid, signal.SIGHUP)
        time.sleep(0.1)
    assert run.end("SIGHUP") == 75, run.text()
    assert "stopped by SIGHUP after step" in run.text()
    assert run.text().count("error:") == 1
    assert iteration_of(newest_whole(run.run_dir, verify=True)[0]) == run.steps()[-1]


@thorough
def test_sigquit(live: Callable[..., Live]) -> None:
    run = live()
    run.wait_for_steps()
    send(run.process.pid, signal.SIGQUIT)
    assert run.end("SIGQUIT") == 75, run.text()
    assert "ended at once by SIGQUIT" in run.text()
    assert "start all machines" not in run.text()


def test_a_closed_terminal(start: tuple[Path, Path], tmp_path: Path) -> None:
    """The checkpoint is saved although nothing can be written to the terminal any more."""
    terminal, inner = pty.openpty()
    command = [
        sys.executable, "-m", "megaswift", "sft", "--resume_from_checkpoint", str(start[0]), "--dataset", str(start[1]), "--max_steps", "5000", "--pp", "2",
        "--output_dir", str(tmp_path / "output"), "--logging_steps", "1", "--save_steps", "4000", "--eval_steps", "4000",
    ]  # fmt: skip

    def in_the_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True, preexec_fn=in_the_terminal,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2"},
    )  # fmt: skip
    try:
        os.close(inner)
        run_dir, said, deadline = None, b"", time.monotonic() + PATIENCE_S
        while run_dir is None or len(run_dir.read_text().splitlines()) < 3:
            assert time.monotonic() < deadline, said
            assert process.poll() is None, said
            if select.select([terminal], [], [], 0.1)[0]:
                said += os.read(terminal, 65536)
            run_dir = next((tmp_path / "output").rglob("logging.jsonl"), None)
        os.close(terminal)
        assert process.wait(60) == 75
    finally:
        process.kill()
    directory = run_dir.parent
    last = run_dir.read_text().count('"loss"')
    assert iteration_of(newest_whole(directory, verify=True)[0]) == last


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core prepares data in one process")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=thorough)])
def test_a_signal_to_all_while_data_is_prepared(number: signal.Signals, live: Callable[..., Live], tmp_path: Path) -> None:
    """A terminal sends SIGINT to the processes that tokenize as well: the end is that of one signal, and nothing is left."""
    rows, cache = write_rows(tmp_path / "many.jsonl", 400_000), tmp_path / "cache"
    run = live("--dataset", str(rows), MEGASWIFT_CACHE=str(cache))
    workers = until(lambda: len(children(run.process.pid)) > 1 and children(run.process.pid), run)
    time.sleep(0.5)
    os.killpg(run.process.pid, number)
    assert run.end(f"{number.name} to all processes while data is tokenized") == 75, run.text()
    assert f"stopped by {number.name} before training began" in run.text()
    assert "Traceback" not in run.text()
    assert not [pid for pid in workers if alive(pid)]
    assert not list(cache.rglob("*.tmp-*"))


@thorough
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core prepares data in one process")
def test_a_kill_while_data_is_prepared(live: Callable[..., Live], tmp_path: Path) -> None:
    """No process that tokenizes outlives the one that was killed."""
    rows = write_rows(tmp_path / "many.jsonl", 400_000)
    run = live("--dataset", str(rows), MEGASWIFT_CACHE=str(tmp_path / "cache"))
    workers = until(lambda: len(children(run.process.pid)) > 1 and children(run.process.pid), run)
    time.sleep(0.5)
    send(run.process.pid, signal.SIGKILL)
    run.process.wait(10)
    until(lambda: not [pid for pid in workers if alive(pid)], within=30)


@pytest.mark.parametrize("machine", [0, 1])
def test_a_signal_while_the_others_are_awaited(machine: int, live: Callable[..., Live], tmp_path: Path) -> None:
    """The first one ends it: no rank is there yet that could obey."""
    port, cache = free_port(), tmp_path / "cache"
    run = live(
        processes=1, NNODES="2", NODE_RANK=str(machine), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), MEGASWIFT_CACHE=str(cache)
    )  # fmt: skip
    until(lambda: listens(port) if machine == 0 else list(cache.glob("run-*.json")), run)
    time.sleep(1.5)
    send(run.process.pid, signal.SIGTERM)
    assert run.process.wait(30) == 75, run.text()
    assert "stopped by SIGTERM before training began" in run.text()
    assert "Traceback" not in run.text()


def test_two_machines_meet(start: tuple[Path, Path], tmp_path: Path) -> None:
    """The second comes late; who only looks at the port disturbs nobody."""
    port = free_port()
    place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    first = Live(start, tmp_path / "output", "--max_steps", "2", processes=1, NODE_RANK="0", **place)
    second = None
    try:
        until(lambda: listens(port), first)
        second = Live(start, tmp_path / "output", "--max_steps", "2", processes=1, NODE_RANK="1", **place)
        assert [run.process.wait(PATIENCE_S) for run in (first, second)] == [0, 0], first.text() + second.text()
    finally:
        first.stop()
        if second is not None:
            second.stop()
    assert first.steps() == [1, 2]


SCRIPT = """
import signal, subprocess, sys, time
from megaswift import SftArguments, sft_main
from megaswift.launch import agent

agent.LAST_WORDS_S = 1.0
failed = subprocess.Popen(["false"], start_new_session=True)
sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
numbers = (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGINT)
signal.signal(signal.SIGHUP, lambda *_: None)
before = [signal.getsignal(number) for number in numbers]
try:
    sft_main(SftArguments(
        resume_from_checkpoint=sys.argv[1], dataset=[sys.argv[2]], output_dir=sys.argv[3], max_steps=3, pp=2, eval_steps=100
    ))
    assert sleeper.poll() is None, "the sleeper was killed"
    assert [signal.getsignal(number) for number in numbers] == before, "handlers were not restored"
finally:
    sleeper.kill()
print("all is well")
"""


def test_a_script_with_children_of_its_own(start: tuple[Path, Path], tmp_path: Path) -> None:
    """One that failed is not taken for a rank, one that sleeps is not killed, and signal handlers are the caller's again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, str(script), str(start[0]), str(start[1]), str(tmp_path / "output")], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2"}, timeout=PATIENCE_S,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "all is well" in ended.stdout


def test_modules_in_the_working_directory(live: Callable[..., Live], tmp_path: Path) -> None:
    """A numpy.py there is a file like any other, for ranks and copies too; PYTHONPATH works as ever."""
    here, path, ran = tmp_path / "here", tmp_path / "path", tmp_path / "ran"
    for directory in (here, path, ran):
        directory.mkdir()
    (here / "numpy.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w').close()\nraise SystemExit('numpy.py was executed')\n"
    )
    (path / "sitecustomize.py").write_text(
        f"import os, sys\nopen({str(ran)!r} + f'/{{os.getpid()}}', 'w').write(os.environ.get('RANK', '') + ' '.join(sys.orig_argv))\n"
    )
    run = live(
        "--max_steps",
        "2",
        "--save_steps",
        "1",
        "--save_safetensors",
        "true",
        cwd=here,
        PYTHONPATH=os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])]),
    )
    assert run.process.wait(PATIENCE_S) == 0, run.text()
    assert not (tmp_path / "executed").exists()
    told = [file.read_text() for file in ran.iterdir()]
    assert {"0", "1"} <= {text[:1] for text in told}
    assert any("--hf_output_dir" in text for text in told)


@pytest.mark.parametrize(
    "stray", [{"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}, {"WORLD_SIZE": "4"}], ids=lambda words: ",".join(words)
)
def test_one_process_in_the_environment_of_a_cluster(stray: dict[str, str], start: tuple[Path, Path], tmp_path: Path) -> None:
    """Without RANK it is alone, whatever else is set."""
    command = [
        sys.executable, "-m", "megaswift", "sft", "--resume_from_checkpoint", str(start[0]), "--dataset", str(start[1]), "--max_steps", "1",
        "--output_dir", str(tmp_path / "output"),
    ]  # fmt: skip
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env={**os.environ, "OMP_NUM_THREADS": "1", **stray}
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
