"""Runs a Pipeline over chunks of rows, in this process or in forked ones when there is enough to do."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from megaswift.data.conversation import BadRow
from megaswift.data.pipeline import Encoding, Pipeline, Recipe
from megaswift.data.read import Source

ENOUGH = 20_000  # rows above which forked workers pay for their start

_pipeline: Pipeline | None = None  # in a forked worker: the parent's


class Workers:
    """A context in which chunks of rows are checked and encoded; results come in the order of the rows."""

    def __init__(self, pipeline: Pipeline, rows: int, processes: int | None = None) -> None:
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
            self._pool = multiprocessing.get_context("fork").Pool(self.processes, _start)
        return self

    def __exit__(self, *_: object) -> None:
        global _pipeline
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
            self._pool, _pipeline = None, None

    def check(self, source: Source, recipe: Recipe, size: int) -> Iterator[tuple[int, tuple[dict[int, BadRow], Counter[str]]]]:
        """(first row, (bad rows, shapes)) of each chunk of all rows."""
        return self._map("check", source, np.arange(len(source)), recipe, size)

    def encode(self, source: Source, rows: np.ndarray, recipe: Recipe, size: int) -> Iterator[tuple[int, Encoding]]:
        """(place in `rows` of the first row, Encoding) of each chunk of these rows."""
        return self._map("encode", source, rows, recipe, size)

    def _map(self, method: str, source: Source, rows: np.ndarray, recipe: Recipe, size: int) -> Iterator[tuple[int, Any]]:
        firsts = range(0, len(rows), size)
        chunks = ((method, [source.raw(int(row)) for row in rows[first : first + size]], recipe) for first in firsts)
        if self._pool is None:
            for first, (name, raws, _) in zip(firsts, chunks, strict=True):
                yield first, getattr(self.pipeline, name)(raws, recipe)
            return
        pending: list[tuple[int, Any]] = []
        for first, chunk in zip(firsts, chunks, strict=True):  # a bounded queue: the reader must not run ahead of the writer
            pending.append((first, self._pool.apply_async(_work, chunk)))
            if len(pending) > 3 * self.processes:
                number, result = pending.pop(0)
                yield number, result.get()
        for number, result in pending:
            yield number, result.get()


def _start() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker is one core


def _work(method: str, raws: list[Any], recipe: Recipe) -> Any:
    return getattr(_pipeline, method)(raws, recipe)
