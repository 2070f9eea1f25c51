"""The machine that this process is on, as a plan sees it: its cards, and the memory that processes may have."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from megaswift.run.cards import CPU, Card, cards, known_as
from megaswift.run.planner import Place

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of containers


def place_here(gpus: int, local: int, kept_batch: int | None = None) -> Place:
    """Processes on this machine and others like it.

    Args:
        gpus: processes of all machines; local: of this one.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // max(local, 1))
    return Place(gpus, card_here(local), host_memory(), local, cores, kept_batch)


def card_here(local: int = 1) -> Card:
    """The card with the least memory among those that processes of this machine will use; CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        return cards()[CPU]
    found = [torch.cuda.get_device_properties(index) for index in range(min(local, torch.cuda.device_count()))]
    least = min(found, key=lambda one: one.total_memory)
    return known_as(least.name, least.total_memory)


def host_memory() -> int:
    """Bytes that processes of this machine can have together, swap included, within a container's limit; 0 where nothing tells."""
    found = 0
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in ("MemTotal", "SwapTotal"):
                found += int(value.split()[0]) * 1024
    for path in _LIMITS:
        with suppress(OSError, ValueError):
            found = min(found or (1 << 62), int(Path(path).read_text(encoding="ascii")))
    return found


__all__ = ["card_here", "host_memory", "place_here"]
