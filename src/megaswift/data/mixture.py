"""Which dataset of a blend the n-th row of a run is taken from.

The order is periodic: with shares of 7 and 3 ten rows hold seven of one and three of the other, spread evenly, and the next ten do again. So
the row at a place follows from the shares alone, without a list of all rows, whatever the length of the run.
"""

from __future__ import annotations

import math

import numpy as np


def pattern(counts: list[int]) -> np.ndarray:
    """One period, int32 [sum of counts]: which dataset each row is taken from.

    Of the first n rows, for every n, each dataset has its share of n to within less than one row (Tijdeman, The chairman assignment
    problem, 1980): among those that are behind by at least 1 / (2 k - 2) of a row, of k datasets, the one whose time is up first.
    """
    period, kinds = sum(counts), len(counts)
    if kinds == 1:
        return np.zeros(period, np.int32)
    order, taken = np.empty(period, np.int32), [0] * kinds
    scale = 2 * kinds - 2
    for place in range(period):
        best, soonest = -1, math.inf
        for kind, count in enumerate(counts):
            behind = scale * (count * (place + 1) - period * taken[kind])
            if behind >= period and (due := (period * (scale - 1) - behind) / count) < soonest:
                best, soonest = kind, due
        order[place] = best
        taken[best] += 1
    return order


def ranks(order: np.ndarray, kinds: int) -> np.ndarray:
    """int64: how many rows of the same dataset stand before each place of a period."""
    result = np.empty(len(order), np.int64)
    for kind in range(kinds):
        places = np.flatnonzero(order == kind)
        result[places] = np.arange(len(places))
    return result
