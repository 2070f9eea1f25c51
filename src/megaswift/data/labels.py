"""What labels of rows are that are scored as wholes: a class, several classes, or numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megaswift.data.conversation import BadRow
from megaswift.models.head import MULTI, SINGLE

LABEL = "label"  # the column


@dataclass(frozen=True)
class Classes:
    """What labels are: `problem` by transformers' names, and how many scores a row gets."""

    problem: str
    count: int

    def __str__(self) -> str:
        return f"{self.problem}, {self.count}"

    def values(self, label: Any) -> list[float]:
        """What the scores of a row with this label are compared with. Raises BadRow.

        Returns:
            The number of the class; of several classes 0 or 1 for each; of regression the numbers.
        """
        if label is None:
            raise BadRow("no label", f"a row needs the column {LABEL}")
        if self.problem == SINGLE:
            return [float(self._number_of_class(label))]
        if self.problem == MULTI:
            if not isinstance(label, list):
                raise BadRow("a label that is no list of classes", f"{LABEL} is {label!r}"[:200])
            chosen = {self._number_of_class(one) for one in label}
            return [float(number in chosen) for number in range(self.count)]
        numbers = label if isinstance(label, list) else [label]
        if len(numbers) != self.count:
            raise BadRow("a label of another size", f"{LABEL} has {len(numbers)} numbers, {self.count} expected")
        return [finite(one, LABEL) for one in numbers]

    def _number_of_class(self, label: Any) -> int:
        number = label
        if isinstance(label, str) and label.strip().isdecimal():
            number = int(label)
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < self.count:
            raise BadRow("a label that is no class", f"{LABEL} is {label!r}; classes are 0 to {self.count - 1}"[:200])
        return number


def finite(value: Any, name: str) -> float:
    """A number of a row. Raises BadRow for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRow(f"a {name} that is no number", f"{name} is {value!r}"[:200])
    return float(value)
