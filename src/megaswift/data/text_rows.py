"""Full rows cut from documents that lie end to end: where a row begins follows from its number, and nothing is stored a second time.

A row is `max_length` tokens, and the one after them as the label of its last. Which rows a run sees, and in which order, is a pure function of
the seed and of a row's number, without end: a source that is used up begins again in another order.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.data.documents import Documents
from megaswift.data.mixture import pattern, ranks
from megaswift.data.permutation import Permutation
from megaswift.data.store import TokenRows
from megaswift.data.tokens import Encoded
from megaswift.errors import DataError

ENDLESS = 1 << 31  # rows of a run: their numbers are the upper half of what names a token (`MicroBatch.origins`)


@dataclass(frozen=True)
class Span:
    """Tokens `first` to `last` (not included) of the documents in a directory; both are borders of documents."""

    directory: str
    first: int
    last: int


@dataclass(frozen=True)
class TextPlan:
    """What rows are cut of, and how.

    Attributes:
        parts: spans whose rows are drawn from together, one after the other; each has a share of the rows.
        counts: rows of each part in one period of a blend; with one part it says nothing.
        max_length: tokens of a row.
        separate: attention and positions begin anew with each document; False: a row is one causal text.
        seed: of the order.
        shuffled: False keeps the order of the tokens, and ends after all rows: for validation.
        bos_id: the token that the tokenizer puts before a text, which nothing predicts; None: there is none.
    """

    parts: tuple[tuple[Span, ...], ...]
    counts: tuple[int, ...]
    max_length: int
    separate: bool
    seed: int
    shuffled: bool
    bos_id: int | None = None

    def write(self, path: Path) -> None:
        """Write a directory that `TextRows.open` reads."""
        path.mkdir(parents=True)
        stores = {span.directory: Documents.open(span.directory) for part in self.parts for span in part}
        what = [[(stores[span.directory].fingerprint, span.first, span.last) for span in part] for part in self.parts]
        how = [self.counts, self.max_length, self.separate, self.seed, self.shuffled, self.bos_id]
        fingerprint = hashlib.sha256(json.dumps([what, how]).encode()).hexdigest()[:32]
        largest = max((store.largest_id for store in stores.values()), default=-1)
        index = {"kind": "text", "fingerprint": fingerprint, "largest_id": largest, "plan": asdict(self)}
        (path / "index.json").write_text(json.dumps(index), encoding="utf-8")


class TextRows(TokenRows):
    """Rows of a TextPlan; to what makes batches of them they are tokenized rows like others.

    Attributes:
        lengths: all alike, and of a training run without end.
        passes: rows of each part that one pass over it has.
    """

    in_order = True  # the order is the rows' own

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path, self.fingerprint, self.largest_id = path, str(index["fingerprint"]), int(index["largest_id"])
        values = dict(index["plan"])
        parts = tuple(tuple(Span(**span) for span in part) for part in values.pop("parts"))
        self.plan = plan = TextPlan(parts=parts, counts=tuple(values.pop("counts")), **values)
        self._stores = {span.directory: Documents.open(span.directory) for part in parts for span in part}
        sizes = [[(span.last - span.first) // plan.max_length for span in part] for part in parts]
        self._bounds = [np.cumsum([0, *part]) for part in sizes]
        self.passes = [int(bounds[-1]) for bounds in self._bounds]
        self._blend = pattern(list(plan.counts)) if len(parts) > 1 else None
        self._ranks = None if self._blend is None else ranks(self._blend, len(parts))
        self._order = lru_cache(maxsize=64)(self._make_order)
        count = ENDLESS if plan.shuffled else sum(self.passes)
        self.lengths = np.broadcast_to(np.int32(plan.max_length), (count,))
        self.answers, self.mismatched, self.reference = 1, False, None
        self.packed, self._desirable, self._values = True, None, None

    def __len__(self) -> int:
        """Rows of one pass over all parts."""
        return sum(self.passes)

    @property
    def longest(self) -> int:
        """See TokenRows."""
        return self.plan.max_length

    def _make_order(self, part: int, epoch: int) -> Permutation:
        return Permutation(self.passes[part], self.plan.seed, part, epoch)

    def part_of(self, row: int) -> tuple[int, int]:
        """Which part the n-th row of the run is taken from, and how many of that part came before it."""
        if self._blend is None or self._ranks is None:
            return 0, row
        period, place = divmod(row, len(self._blend))
        part = int(self._blend[place])
        return part, period * self.plan.counts[part] + int(self._ranks[place])

    def place(self, row: int) -> tuple[Span, int]:
        """The span that a row is cut of, and its first token there."""
        part, number = self.part_of(row)
        if self.plan.shuffled:
            epoch, within = divmod(number, self.passes[part])
            number = self._order(part, epoch)(within)
        bounds = self._bounds[part]
        which = int(np.searchsorted(bounds, number, side="right")) - 1
        span = self.plan.parts[part][which]
        return span, span.first + (number - int(bounds[which])) * self.plan.max_length

    def samples(self, row: int) -> list[Encoded]:
        """The row as its pieces of documents; or, where attention crosses their borders, as one."""
        span, first = self.place(row)
        store, size = self._stores[span.directory], self.plan.max_length
        ids = np.asarray(store.tokens[first : first + size]).astype(np.int32)
        following = int(store.tokens[first + size]) if first + size < span.last else None
        starts = store.starts(first, first + size + 1) - first
        kept = np.ones(size, bool)
        begins = len(starts) > 0 and int(starts[-1]) == size  # the next row begins with a document
        inner = starts[starts < size]
        if self.plan.bos_id is not None:
            kept[inner[ids[inner] == self.plan.bos_id]] = False
        if begins and (self.plan.separate or following == self.plan.bos_id):
            following = None
        if not self.plan.separate:
            return [Encoded(ids, kept, following=following)]
        borders = [0, *(int(start) for start in inner if start), size]
        pieces = [Encoded(ids[one:other], kept[one:other]) for one, other in zip(borders, borders[1:])]
        pieces[-1].following = following
        return pieces

    def places(self, row: int) -> slice:
        """Samples are not counted over all rows: nothing is known of them beside their tokens."""
        raise TypeError("rows of text have no places")

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each document (int64)."""
        return np.concatenate([np.diff(store.offsets) for store in self._stores.values()])


def open_rows(path: Path | str) -> TokenRows:
    """Open a directory of tokenized rows, or of rows that are cut from documents. Raises DataError where it is not whole."""
    path = Path(path)
    try:
        index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        return TextRows(path, index) if index.get("kind") == "text" else TokenRows.open(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"the tokenized data cannot be read: {error}.", where=str(path), fix="delete this directory; it is made again"
        ) from error
