"""Named points at which the fault suite makes a run fail; without its environment variable they do nothing.

    reached("save.part_written")

MEGASWIFT_FAULT is POINT:KIND:RANK[:HIT], for example save.part_written:kill:1:2, the second time that rank 1 comes by.
KIND is raise (an input/output error), full (the disk is full), kill (SIGKILL), stop (SIGSTOP), term (SIGTERM) or exit.
"""

from __future__ import annotations

import errno
import os
import signal
import time

FAULT = "MEGASWIFT_FAULT"
POINTS = {
    "load.start": "before a checkpoint is read",
    "load.weights_read": "model and optimizer are read, nothing is reported yet",
    "load.done": "a checkpoint was loaded",
    "loop.start": "everything is loaded, before the first step",
    "loop.step": "before a step",
    "loop.boundary": "after a step, before the ranks agree on what is next",
    "loop.evaluate": "before an evaluation",
    "save.start": "before the temporary directory is made",
    "save.directory": "the temporary directory is there and empty",
    "save.collected": "the state of this rank is collected",
    "save.writing": "this rank's file is open, nothing is written",
    "save.part_written": "this rank's file is written and synced",
    "save.before_index": "all files are there but the index (rank 0)",
    "save.before_manifest": "the index is written, the manifest is not (rank 0)",
    "save.before_rename": "the manifest is written, the directory has its temporary name (rank 0)",
    "save.renamed": "the directory has its name, the tracker names the one before (rank 0)",
    "save.published": "the ranks agreed that the checkpoint is safe",
    "keep.before_trash": "a checkpoint beyond the limit is chosen (rank 0)",
    "keep.trashed": "it is renamed, not deleted (rank 0)",
}
_hits: dict[str, int] = {}


def fault_point(point: str) -> None:
    """Let the fault that MEGASWIFT_FAULT asks for happen here."""
    wanted = os.environ.get(FAULT)
    if not wanted or not wanted.startswith(point + ":"):
        return
    _, kind, rank, *hit = wanted.split(":")
    if rank != "all" and int(os.environ.get("RANK", "0")) != int(rank):
        return
    _hits[point] = _hits.get(point, 0) + 1
    if _hits[point] != (int(hit[0]) if hit else 1):
        return
    _happen(kind, point)


def _happen(kind: str, point: str) -> None:
    if kind == "raise":
        raise OSError(errno.EIO, f"input/output error (asked for at {point})")
    if kind == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if kind == "exit":
        os._exit(1)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[kind])
    time.sleep(0.05)  # a stop takes effect on the way back from the kernel
