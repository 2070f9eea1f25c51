"""What happens to one raw row: decode, rename, convert, fill in names, recognise, render, tokenize, cut to length.

It needs neither transformers nor torch, so that worker processes start at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megaswift.data.chat import ChatTemplate
from megaswift.data.conversation import BadRow, Conversation
from megaswift.data.places import Names, fill_places
from megaswift.data.read import Raw, decode
from megaswift.data.registry import CONVERTERS
from megaswift.data.rows import to_conversation
from megaswift.data.seen import LOOKED_AT, Seen
from megaswift.data.tables import NULLS, TableRow
from megaswift.data.tokens import Encoded, joined, weights_of

NO_LOSS_LEFT = "no supervised token left within max_length"


@dataclass(frozen=True)
class Recipe:
    """How the rows of one dataset are read.

    Attributes:
        columns: column -> name under which it is read; "-" drops it.
        asked: those of --columns, each of which some row must have.
        converter: name of a row function, or None.
        names: what {{name}} and {{author}} are filled with.
    """

    columns: dict[str, str] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    converter: str | None = None
    names: Names = field(default_factory=Names)


@dataclass
class Encoding:
    """What became of some rows: samples end to end, and the fate of each row.

    Attributes:
        ids, kept: int32 and bool arrays of all samples. weights: fp32 array, or None where each weight is 0 or 1.
        sizes: tokens of each sample.
        counts: samples that each row gave; 0 for a dropped one.
        bad: row number (within the call) -> reason, for rows that cannot be used.
        long: row number -> tokens it had, for rows above max_length.
        shapes: shape -> rows.
        unsupervised: assistant turns without loss because the template leaves out their thoughts.
        cut: row number -> messages after its last answer, which are left out.
        control: control token -> how often it stands in the text rows.
        found: columns of the recipe that some row had.
        weighted: samples with weights other than 0 and 1, and the sum of their weights.
        notes: (row number, what was changed or is doubtful, where in the row).
        seen: what inference would see of the first rows.
        desirable: of each sample, whether it is a good answer; None where rows are no preferences.
        values: of each sample, what its scores are compared with; None where rows are not scored.
    """

    ids: np.ndarray
    kept: np.ndarray
    weights: np.ndarray | None
    sizes: list[int]
    counts: list[int]
    bad: dict[int, BadRow]
    long: dict[int, int]
    shapes: Counter[str]
    unsupervised: int = 0
    found: frozenset[str] = frozenset()
    weighted: tuple[int, float] = (0, 0.0)
    cut: dict[int, int] = field(default_factory=dict)
    control: Counter[str] = field(default_factory=Counter)
    notes: list[Note] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    desirable: list[bool] | None = None
    values: list[list[float]] | None = None


Note = tuple[int, str, str]
Checked = tuple[dict[int, BadRow], Counter[str], frozenset[str], list[Note]]  # see Pipeline.check


class Pipeline:
    """All that is needed to turn raw rows into samples; `parse_special`: control tokens in text rows are tokens."""

    def __init__(self, template: ChatTemplate, max_length: int, truncation: str, parse_special: bool = True) -> None:
        self.template, self.max_length, self.truncation = template, max_length, truncation
        self.parse_special = parse_special

    def conversation(self, raw: Raw, recipe: Recipe, *, answered: bool = True, found: set[str] | None = None) -> Conversation:
        """One row as a conversation; adds the recipe's columns that it has to `found`. Raises BadRow."""
        row = renamed(raw, recipe, found)
        conversation = to_conversation(row, answered=answered)
        fill_places(conversation, recipe.names, row.get("tag"))
        if isinstance(raw, TableRow) and raw.nulls:
            conversation.note(NULLS, ", ".join(raw.nulls))
        return conversation

    def check(self, raws: list[Raw], recipe: Recipe) -> Checked:
        """Rows that cannot be used, by number; how many rows had each shape; the recipe's columns that are there; notes."""
        bad, shapes, found, notes = {}, Counter[str](), set[str](), list[Note]()
        for number, raw in enumerate(raws):
            try:
                conversation = self.conversation(raw, recipe, found=found)
                shapes[conversation.shape] += 1
                notes += ((number, *note) for note in conversation.notes)
            except BadRow as error:
                bad[number] = error
        return bad, shapes, frozenset(found), notes

    def encode(self, raws: list[Raw], recipe: Recipe) -> Encoding:
        """Samples of these rows."""
        conversations: list[Conversation] = []
        numbers, bad, long, unsupervised = [], {}, {}, 0
        shapes, found, notes = Counter[str](), set[str](), list[Note]()
        for number, raw in enumerate(raws):
            try:
                conversation = self.conversation(raw, recipe, found=found)
                shapes[conversation.shape] += 1
                conversation.literal = not self.parse_special
                notes += ((number, *note) for note in conversation.notes)
                if self._surely_long(conversation):
                    long[number] = -1
                    continue
                conversations.append(conversation)
                numbers.append(number)
            except BadRow as error:
                bad[number] = error
        counts = [0] * len(raws)
        cut, control, seen = {}, Counter[str](), Seen()
        parts: list[Encoded] = []
        for number, conversation, item in zip(numbers, conversations, self.template.encode(conversations), strict=True):
            if isinstance(item, BadRow):
                bad[number] = item
                continue
            if conversation.cut:
                cut[number] = conversation.cut
            unsupervised += self.template.unsupervised_turns(conversation)
            if conversation.text is not None:
                control += self.template.encoder.control_in(conversation.text)
            elif seen.rows < LOOKED_AT:
                seen.look(self.template, conversation, item)
            if 0 < self.max_length < len(item.ids):
                long[number] = len(item.ids)
            pieces = [piece for piece in self._cut(item) if piece.kept[1:].any()]
            if not pieces and number not in long:
                bad[number] = BadRow("no supervised token")
            elif not pieces and self.truncation != "delete":
                bad[number] = BadRow(NO_LOSS_LEFT)
            counts[number] = len(pieces)
            parts.extend(pieces)
        whole, sizes = joined(parts), [len(part.ids) for part in parts]
        own = [float(weights_of(part).sum(dtype=np.float64)) for part in parts if part.weights is not None]
        return Encoding(
            whole.ids, whole.kept, whole.weights, sizes, counts, bad, long, shapes, unsupervised, frozenset(found),
            (len(own), sum(own)), cut, control, notes, seen,
        )  # fmt: skip

    def _cut(self, item: Encoded) -> list[Encoded]:
        size = self.max_length
        if size <= 0 or len(item.ids) <= size:
            return [item]
        if self.truncation == "delete":
            return []
        if self.truncation == "truncation_left":
            return [item.part(slice(-size, None))]
        return [item.part(slice(first, first + size)) for first in range(0, len(item.ids), size)]

    def _surely_long(self, conversation: Conversation) -> bool:
        """Whether a row is too long by its bytes alone, so that a huge one need not be tokenized to be dropped."""
        if self.truncation != "delete" or self.max_length <= 0:
            return False
        encoder = self.template.encoder
        texts = [conversation.text or "", *(message.content for message in conversation.messages)]
        most = self.max_length * encoder.longest_token
        if sum(map(len, texts)) <= most:
            return False
        return not encoder.swallows or sum(len(part) for text in texts for part in text.split()) > most


def renamed(raw: Raw, recipe: Recipe, found: set[str] | None = None) -> dict[str, Any]:
    """One row under the names that the recipe gives its columns; adds those that it has to `found`. Raises BadRow."""
    row = decode(raw)
    for source, target in recipe.columns.items():
        if source in row:
            if found is not None:
                found.add(source)
            row = {key: value for key, value in row.items() if key not in (source, target)} | (
                {} if target == "-" else {target: row[source]}
            )
    if recipe.converter:
        row = CONVERTERS[recipe.converter](row)
    return row
