"""Runs a Pipeline over chunks of rows, in this process or in forked ones when there is enough to do."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from megaswift.data.pipeline import Checked, Encoding, Pipeline, Recipe
from megaswift.data.tables import Raw, Source
from megaswift.errors import UserError

if TYPE_CHECKING:
    from megaswift.data.text import TextPipeline

ENOUGH = 4_000  # rows above which forked workers pay for their start

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_pipeline: Any = None  # in a forked worker: the parent's


class Workers:
    """A context in which chunks of rows are checked and encoded; results come in the order of the rows."""

    def __init__(self, pipeline: Pipeline | TextPipeline, rows: int, processes: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.pipeline = pipeline
        self.processes = processes if processes is not None else min(cores, 32) if rows >= ENOUGH else 1
        if sys.platform != "linux":
            self.processes = 1  # fork is not safe elsewhere; the tokenizer's own threads still use all cores
        self._pool: Any = None

    def __enter__(self) -> Workers:
        global _pipeline
        if self.processes > 1:
            _pipeline = self.pipeline
            self._pool = ProcessPoolExecutor(self.processes, multiprocessing.get_context("fork"), _start, (os.getpid(),))
            # All are forked by the first task. Until a worker has left the parent's way with signals it must get none.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                self._pool.submit(os.getpid)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, *_: object) -> None:
        global _pipeline
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool, _pipeline = None, None

    def check(self, source: Source, recipe: Recipe, size: int) -> Iterator[tuple[int, Checked]]:
        """(first row, what Pipeline.check found) of each chunk of all rows."""
        return self._map("check", source, np.arange(len(source)), recipe, size)

    def encode(self, source: Source, rows: np.ndarray, recipe: Recipe, size: int) -> Iterator[tuple[int, Encoding]]:
        """(place in `rows` of the first row, Encoding) of each chunk of these rows."""
        return self._map("encode", source, rows, recipe, size)

    def stream(self, raws: Iterator[Raw], recipe: Recipe, size: int) -> Iterator[tuple[int, Encoding]]:
        """(number of the first row, Encoding) of each chunk of a stream; read only a little ahead of what is asked for."""
        return self._run("encode", iter(lambda: list(islice(raws, size)), []), recipe, size)

    def chunks(self, chunks: Iterator[list[Raw]], recipe: Recipe) -> Iterator[Any]:
        """What the pipeline's `encode` makes of each of some groups of rows; read only a little ahead of what is asked for."""
        return (result for _, result in self._run("encode", chunks, recipe, 0))

    def _map(self, method: str, source: Source, rows: np.ndarray, recipe: Recipe, size: int) -> Iterator[tuple[int, Any]]:
        chunks = ([source.raw(int(row)) for row in rows[first : first + size]] for first in range(0, len(rows), size))
        return self._run(method, chunks, recipe, size)

    def _run(self, method: str, chunks: Iterator[list[Raw]], recipe: Recipe, size: int) -> Iterator[tuple[int, Any]]:
        if self._pool is None:
            for number, raws in enumerate(chunks):
                yield number * size, getattr(self.pipeline, method)(raws, recipe)
            return
        pending: list[tuple[int, Any]] = []
        for number, raws in enumerate(chunks):  # a bounded queue: the reader must not run ahead of the writer
            pending.append((number * size, self._pool.submit(_work, method, raws, recipe)))
            if len(pending) > 3 * self.processes:
                first, result = pending.pop(0)
                yield first, _result(result)
        for first, result in pending:
            yield first, _result(result)


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenizes was killed, most likely for want of memory.",
            where="--dataset",
            fix="free memory and run again",
        ) from error


def _start(parent: int) -> None:
    """The first thing in a worker.

    Ctrl-C reaches it too, but is the parent's to obey: through the inherited wake-up descriptor, or its handler, the parent
    would count the signal once for each process.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG, so that none outlives a parent that was killed
    if os.getppid() != parent:  # it ended before this line
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker is one core


def _work(method: str, raws: list[Any], recipe: Recipe) -> Any:
    return getattr(_pipeline, method)(raws, recipe)
