"""What torch's exceptions are taken for: the line that says why is shown, and a cause is not called a lost connection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megaswift.launch import agent as launch

KNOBS = ("--batch_size", "--max_length", "--gradient_checkpointing true", "--tp")
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, {} (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError(
            NCCL.format("unhandled cuda error")
            + "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
        ),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 GiB."),  # by its kind, whatever device it names
    ],
    ids=["nccl", "kernel", "cublas", "allocator"],
)
def test_a_gpu_without_memory_whoever_tells_it(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the cause, not a lost connection, and the line that says so is shown."""
    monkeypatch.setenv(launch.ERROR_DIR, str(tmp_path))
    monkeypatch.delenv(launch.LAUNCHER, raising=False)
    assert _ended_with(error) == 2
    report = json.loads((tmp_path / "rank00000.json").read_text())
    assert report["what"].startswith("the GPU is out of memory: ")
    assert "out of memory" in report["what"].split(": ", 1)[1] or "ALLOC_FAILED" in report["what"]
    assert not report["second"]
    assert all(knob in report["fix"] for knob in KNOBS)


@pytest.mark.parametrize(
    ("text", "what", "second"),
    [
        (
            NCCL.format("invalid usage")
            + "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
            "NCCL failed on rank 0: ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0",
            False,
        ),
        (
            NCCL.format("remote process exited or there was a network error")
            + "ncclRemoteError: A call failed possibly due to a network error.\nLast error:\nsocketProgress: Connection closed by remote peer node7<4711>",
            "lost the connection to another rank: ncclRemoteError: socketProgress: Connection closed by remote peer node7",
            True,
        ),
        ("Connection closed by peer [127.0.0.1]:4711", "lost the connection to another rank: Connection closed by peer", True),
    ],
    ids=["usage", "remote", "gloo"],
)
def test_what_nccl_says_is_shown(text: str, what: str, second: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.ERROR_DIR, str(tmp_path))
    monkeypatch.delenv(launch.LAUNCHER, raising=False)
    assert _ended_with(torch.distributed.DistBackendError(text)) == 5
    report = json.loads((tmp_path / "rank00000.json").read_text())
    assert what in report["what"]
    assert report["second"] is second


def _ended_with(error: Exception) -> int:
    def work() -> None:
        raise error

    return launch.report_from_rank(work)
