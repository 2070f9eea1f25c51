"""`swift doctor` on machines that are broken on purpose: what it says, what it advises, and its exit code."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megaswift.commands import doctor
from megaswift.commands.doctor import doctor_main, findings_of
from megaswift.config.options import DoctorArguments
from megaswift.errors import RankLostError, UserError
from megaswift.launch import checks, exchange
from megaswift.launch.checks import GIB, Finding
from megaswift.launch.exchange import Exchange, judged, measure
from tests.ranks import RankFailed, RankPool


def found(name: str, output: Path) -> Finding:
    return next(one for one in checks.checks(output) if one.name == name)


def test_this_machine_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind, nothing is asked of a network, and JSON has the same."""
    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "probe", lambda *_: pytest.fail("the network was asked"))
    findings = doctor_main(DoctorArguments(output_dir=str(tmp_path / "out"), json=True))
    told = json.loads(capsys.readouterr().out)
    assert told["starts"] and [one["name"] for one in told["findings"]] == [one.name for one in findings]
    assert {"torch", "megatron-core", "disk", "clock", "cache", "shared memory"} <= {one.name for one in findings}
    assert not list(tmp_path.iterdir())
    doctor_main(DoctorArguments(output_dir=str(tmp_path / "out")))
    assert "a run would start here" in capsys.readouterr().out


def test_every_complaint_has_a_consequence_and_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which everything is wrong at once."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks, "SLOW_DISK", 1e15)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=100 << 20))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setenv("RANK", "0")
    versions = {"torch": None, "transformers": "4.0.0"}
    monkeypatch.setattr(checks, "version_of", lambda name: versions.get(name, "1.0"))
    blocked = tmp_path / "blocked"
    blocked.write_text("a file", encoding="utf-8")
    for name in ("MEGASWIFT_CACHE", "HF_HUB_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(blocked / "below"))
    findings = list(checks.checks(tmp_path))
    complaints = {one.name: one for one in findings if one.state != "ok"}
    for name in ("torch", "transformers", "environment", "shared memory", "open files", "disk", "cache", "Hugging Face cache"):
        assert name in complaints, (name, findings)
    for one in complaints.values():
        assert one.found and one.consequence and one.fix, one
    assert complaints["cache"].state == complaints["torch"].state == complaints["environment"].state == "bad"
    assert "ulimit -n" in complaints["open files"].fix and "--shm-size" in complaints["shared memory"].fix


def test_exit_code_and_error(tmp_path: Path) -> None:
    """As users start it, where the cluster's variables would stop every run."""
    words = [sys.executable, "-m", "megaswift", "doctor", "--output_dir", str(tmp_path), "--json", "true"]
    environment = os.environ | {"LOCAL_RANK": "0", "MEGASWIFT_CACHE": str(tmp_path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no run would start here: environment" in done.stderr
    assert not json.loads(done.stdout)["starts"]


def test_processes_that_do_not_fit_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(processes: int) -> None:
        raise UserError(f"{processes} processes need GPUs.", where="x", fix="NPROC_PER_NODE=1")

    monkeypatch.setattr(checks, "check_devices", refuse)
    one = found("environment", tmp_path)
    assert (one.state, one.fix) == ("bad", "NPROC_PER_NODE=1")


def test_versions_that_do_not_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demands = {
        "vllm": ["torch==2.0.0", "nothing-of-the-kind>=1", "transformers<1; extra == 'old'"],
        "peft": ["transformers>=4"],
    }
    monkeypatch.setattr(checks.metadata, "requires", lambda name: demands.get(name, []))
    [one] = [one for one in checks.checks(tmp_path) if one.name == "vllm with torch"]
    assert one.consequence == "inference by vLLM fails" and one.fix == "pip install --upgrade vllm"
    assert not [one for one in checks.checks(tmp_path) if one.name.startswith("peft with")]


def test_a_clock_that_is_wrong(tmp_path: Path) -> None:
    [early] = checks._clock(tmp_path, lambda: 0.0)
    [right] = checks._clock(tmp_path)
    [late] = checks._clock(tmp_path, lambda: time.time() + 100)
    assert (early.state, right.state, late.state) == ("note", "ok", "note") and "-100 s off" in late.found
    assert early.fix == "sudo timedatectl set-ntp true"


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [absent] = checks._shared_memory(tmp_path / "absent")
    assert absent.state == "note"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=64 << 20))
    assert next(iter(checks._shared_memory(tmp_path))).state == "note"
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=8 * GIB))
    assert next(iter(checks._shared_memory(tmp_path))).state == "ok"


def test_a_card_that_another_program_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    told = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * GIB)
    other = SimpleNamespace(name="NVIDIA V100", major=7, minor=0, total_memory=16 * GIB)
    monkeypatch.setattr(checks, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: (told, other)[n])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda n: ((40 * GIB, 80 * GIB), (16 * GIB, 16 * GIB))[n])
    states = [(one.name, one.state) for one in checks._gpus() if one.name != "driver"]
    assert states == [("GPU 0", "note"), ("GPU 1", "ok"), ("GPU 1", "note"), ("cards", "note")]


