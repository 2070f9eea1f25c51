"""Is a difference real: Wilson's interval for one accuracy, McNemar's exact test and a paired bootstrap for two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson(correct: float, total: int, z: float = Z95) -> tuple[float, float]:
    """95 % interval of an accuracy (E. B. Wilson, 1927); (0, 1) for no questions."""
    if total == 0:
        return 0.0, 1.0
    share, square = correct / total, z * z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p value for questions that only one of two models answers right (Q. McNemar, 1947).

    Under the null hypothesis each flipped question is gained or lost with probability 1/2.
    """
    flipped = gained + lost
    if flipped == 0:
        return 1.0
    tail = sum(math.comb(flipped, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**flipped)


def paired_bootstrap(differences: Sequence[float], seed: int = 42, rounds: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences (B. Efron, 1979), the questions drawn with replacement."""
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    if values.size == 0 or not values.any():
        return 0.0, 0.0
    random = np.random.default_rng(seed)
    means = np.empty(rounds)
    step = max(1, 4_000_000 // values.size)
    for start in range(0, rounds, step):
        count = min(step, rounds - start)
        means[start : start + count] = values[random.integers(0, values.size, (count, values.size))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions.

    Attributes:
        difference: accuracy of the second minus that of the first.
        low, high: 95 % interval of the difference, by bootstrap.
        gained, lost: questions that only the second, only the first answers right.
        p: McNemar's exact p value.
        changed: questions whose answer text or choice is not the same, right or wrong.
    """

    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p: float
    changed: int

    @property
    def significant(self) -> bool:
        """Whether the difference is more than chance at the 5 % level."""
        return self.p < 0.05


def paired(
    first: Sequence[float], second: Sequence[float], right: Sequence[tuple[bool, bool]], changed: int, seed: int
) -> Paired:
    """Compare scores question by question; `right` says for each question whether the first and the second are right."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    gained = sum(not a and b for a, b in right)
    lost = sum(a and not b for a, b in right)
    low, high = paired_bootstrap(differences, seed)
    mean = sum(differences) / max(len(differences), 1)
    return Paired(mean, low, high, gained, lost, mcnemar(gained, lost), changed)
