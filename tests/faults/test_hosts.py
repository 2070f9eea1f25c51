"""Two machines: two network namespaces, a cable between them, one rank in each; the cable is cut."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import table
from tests.faults.conftest import ALL

NAMES = ("megaswift-a", "megaswift-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
pytestmark = pytest.mark.skipif(not ALL, reason="a part of make faults")


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two namespaces that reach each other."""
    remove()  # what a killed test run left
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "megaswift0", "netns", NAMES[0], "type", "veth", "peer", "name", "megaswift1", "netns", NAMES[1])
        for k, (name, address) in enumerate(zip(NAMES, ADDRESSES)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"megaswift{k}")
            ip("-n", name, "link", "set", f"megaswift{k}", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except OSError as error:
        remove()
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield
    remove()


def remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def begin(machine: int, start: tuple[Path, Path], work: Path, steps: int) -> tuple[subprocess.Popen[str], Path]:
    """`swift sft` on one of the two machines; the files are shared."""
    log = work / f"machine{machine}.log"
    command = [
        "ip", "netns", "exec", NAMES[machine], sys.executable, "-m", "megaswift", "sft", "--resume_from_checkpoint", str(start[0]), "--dataset", str(start[1]),
        "--pp", "2", "--max_steps", str(steps), "--output_dir", str(work / "output"), "--logging_steps", "1", "--save_steps", "4000", "--eval_steps", "4000",
        "--step_timeout", "10", "--start_timeout", "120", "--resume", "true",
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "NNODES": "2", "NODE_RANK": str(machine), "NPROC_PER_NODE": "1", "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29600", "GLOO_SOCKET_IFNAME": f"megaswift{machine}",
    }  # fmt: skip
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
        ), log


def test_two_machines_train_and_one_is_cut_off(hosts: None, start: tuple[Path, Path], tmp_path: Path) -> None:
    processes, logs = zip(*(begin(machine, start, tmp_path, 4) for machine in (0, 1)))
    try:
        assert [process.wait(300) for process in processes] == [0, 0], logs[0].read_text() + logs[1].read_text()
        run = next((tmp_path / "output").rglob("iter_0000004")).parent
        assert sorted(path.name for path in (run / "iter_0000004").glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]

        processes, logs = zip(*(begin(machine, start, tmp_path, 5000) for machine in (0, 1)))
        deadline = time.monotonic() + 200
        while len((run / "logging.jsonl").read_text().splitlines()) < 12:
            assert time.monotonic() < deadline, logs[0].read_text()
            time.sleep(0.2)
        ip("-n", NAMES[1], "link", "set", "megaswift1", "down")
        began = time.monotonic()
        assert processes[0].wait(120) == 5, logs[0].read_text()
        took = time.monotonic() - began
        text = logs[0].read_text()
        assert "stood still for" in text or "lost the connection" in text, text
        assert "Traceback" not in text, text
        assert processes[1].wait(120) == 5, logs[1].read_text()
        table.add(
            "two machines, the network of one is cut",
            f"the other ended with 5 after {took:.0f} s",
            "checkpoints of before the cut are whole",
        )
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
