"""One reason why a run cannot be, and the words in which nearest values are told."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One reason why a run cannot be.

    Attributes:
        of_data: the rows are at fault, not the options.
    """

    what: str
    where: str
    fix: str = ""
    of_data: bool = False


def divisors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    small = [value for value in range(1, math.isqrt(number) + 1) if number % value == 0]
    return sorted({*small, *(number // value for value in small)})


def nearest_sizes(wanted: int, legal: list[int]) -> str:
    """The three legal values that are nearest, in words."""
    return ", ".join(str(value) for value in sorted(sorted(legal, key=lambda value: abs(value - wanted))[:3]))
