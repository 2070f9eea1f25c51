"""The processes of a run: who this one is, its device, and the process groups of Megatron-Core."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megaswift.megatron import compat, host_memory
from megaswift.run.spec import Parallel


@dataclass(frozen=True)
class Rank:
    """This process's place in the run."""

    rank: int
    world_size: int
    local_rank: int
    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Rank 0: it prints and writes logs."""
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@contextlib.contextmanager
def joined(parallel: Parallel, seed: int, start_timeout_s: float = 1800.0) -> Iterator[Rank]:
    """Join the run's process groups (nccl on GPUs, gloo on CPUs), seed the random states, and leave at the end.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the launcher. Without RANK this is a run of one
    process, whatever the others say: a cluster's environment often has them. All ranks of a model-parallel group get the
    same seed.
    """
    started = os.environ if "RANK" in os.environ else {}
    rank, world, local_rank = (int(started.get(*item)) for item in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-Core overlaps communication by launch order
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    compat.quiet()
    compat.guard_checkpoint_reads()
    timeout = datetime.timedelta(seconds=start_timeout_s)
    with contextlib.ExitStack() as stack:
        if not on_gpu:
            stack.enter_context(compat.cpu_engine())
            stack.enter_context(host_memory.kept())
        if world == 1 and "MASTER_ADDR" not in started:
            store = dist.HashStore()
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one process needs no network
            dist.init_process_group("nccl" if on_gpu else "gloo", rank=0, world_size=1, store=store, timeout=timeout)
        else:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", timeout=timeout
            )  # with device_id every group would reserve memory now
        stack.callback(_leave)
        yield _model_parallel(parallel, seed, rank, world, local_rank, device)


@contextlib.contextmanager
def alone(parallel: Parallel, seed: int) -> Iterator[Rank]:
    """Be rank 0 of a run whose other ranks are not there: groups have their sizes, and nothing can be sent."""
    with contextlib.ExitStack() as stack:
        compat.quiet()
        if not torch.cuda.is_available():
            stack.enter_context(compat.cpu_engine())
        compat.join_nobody(parallel.world_size)
        stack.callback(_leave)
        yield _model_parallel(
            parallel, seed, 0, parallel.world_size, 0, torch.device("meta"), {"create_gloo_process_groups": False}
        )


def _model_parallel(
    parallel: Parallel,
    seed: int,
    rank: int,
    world: int,
    local_rank: int,
    device: torch.device,
    more: dict[str, bool] | None = None,
) -> Rank:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        **(more or {}),
    )
    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return Rank(
        rank=rank,
        world_size=world,
        local_rank=local_rank,
        tp=parallel.tp,
        pp=parallel.pp,
        dp=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        cp=parallel.cp,
        device=device,
    )


def _leave() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