@pytest.mark.parametrize(("capability", "named"), [((9, 0), ["triton", "flash-attn-4"]), ((8, 0), ["triton"])])
def test_slow_paths_have_a_price(capability: tuple[int, int], named: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What this card could run and is not there, each in a line; nothing on a CPU, and nothing when all is well."""
    import torch

    versions: dict[str, str | None] = {"triton": None, "flash-attn-4": None}
    monkeypatch.setattr(checks, "version_of", lambda name: versions.get(name, "1.0"))
    assert not list(checks.slow_paths())
    monkeypatch.setattr(checks, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    lines = list(checks.slow_paths())
    assert [line.split()[0] for line in lines] == named
    assert all("pip install" in line for line in lines)
    monkeypatch.setattr(checks, "declared", dict)
    versions.update({"triton": "3.6.0", "flash-attn-4": "4.0.0"})
    assert not list(checks.slow_paths())


def test_a_check_that_fails_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("driver says no")

    monkeypatch.setattr(checks, "_gpus", broken)
    [one] = [one for one in checks.checks(tmp_path) if "driver says no" in one.found]
    assert one.state == "note"


def test_hubs_are_asked_when_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", lambda addresses: ["", "no route"])
    monkeypatch.setattr(doctor, "checks", lambda _: [])
    found = doctor_main(DoctorArguments(network=True))
    assert [one.state for one in found] == ["ok", "note"] and "no route" in found[1].found


def test_who_is_slow() -> None:
    even = {"0-1": 0.010, "0-2": 0.011, "1-2": 0.009, "0-3": 0.010, "1-3": 0.010, "2-3": 0.012}
    assert judged(even, 4) == ([], [])
    assert judged(even | {"0-2": 0.1, "1-2": 0.1, "2-3": 0.12}, 4) == ([2], [])
    assert judged(even | {"1-3": 0.2}, 4) == ([], ["1-3"])
    assert judged({"0-1": 5.0}, 2) == ([], []), "of two nobody can say"
    assert judged({"0-1": 1e-4, "0-2": 1e-3, "1-2": 1e-3}, 3) == ([], []), "too short to say"


def test_findings_of_an_exchange() -> None:
    made = Exchange(3, "gloo", 1e9, 1e9, 4, {"0-1": 0.01, "0-2": 0.1, "1-2": 0.1}, [2], [], ["a", "b", "c"])
    assert [(one.name, one.state) for one in findings_of(made)] == [("exchange", "ok"), ("rank 2", "note")]
    assert "machine c" in findings_of(made)[1].found
    assert Exchange(**json.loads(json.dumps(asdict(made)))) == made


def exchanged(slow: int | None) -> tuple[list[int], float]:
    """Of a pooled rank, one of which is slow whenever it answers another."""
    real = exchange._there_and_back

    def late(message: Any, rank: int, first: int, second: int) -> None:
        if rank == slow and rank in (first, second):
            time.sleep(0.05)
        real(message, rank, first, second)

    with mock.patch.object(exchange, "_there_and_back", late):
        found = measure(size=1 << 18, pair=1 << 16, repeats=5)
    return found.slow, found.all_reduce


@pytest.mark.parametrize("slow", [None, 1])
def test_a_slow_rank_is_named_by_all(slow: int | None, pool: RankPool) -> None:
    results = pool.run(3, exchanged, slow)
    assert [one for one, _ in results] == [[] if slow is None else [slow]] * 3
    assert all(speed > 0 for _, speed in results)


def waits(silent: int) -> str:
    """Of a pooled rank; one of them never comes to an exchange."""
    if int(os.environ["RANK"]) == silent:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        dist.new_group(backend="gloo")
        time.sleep(4)
        return "slept"
    try:
        measure(size=1 << 16, pair=1 << 12, repeats=1, limit_s=1.5)
    except RankLostError as error:
        return error.what
    return "nothing was noticed"


def test_a_silent_rank_is_named(pool: RankPool) -> None:
    try:
        results = pool.run(3, waits, 2)
    except RankFailed as error:
        pytest.fail(str(error))
    assert results[0] == "rank 2 does not answer within 1.5 s." and results[2] == "slept"


def test_the_exchange_as_users_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        sys.executable,
        "-m",
        "megaswift",
        "doctor",
        "--output_dir",
        str(tmp_path),
        "--distributed",
        "true",
        "--json",
        "true",
    ]
    environment = os.environ | {"MEGASWIFT_CACHE": str(tmp_path), "NPROC_PER_NODE": "2"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["exchange"]["world_size"] == 2 and list(told["exchange"]["pairs"]) == ["0-1"]


def test_an_exchange_that_fails_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RankLostError("rank 2 does not answer within 20 s.", where="rank 0", fix="see whether it lives")

    monkeypatch.setenv("NPROC_PER_NODE", "3")
    monkeypatch.setattr(doctor, "checks", lambda _: [])
    monkeypatch.setattr("megaswift.launch.agent.start_ranks", fails)
    with pytest.raises(UserError, match="no run would start here: exchange: rank 2 does not answer") as caught:
        doctor_main(DoctorArguments(distributed=True))
    assert caught.value.fix == "see whether it lives"
