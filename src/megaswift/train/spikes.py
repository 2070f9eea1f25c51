"""Which gradient norms are outliers: those far above the median of the steps before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 128
FEWEST = 8  # norms without which nothing can be said


class NormHistory:
    """The last gradient norms that led to an update; skipped steps never enter, so that a NaN or a spike moves no bound.

    Args:
        factor: norms above this many times the median are outliers; 0: none is.
        norms: what an earlier part of the run left (`values`).
    """

    def __init__(self, factor: float, norms: Iterable[float] = ()) -> None:
        self.factor = factor
        self._norms = deque(norms, maxlen=WINDOW)

    @property
    def values(self) -> list[float]:
        return list(self._norms)

    @property
    def limit(self) -> float:
        """The largest norm that is no outlier; infinite while too little is known."""
        if self.factor <= 0 or len(self._norms) < FEWEST:
            return math.inf
        return self.factor * statistics.median(self._norms)

    def add(self, norm: float) -> None:
        """A step with this norm made its update."""
        if math.isfinite(norm):
            self._norms.append(norm)
