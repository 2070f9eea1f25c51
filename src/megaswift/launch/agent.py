"""Start the ranks of this machine by torchrun's own agent, and turn what ends them into one clear error.

NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say how many and where, as torchrun's options do.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift import errors
from megaswift.errors import MegaswiftError, RankLostError, Stopped, UserError
from megaswift.launch import rendezvous
from megaswift.launch.failures import connection_lost, nccl_failed, out_of_memory
from megaswift.launch.signals import StopSignals
from megaswift.store.publish import put

ERROR_DIR = "MEGASWIFT_ERROR_DIR"  # where ranks of this machine and the launcher leave notes for each other
LAUNCHER = "MEGASWIFT_LAUNCHER"  # process id of the launcher
LAST_WORDS_S = 10.0  # what the other ranks have to end by themselves when one has failed
MEETING_S = 1800.0  # how long a machine waits for the others


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
    given = [name for name in ("RANK", "LOCAL_RANK") if name in os.environ]
    if given:
        raise UserError(
            f"swift sft starts its own processes, but {given[0]}={os.environ[given[0]]} is set: it was started by torchrun, or the cluster sets it.",
            where=given[0],
            fix="without torchrun: NPROC_PER_NODE=N swift sft ...; where the cluster sets it: "
            "env -u RANK -u WORLD_SIZE -u LOCAL_RANK swift sft ...",
        )
    machines, machine = _number("NNODES", 1), _number("NODE_RANK", 0)
    found = Cluster(
        _number("NPROC_PER_NODE", 1), machines, machine, os.environ.get("MASTER_ADDR", "127.0.0.1"), _number("MASTER_PORT", 0)
    )
    if found.processes < 1 or machines < 1 or not 0 <= machine < machines:
        raise UserError(
            f"NPROC_PER_NODE={found.processes}, NNODES={machines}, NODE_RANK={machine} do not fit together.",
            where="environment",
        )
    if machines > 1 and ("MASTER_ADDR" not in os.environ or found.port == 0):
        raise UserError(
            "several machines need to know where rank 0 is.",
            where="environment",
            fix="set MASTER_ADDR and MASTER_PORT alike on all of them",
        )
    return found


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name}={text!r} is not a whole number.", where="environment") from error


def start_ranks(place: Cluster, job: Path, stop: StopSignals | None = None, module: str = "megaswift.train.loop") -> None:
    """Run `module` on every rank of this machine and wait. Raises what the ranks raised, once.

    Args:
        job: file that the module is given.
        stop: signals that this process got; the first is passed on to the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    threads = max(1, len(os.sched_getaffinity(0)) // place.processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with tempfile.TemporaryDirectory(prefix="megaswift-") as directory, _own_quit(), contextlib.ExitStack() as stack:
        try:
            config, _store = _launch_config(place), _meet(place)
            stack.enter_context(_overseen(Path(directory), stop))
            elastic_launch(config, sys.executable)(*safe_path(), "-m", module, str(job))
        except ChildFailedError as error:
            raise _cause(Path(directory), error) from None
        except SignalException as error:  # SIGQUIT
            raise Stopped(
                f"ended at once by {error.sigval.name}, without a checkpoint of the last steps.",
                where=f"process {os.getpid()}",
                fix="the same command with --resume true goes on from the newest checkpoint",
            ) from None
        except Exception as error:  # torch raises several kinds when the other machines do not come
            raise RankLostError(
                f"the processes could not be brought together: {errors.first_line(error)}",
                where="MASTER_ADDR, MASTER_PORT",
                fix="start all machines; see that they reach MASTER_ADDR",
            ) from error


def safe_path() -> list[str]:
    """For Python, before -m or -c: a numpy.py in the working directory is no module, unless that is where we come from ourselves."""
    return [] if Path(__file__).parents[2] == Path.cwd() else ["-P"]


@contextlib.contextmanager
def _own_quit() -> Iterator[None]:
    """torch takes SIGQUIT; at the end the caller's handler is there again."""
    before = signal.getsignal(signal.SIGQUIT)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():  # None: not Python's
            signal.signal(signal.SIGQUIT, before)


@contextlib.contextmanager
def _overseen(directory: Path, stop: StopSignals | None) -> Iterator[None]:
    """From here on there are ranks: they and this process leave notes in the directory, and signals are passed on by one."""
    os.environ |= {ERROR_DIR: str(directory), LAUNCHER: str(os.getpid())}
    if stop is not None:
        stop.interrupt, stop.on_first = None, lambda name: ask_to_stop(directory, name)
        if stop.name:  # it came while these were being set
            ask_to_stop(directory, stop.name)
    over = threading.Event()
    threading.Thread(target=_oversee, args=(directory, over), name="overseer", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        os.environ.pop(ERROR_DIR, None)
        if stop is not None:
            stop.on_first = None  # the directory goes


def _meet(place: Cluster) -> Any:
    """Wait until all machines are there, in short steps that a signal interrupts; torch waits in C, and hears none.

    Returns the store in which they met: rank 0's machine has to keep it, for torch goes on with its server.
    """
    from torch.distributed import TCPStore

    if place.machines == 1:
        return None
    deadline = time.monotonic() + MEETING_S
    while not place.leads:
        try:
            socket.create_connection((place.address, place.port), 2).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)
    limit = datetime.timedelta(seconds=MEETING_S)
    store = TCPStore(place.address, place.port, None, place.leads, limit, wait_for_workers=False, multi_tenant=True)
    names = [f"megaswift/machine{k}" for k in range(place.machines)]
    store.set(names[place.machine], "here")
    try:
        while not store.check(names):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all of {place.machines} machines came within {MEETING_S:.0f} s")
            time.sleep(0.2)
    except BaseException:
        with contextlib.suppress(Exception):
            store.delete_key(names[place.machine])
        raise
    return store


def _launch_config(place: Cluster) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    backend, endpoint = "static", f"{place.address}:{place.port}"
    if place.machines == 1:
        backend, endpoint = rendezvous.register(), "127.0.0.1:0"
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # nobody outside of this machine needs to reach the ranks
            os.environ.setdefault(name, "lo")
    # SIGTERM, SIGINT and SIGHUP are ours; where torch has no option for it, the environment says it.
    ours: dict[str, Any] = {"signals_to_handle": "SIGQUIT"} if hasattr(LaunchConfig, "signals_to_handle") else {}
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    return LaunchConfig(
        min_nodes=place.machines,
        max_nodes=place.machines,
        nproc_per_node=place.processes,
        run_id="megaswift",
        rdzv_backend=backend,
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": place.machine, "timeout": int(MEETING_S)},
        max_restarts=0,
        monitor_interval=0.2,
        log_line_prefix_template="",
        **ours,
    )


def ask_to_stop(directory: Path, name: str) -> None:
    """Tell all ranks of this machine to stop at their next step boundary."""
    put(directory / "stop", name, durable=False)


def stop_file() -> Path | None:
    """Where the launcher tells this rank to stop."""
    directory = os.environ.get(ERROR_DIR)
    return Path(directory) / "stop" if directory else None


def report_hang() -> None:
    """Let the other ranks of this machine know that the run hangs."""
    directory = os.environ.get(ERROR_DIR)
    if directory:
        with contextlib.suppress(OSError):
            (Path(directory) / "hang").touch()


def hang_reported() -> bool:
    """Whether a rank of this machine found that the run hangs."""
    directory = os.environ.get(ERROR_DIR)
    return bool(directory) and (Path(str(directory)) / "hang").exists()


def _oversee(directory: Path, over: threading.Event) -> None:
    """Wake stopped ranks when the run hangs, so that they write their stacks; end those that outlive a failure."""
    failed: float | None = None
    ranks: set[int] = set()
    while not over.wait(0.3):
        ranks = _ranks(directory, ranks)
        if (directory / "hang").exists():
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        if failed is None and (any(directory.glob("rank*.json")) or any(_ended_badly(pid) for pid in ranks)):
            failed = time.monotonic()
        if failed is not None and time.monotonic() - failed > LAST_WORDS_S:
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # each rank leads a process group of its own


def _ranks(directory: Path, known: set[int]) -> set[int]:
    """Process ids of the ranks that this process started: told by the directory in their environment.

    A script that calls `sft_main` may have children of its own, which are none of our business.

    Args:
        known: those of before; one that has ended shows no environment any more.
    """
    children = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            children |= {int(word) for word in (task / "children").read_text().split()}
    found, mark = known & children, f"{ERROR_DIR}={directory}".encode()
    for pid in children - found:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if mark in words and any(word.startswith(b"RANK=") for word in words) and _leads_a_group(pid):
                found.add(pid)
    return found


def _leads_a_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _ended_badly(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError, OSError):
        state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return state is not None and state.si_status != 0
    return False


def _cause(directory: Path, failed: Any) -> MegaswiftError:
    """The error that ended the run: one that a rank reported, else what the signals tell."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("rank*.json"))]
    killed = {
        rank: failure
        for rank, failure in failed.failures.items()
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
    }
    own = [report for report in reports if report["kind"] != "RankLostError"]
    lost = [report for report in reports if report["kind"] == "RankLostError" and not report["second"]]
    for report in own or ([] if killed else lost):
        return getattr(errors, report["kind"])(report["what"], where=report["where"], fix=report["fix"])
    rank, failure = min(killed.items() or failed.failures.items())
    code = failure.exitcode
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    elif reports and code == RankLostError.exit_code:
        return RankLostError(reports[0]["what"], where=reports[0]["where"], fix=reports[0]["fix"])
    else:
        how = f"ended with exit code {code}"
    hint = "the same command with --resume true goes on"
    if code == -signal.SIGKILL:
        hint = f"the system was probably out of memory: use a smaller --batch_size or --max_length, or more --tp / --pp; {hint}"
    return RankLostError(f"rank {rank} {how}; the other ranks were stopped.", where=f"process {failure.pid}", fix=hint)


def report_from_rank(work: Callable[[], None]) -> int:
    """Do a rank's work; an error of ours goes to a file for the launcher, anything else to standard error."""
    try:
        _die_with_launcher()
        work()
        return 0
    except MegaswiftError as error:
        report(error)
        return int(error.exit_code)
    except Exception as error:
        cause = errors.disk_full(error) or out_of_memory(error) or nccl_failed(error)
        known = cause or connection_lost(error)
        if known is not None:
            report(known, second=cause is None)
            return int(known.exit_code)
        traceback.print_exc()
        return 1


def _die_with_launcher() -> None:
    """A rank never outlives its launcher, even one that was killed: no orphan keeps GPUs, ports or files."""
    import ctypes

    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != int(launcher):  # it ended before this line
        os._exit(int(RankLostError.exit_code))


def report(error: MegaswiftError, second: bool = False) -> None:
    """Leave an error for the launcher, which prints one; without a launcher print it. `second`: a consequence of another."""
    directory = os.environ.get(ERROR_DIR)
    if directory is None:
        print(f"error: {error.text()}", file=sys.stderr, flush=True)
        return
    path = Path(directory) / f"rank{int(os.environ.get('RANK', '0')):05d}.json"
    values = {"kind": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix, "second": second}
    with contextlib.suppress(OSError):  # the launcher may be gone
        put(path, json.dumps(values), durable=False)
