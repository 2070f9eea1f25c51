"""Real gloo processes for tests: a pool of ranks, forked from a server that has imported everything already.

    result = pool.run(4, function, arguments...)    # function(arguments...) on ranks 0..3; results in rank order

The function is a module-level one. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun would.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 180

# Ranks are forked, so nothing may touch CUDA before: whether there is a GPU is asked of the driver's library.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def _serve(connection: Any) -> None:
    """One rank: run one job. Gloo leaves threads behind that wake up a hundred times a second, so ranks are not used again."""
    import torch

    torch.set_num_threads(1)
    try:
        environment, function, arguments = connection.recv()
    except EOFError:  # the pool was closed
        return
    os.environ.update(environment)
    try:
        connection.send((True, function(*arguments)))
    except BaseException as error:
        connection.send((False, (type(error).__name__, traceback.format_exc())))
    connection.recv()  # whoever ends first would break the connections of the others


class RankFailed(AssertionError):
    """A rank raised; its traceback is the message."""


class RankPool:
    """Processes that act as the ranks of a run."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.faults.preload"])
        self._ranks: list[tuple[Any, Any]] = []

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run `function(*arguments)` on every rank at once and return their results in rank order."""
        self._fill(world_size)
        port = free_port()
        for rank in range(world_size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            self._ranks[rank][1].send((environment, function, arguments))
        results, failures = [], []
        for rank in range(world_size):
            if (failures and not self._ranks[rank][1].poll(5)) or not self._ranks[rank][1].poll(TIMEOUT_S):
                failures.append(f"rank {rank} gave no answer")
                continue
            good, value = self._ranks[rank][1].recv()
            (results if good else failures).append(value)
        self.close()  # after a failure the others may hang in a collective
        self._fill(world_size)  # they start while the test goes on
        if failures:
            raise RankFailed("\n".join(str(failure[1]) if isinstance(failure, tuple) else failure for failure in failures))
        return results

    def _fill(self, world_size: int) -> None:
        while len(self._ranks) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def close(self) -> None:
        """End all ranks."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks = []


def free_port() -> int:
    """A port below those that the system hands out by itself: one of these can be taken again before rank 0 listens."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
