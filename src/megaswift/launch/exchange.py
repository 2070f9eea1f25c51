"""How fast the ranks of this and other machines reach each other: one all-reduce, one all-to-all, and every pair, timed.

`swift doctor --distributed true` starts it on every rank by the launcher of runs. A rank that does not answer is named by its
number, and so is one whose every pair is slow.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megaswift.errors import RankLostError
from megaswift.launch import agent
from megaswift.store.faults import fault_point
from megaswift.store.publish import put

SLOW = 3.0  # times the median of the other pairs
MEGABYTE = 1 << 20
LEAST_S = 10e-3  # differences below that are the scheduler's


@dataclass(frozen=True)
class Exchange:
    """What was measured.

    Attributes:
        all_reduce, all_to_all: bytes a second of each rank, medians.
        pairs: "i-j" -> seconds there and back of `pair_bytes`.
        slow: ranks whose every pair is slow; pairs: those that are slow by themselves.
        machines: the machine of each rank.
    """

    world_size: int
    backend: str
    all_reduce: float
    all_to_all: float
    pair_bytes: int
    pairs: dict[str, float]
    slow: list[int]
    slow_pairs: list[str]
    machines: list[str]


def measure(size: int = 16 * MEGABYTE, pair: int = 4 * MEGABYTE, repeats: int = 3, limit_s: float = 20.0) -> Exchange:
    """Exchange with all ranks of the environment's process group. Raises RankLostError that names who does not answer.

    Args:
        size: bytes of the collectives; pair: of a message between two.
        repeats: how often each is done; the median counts.
        limit_s: what a rank may take to come to the next exchange.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=max(60.0, 3 * limit_s)))
    try:
        meeting = dist.new_group(backend="gloo")
        rank, world = dist.get_rank(), dist.get_world_size()

        def timed(work: Any) -> float:
            _meet(meeting, limit_s)
            began = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - began

        values = torch.ones(size // 4 // world * world, device=device)
        other = torch.empty_like(values)
        reduce, exchange = (lambda: dist.all_reduce(values)), (lambda: dist.all_to_all_single(other, values))
        reduced = [timed(reduce) for _ in range(repeats + 1)][1:]
        exchanged = [timed(exchange) for _ in range(repeats + 1)][1:]
        message = torch.ones(pair // 4, device=device)
        own: dict[str, float] = {}
        for first in range(world):
            for second in range(first + 1, world):
                both = partial(_there_and_back, message, rank, first, second)
                times = [timed(both) for _ in range(repeats)]
                if rank == first:
                    own[f"{first}-{second}"] = min(times)
        everyone: list[Any] = [None] * world
        dist.all_gather_object(
            everyone, (own, statistics.median(reduced), statistics.median(exchanged), socket.gethostname()), group=meeting
        )
    finally:
        dist.destroy_process_group()
    pairs = {name: value for part, *_ in everyone for name, value in part.items()}
    slow, slow_pairs = judged(pairs, world)
    return Exchange(
        world, "nccl" if on_gpu else "gloo", size / max(part[1] for part in everyone), size / max(part[2] for part in everyone), pair,
        pairs, slow, slow_pairs, [part[3] for part in everyone],
    )  # fmt: skip


def _meet(group: Any, limit_s: float) -> None:
    """Wait for all ranks. Raises RankLostError that names those which do not come."""
    import torch.distributed as dist

    fault_point("exchange.meet")
    try:
        dist.monitored_barrier(group, timeout=datetime.timedelta(seconds=limit_s), wait_all_ranks=True)
    except RuntimeError as error:
        text = str(error)
        found = re.search(r"[Rr]anks? ([\d, ]+) failed to", text)
        who = f"rank {found.group(1).strip(' ,')}" if found else "a rank"
        raise RankLostError(
            f"{who} does not answer within {limit_s:g} s.",
            where=f"rank {dist.get_rank()}, which waited",
            fix="see whether that process and its machine live, and whether a firewall stands between (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME "
            "name the network)",
        ) from error


def _there_and_back(message: Any, rank: int, first: int, second: int) -> None:
    import torch.distributed as dist

    if rank == first:
        dist.send(message, second)
        dist.recv(message, second)
    elif rank == second:
        dist.recv(message, first)
        dist.send(message, first)


def judged(pairs: dict[str, float], world: int) -> tuple[list[int], list[str]]:
    """(ranks whose every pair is slow, other slow pairs). Of two ranks nobody can say which one it is: their pair is told."""
    slow = []
    for rank in range(world if world > 2 else 0):
        own = [value for name, value in pairs.items() if str(rank) in name.split("-")]
        others = [value for name, value in pairs.items() if str(rank) not in name.split("-")]
        if others and min(own) > SLOW * statistics.median(others) and min(own) > LEAST_S:
            slow.append(rank)
    rest = {name: value for name, value in pairs.items() if not {int(part) for part in name.split("-")} & set(slow)}
    usual = statistics.median(rest.values()) if rest else 0.0
    return slow, [name for name, value in rest.items() if len(rest) > 2 and value > SLOW * usual and value > LEAST_S]


def main(argv: list[str]) -> int:
    """Entry point of one rank: rank 0 writes what was measured into the file that the job names."""
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))

    def work() -> None:
        found = measure(limit_s=job["limit_s"])
        if int(os.environ.get("RANK", "0")) == 0:
            put(Path(job["result"]), json.dumps(asdict(found)))

    return agent.report_from_rank(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
