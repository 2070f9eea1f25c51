"""Start the ranks of this machine by torchrun's own agent, and turn what ends them into one clear error.

NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say how many and where, as torchrun's options do.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift import errors
from megaswift.errors import DataError, MegaswiftError, RankLostError, UserError

ERROR_DIR = "MEGASWIFT_ERROR_DIR"


@dataclass(frozen=True)
class Cluster:
    """How many processes there are, and which machine this is."""

    processes: int  # on this machine
    machines: int
    machine: int
    address: str
    port: int

    @property
    def world_size(self) -> int:
        return self.processes * self.machines

    @property
    def leads(self) -> bool:
        """Whether rank 0 is on this machine."""
        return self.machine == 0


def cluster() -> Cluster:
    """Read the environment. Raises UserError for values that are no numbers or do not belong together."""
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        raise UserError("swift sft starts its own processes; it was started by torchrun.", where="RANK", fix="run: NPROC_PER_NODE=N swift sft ... without torchrun")
    machines, machine = _number("NNODES", 1), _number("NODE_RANK", 0)
    found = Cluster(_number("NPROC_PER_NODE", 1), machines, machine, os.environ.get("MASTER_ADDR", "127.0.0.1"), _number("MASTER_PORT", 0))
    if found.processes < 1 or machines < 1 or not 0 <= machine < machines:
        raise UserError(f"NPROC_PER_NODE={found.processes}, NNODES={machines}, NODE_RANK={machine} do not fit together.", where="environment")
    if machines > 1 and ("MASTER_ADDR" not in os.environ or found.port == 0):
        raise UserError("several machines need to know where rank 0 is.", where="environment", fix="set MASTER_ADDR and MASTER_PORT alike on all of them")
    return found


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name}={text!r} is not a whole number.", where="environment") from error


def start_ranks(place: Cluster, job: Path) -> None:
    """Run megaswift.engine.loop on every rank of this machine and wait. Raises what the ranks raised, once."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from megaswift.engine.ranks import free_port

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    threads = max(1, len(os.sched_getaffinity(0)) // place.processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with tempfile.TemporaryDirectory(prefix="megaswift-") as directory:
        os.environ[ERROR_DIR] = directory
        config = LaunchConfig(
            min_nodes=place.machines,
            max_nodes=place.machines,
            nproc_per_node=place.processes,
            run_id="megaswift",
            rdzv_backend="static",
            rdzv_endpoint=f"{place.address}:{place.port or free_port()}",
            rdzv_configs={"rank": place.machine, "timeout": 1800},
            max_restarts=0,
            monitor_interval=0.2,
            log_line_prefix_template="",
        )
        try:
            elastic_launch(config, sys.executable)("-m", "megaswift.engine.loop", str(job))
        except ChildFailedError as error:
            raise _cause(Path(directory), error) from None
        finally:
            os.environ.pop(ERROR_DIR, None)


def _cause(directory: Path, failed: Any) -> MegaswiftError:
    """The error that ended the run: one that a rank reported, else what the signals tell."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("rank*.json"))]
    for report in reports:
        cls = getattr(errors, report["kind"], None)
        if cls is not None:
            return cls(report["what"], where=report["where"], fix=report["fix"])
    rank, failure = min(failed.failures.items())
    code = failure.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = "the system was probably out of memory: use a smaller --batch_size or --max_length, or more --tp / --pp" if code == -9 else "see the lines above"
    return RankLostError(f"rank {rank} {how}; the other ranks were stopped.", where=f"process {failure.pid}", fix=hint)


def report_from_rank(work: Callable[[], None]) -> int:
    """Do a rank's work; an error of ours goes to a file for the launcher, anything else to standard error."""
    directory = os.environ.get(ERROR_DIR)
    try:
        work()
        return 0
    except MegaswiftError as error:
        _report(directory, type(error).__name__, error.what, error.where, error.fix)
        return int(error.exit_code)
    except Exception as error:
        memory = _out_of_memory(error)
        if memory is not None:
            _report(directory, type(memory).__name__, memory.what, memory.where, memory.fix)
            return int(memory.exit_code)
        traceback.print_exc()
        return 1


def _out_of_memory(error: Exception) -> UserError | None:
    import torch

    if not isinstance(error, torch.OutOfMemoryError):
        return None
    return UserError(
        f"the GPU is out of memory: {str(error).splitlines()[0]}",
        where=f"rank {os.environ.get('RANK', '0')}",
        fix="use a smaller --batch_size or --max_length, --gradient_checkpointing true, or more --tp / --pp",
    )


def _report(directory: str | None, kind: str, what: str, where: str, fix: str) -> None:
    if directory is None:
        print(DataError(what, where=where, fix=fix).text(), file=sys.stderr)
        return
    rank = int(os.environ.get("RANK", "0"))
    path = Path(directory) / f"rank{rank:05d}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"kind": kind, "what": what, "where": where, "fix": fix}), encoding="utf-8")
    temporary.replace(path)
