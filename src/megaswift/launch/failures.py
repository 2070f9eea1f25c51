"""What an exception of torch says about a run: memory that is too small, NCCL that fails, another rank that is gone."""

from __future__ import annotations

import os
import re

from megaswift.errors import RankLostError, UserError


def connection_lost(error: Exception) -> RankLostError | None:
    """Another rank is gone: a consequence, told only if nobody reports the cause."""
    text = str(error)
    if not any(
        mark in text
        for mark in (
            "Connection closed by peer",
            "Connection reset",
            "Broken pipe",
            "Timed out waiting",
            "NCCL",
            "Socket Timeout",
            "connectFullMesh",
            "timed out after",
        )
    ):
        return None
    return RankLostError(
        f"rank {os.environ.get('RANK', '0')} lost the connection to another rank: {_reason(text)}",
        where="the network, or a rank on another machine",
        fix="see the messages of the other machines; the same command with --resume true goes on",
    )


def nccl_failed(error: Exception) -> RankLostError | None:
    """NCCL was used wrongly or met an error of this GPU: no other rank is to blame."""
    text = str(error)
    if not any(kind in text for kind in ("ncclUnhandledCudaError", "ncclInvalidUsage", "ncclInvalidArgument")):
        return None
    rank = os.environ.get("RANK", "0")
    return RankLostError(
        f"NCCL failed on rank {rank}: {_reason(text)}",
        where=f"rank {rank}",
        fix="with NCCL_DEBUG=INFO in the environment it says more; the same command with --resume true goes on",
    )


def _reason(text: str) -> str:
    """The line of an error that says why. NCCL puts it at the end, under a first line that says only where in its source."""
    kind = re.search(r"^(nccl\w+Error|ncclInvalid\w+)", text, re.MULTILINE)
    last = re.search(r"^Last error:\s*(\S.*)", text, re.MULTILINE)
    told = [found.group(1).strip() for found in (kind, last) if found]
    return (": ".join(told) or text.splitlines()[0])[:300]


def out_of_memory(error: Exception) -> UserError | None:
    """The user's way out of a failed allocation, on the device or on the host; None for another error."""
    import torch

    lines = (str(error) or type(error).__name__).splitlines()
    # CUDA's own lack of memory, of which NCCL, cuBLAS and kernels tell, each as another kind of RuntimeError.
    of_gpu = re.compile(r"(CUDA|HIP|Cuda failure).*out of memory|CUBLAS_STATUS_ALLOC_FAILED")
    told = [line.strip() for line in lines if of_gpu.search(line)] if isinstance(error, RuntimeError) else []
    if isinstance(error, torch.OutOfMemoryError) or told:
        what = f"the GPU is out of memory: {(told or lines)[0]}"
    elif isinstance(error, MemoryError) or "DefaultCPUAllocator" in lines[0]:
        what = f"this machine is out of memory: {lines[0]}"
    else:
        return None
    return UserError(
        what,
        where=f"rank {os.environ.get('RANK', '0')}",
        fix="use a smaller --batch_size or --max_length, --gradient_checkpointing true, or more --tp / --pp",
    )
