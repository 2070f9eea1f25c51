"""A machine that cannot do it: versions, GPUs and memory are told in one message with what was found, what is needed and what to turn."""

from __future__ import annotations

import shutil
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.cli import main
from megaswift.commands import sft
from megaswift.config.options import SftArguments
from megaswift.errors import UserError
from megaswift.launch import agent as launch
from megaswift.launch import versions
from megaswift.run.spec import Run
from tests.faults.harness import FaultRun
from tests.runs import changed

KNOBS = ("--batch_size", "--max_length", "--gradient_checkpointing true", "--tp")


@pytest.mark.parametrize(("package", "found"), [("torch", "2.9.1"), ("megatron-core", "0.14.0"), ("transformers", "4.57.1"), ("megatron-core", None)])  # fmt: skip
def test_packages_of_another_version(
    package: str, found: str | None, start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plain = metadata.version

    def version(name: str) -> str:
        if name == package and found is None:
            raise metadata.PackageNotFoundError(name)
        return found if name == package and found else plain(name)

    monkeypatch.setattr(metadata, "version", version)
    words = [
        "sft",
        "--resume_from_checkpoint",
        str(start[0]),
        "--dataset",
        str(start[1]),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert f"error: {package} <" in said
    assert f"is needed, {found or 'none'} is installed" in said
    assert "fix:   pip install" in said
    assert not (tmp_path / "out").exists()


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    versions.check_devices(2)
    with pytest.raises(UserError, match="4 processes need 4 GPUs, 2 are visible") as caught:
        versions.check_devices(4)
    assert "NPROC_PER_NODE=2" in caught.value.fix


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(versions, "_gpus", list)
    versions.check_devices(4)
    monkeypatch.setattr(versions, "_gpus", lambda: [Path("/dev/nvidia0")])
    with pytest.raises(UserError, match=r"has 1 NVIDIA GPUs, but torch .*CUDA") as caught:
        versions.check_devices(1)
    assert torch.__version__ in caught.value.what
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the CPU is asked for
    versions.check_devices(1)


def beyond_the_host() -> None:
    """Each step asks the allocator for more than any machine has."""
    from megaswift.train.trainer import Trainer

    Trainer.step = lambda self, batches: torch.empty(10**15)  # type: ignore[method-assign]


def beyond_the_gpu() -> None:
    """As CUDA's allocator says it."""
    from megaswift.train.trainer import Trainer

    def step(self: Any, batches: Any) -> Any:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is free."
        )

    Trainer.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [(beyond_the_host, "you tried to allocate 4000000000000000 bytes"), (beyond_the_gpu, "of which 1.25 GiB is free")],
)
def test_out_of_memory_on_ranks(prepare: Any, words: str, base: Run, straight: FaultRun, tmp_path: Path) -> None:
    case = FaultRun(base, tmp_path)
    ended = case.run(prepare=prepare)
    assert ended.codes == [2, 2], ended.output
    assert "Traceback" not in ended.output
    for report in ended.own:
        assert "out of memory" in report["what"]
        assert words in report["what"]
        assert all(knob in report["fix"] for knob in KNOBS)
    assert case.resume().codes == [0, 0]
    assert case.losses() == straight.losses()


def test_out_of_memory_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has no launcher beside it: the error is the same."""
    monkeypatch.setattr("megaswift.train.loop.train", lambda job: torch.empty(10**15))
    with pytest.raises(UserError, match="this machine is out of memory") as caught:
        sft._run_here(None)
    assert all(knob in caught.value.fix for knob in KNOBS)
    monkeypatch.setattr("megaswift.train.loop.train", lambda job: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):  # a defect is not called memory
        sft._run_here(None)


def test_other_errors_are_no_lack_of_memory() -> None:
    assert launch.out_of_memory(ValueError("memory")) is None
    assert launch.out_of_memory(MemoryError()) is not None


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE='two' is not a whole number"),
        ({"NPROC_PER_NODE": "0"}, "do not fit together"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "do not fit together"),
        ({"NNODES": "2"}, "several machines need to know where rank 0 is"),
        ({"RANK": "0"}, "RANK=0 is set: it was started by torchrun, or the cluster sets it(.|\n)*env -u RANK -u WORLD_SIZE"),
    ],
    ids=str,
)
def test_environments_that_cannot_be(
    environment: dict[str, str], words: str, start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        sft.sft_main(
            SftArguments(resume_from_checkpoint=str(start[0]), dataset=[str(start[1])], output_dir=str(tmp_path / "out"))
        )
    assert not (tmp_path / "out").exists()


def lose(directory: str) -> None:
    """In this process: remove a directory while the first step is made."""
    from megaswift.train.trainer import Trainer

    plain = Trainer.gradients

    def gradients(self: Any, batches: Any) -> Any:
        shutil.rmtree(directory, ignore_errors=True)
        return plain(self, batches)

    Trainer.gradients = gradients  # type: ignore[method-assign]


def test_a_start_that_goes_away_stops_no_save(base: Run, straight: FaultRun, tmp_path: Path) -> None:
    """Moved, or converted anew, while the run goes on: what the weights were made from was read with them."""
    case, home = FaultRun(base, tmp_path), tmp_path / "home"
    shutil.copytree(base.model.directory, home)
    case.job = changed(case.job, directory=str(home))
    ended = case.run(prepare=partial(lose, str(home)))
    assert ended.codes == [0, 0], ended.output
    assert not home.exists()
    assert case.newest() == 4
    assert case.losses() == straight.losses()
