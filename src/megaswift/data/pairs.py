"""Rows of preferences as samples: the two answers of a pair next to each other, or single answers that are good or bad."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from megaswift.data import preference
from megaswift.data.classes import scored_at
from megaswift.data.conversation import BadRow, Conversation
from megaswift.data.labels import finite
from megaswift.data.pipeline import NO_LOSS_LEFT, Checked, Encoding, Note, Pipeline, Recipe, renamed
from megaswift.data.places import fill_places
from megaswift.data.read import Raw
from megaswift.data.rows import CHAT_COLUMNS, RESPONSE_NAMES, to_conversation
from megaswift.data.seen import LOOKED_AT, Seen
from megaswift.data.tables import NULLS, TableRow
from megaswift.data.tokens import Encoded, joined, weights_of

SAME = "chosen equal to rejected"


def to_pair(row: dict[str, Any]) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation of a row; what both begin with carries no loss.

    Raises BadRow: no rejected answer, two equal answers, two different questions, or what is wrong with any conversation.
    """
    row = {key: value for key, value in row.items() if value is not None}
    good, bad, column = preference.both(row, CHAT_COLUMNS, RESPONSE_NAMES)
    chosen = to_conversation(good)
    try:
        rejected = to_conversation(bad)
    except BadRow as error:
        raise BadRow(error.reason, f"{column}: {error.detail}") from None
    if chosen.text is None and rejected.text is None:
        _leave_out_common(chosen, rejected)
    elif chosen.text == rejected.text:
        raise BadRow(SAME)
    chosen.shape = f"{chosen.shape}; rejected answer in {column}"
    return chosen, rejected


def to_labelled(row: dict[str, Any]) -> list[tuple[Conversation, bool]]:
    """The answers of a row, and whether each is a good one; a pair without a label gives both of its answers. Raises BadRow."""
    row = {key: value for key, value in row.items() if value is not None}
    if preference.is_pair(row) and not any(name in row for name in preference.LABELS):
        chosen, rejected = to_pair(row)
        return [(chosen, True), (rejected, False)]
    good = preference.desirable(row)
    conversation = to_conversation(preference.without_label(row))
    if conversation.text is not None:
        raise BadRow("no question", "a label is about the answer to one")
    last = conversation.messages[-1:]  # of the turns only the last one is judged
    for message in conversation.messages:
        message.loss = message.loss if message is last[0] or message.role != "assistant" else 0.0
    conversation.shape += " with label"
    return [(conversation, good)]


def _leave_out_common(chosen: Conversation, rejected: Conversation) -> None:
    """No loss on what two conversations begin with. Raises BadRow unless an answer is the first thing that differs."""
    pairs = list(zip(chosen.messages, rejected.messages))
    seen = [(one.role, one.content, one.reasoning, one.tool_calls) for one, _ in pairs]
    others = [(other.role, other.content, other.reasoning, other.tool_calls) for _, other in pairs]
    first = next((number for number, (one, other) in enumerate(zip(seen, others)) if one != other), len(pairs))
    if first == len(pairs):
        same = len(chosen.messages) == len(rejected.messages)
        raise BadRow(SAME) if same else BadRow("one answer of a pair is the beginning of the other")
    if {seen[first][0], others[first][0]} != {"assistant"}:
        raise BadRow("two questions in a pair", f"message {first + 1}: {seen[first][0]} and {others[first][0]}")
    for one, other in pairs[:first]:
        one.loss = other.loss = 0.0


class PreferencePipeline(Pipeline):
    """A Pipeline whose rows give the answers of preferences.

    Args:
        kind: preference.PAIRS, or MARGINS, each row gives two samples, or none; LABELLED: one, or two where the row is a pair; MISMATCHED: two
            or four, each answer followed by the same question with the answer before it.
    """

    def __init__(self, kind: str, *args: Any) -> None:
        super().__init__(*args)
        self.kind = kind

    def answers(self, raw: Raw, recipe: Recipe, found: set[str] | None = None) -> list[tuple[Conversation, bool]]:
        """The conversations of a row, and whether each ends with a good answer. Raises BadRow."""
        row = renamed(raw, recipe, found)
        if self.kind in (preference.PAIRS, preference.MARGINS):
            chosen, rejected = to_pair(row)
            made = [(chosen, True), (rejected, False)]
        else:
            made = to_labelled(row)
        if self.kind == preference.MARGINS:
            for conversation, _ in made:
                conversation.margin = (
                    finite(row[preference.MARGIN], "margin") if row.get(preference.MARGIN) is not None else 0.0
                )
        for conversation, _ in made:
            fill_places(conversation, recipe.names, row.get("tag"))
        if isinstance(raw, TableRow) and raw.nulls:
            made[0][0].note(NULLS, ", ".join(raw.nulls))
        return made

    def check(self, raws: list[Raw], recipe: Recipe) -> Checked:
        """As a Pipeline does, both answers of each row."""
        return self._read(raws, recipe)[1]

    def _read(self, raws: list[Raw], recipe: Recipe) -> tuple[dict[int, list[tuple[Conversation, bool]]], Checked]:
        """The answers of each row that can be used, by its number; and what `check` says of all."""
        made: dict[int, list[tuple[Conversation, bool]]] = {}
        bad, found, notes = {}, set[str](), list[Note]()
        for number, raw in enumerate(raws):
            try:
                made[number] = self.answers(raw, recipe, found)
                notes += ((number, *note) for conversation, _ in made[number] for note in conversation.notes)
            except BadRow as error:
                bad[number] = error
        shapes = Counter(answers[0][0].shape for answers in made.values())
        return made, (bad, shapes, frozenset(found), notes)

    def encode(self, raws: list[Raw], recipe: Recipe) -> Encoding:
        """Samples of these rows: a row whose answers cannot all be used gives none."""
        every, (bad, shapes, found, notes) = self._read(raws, recipe)
        rows: list[tuple[int, list[tuple[Conversation, bool]]]] = []
        long: dict[int, int] = {}
        for number, made in every.items():
            if any(self._surely_long(conversation) for conversation, _ in made):
                long[number] = -1
                continue
            rows.append((number, made))
        conversations = [conversation for _, made in rows for conversation, _ in made]
        encoded = iter(self.template.encode(conversations))
        beside = iter(self._mismatched(conversations))
        counts, unsupervised = [0] * len(raws), 0
        cut: dict[int, int] = {}
        parts: list[Encoded] = []
        desirable: list[bool] = []
        margins: list[list[float]] | None = [] if self.kind == preference.MARGINS else None
        seen = Seen()
        for number, made in rows:
            items = [next(encoded) for _ in made]
            others = [next(beside) for _ in made] if self.kind == preference.MISMATCHED else []
            try:
                pieces = self._judged(items, number, long, text=made[0][0].text is not None)
            except BadRow as error:
                bad[number] = error
                continue
            first = items[0]
            if isinstance(first, Encoded) and made[0][0].text is None and margins is None and seen.rows < LOOKED_AT:
                seen.look(self.template, made[0][0], first)
            for conversation, _ in made:
                unsupervised += self.template.unsupervised_turns(conversation)
                if conversation.cut:
                    cut[number] = max(cut.get(number, 0), conversation.cut)
            if others:
                pieces = [one for pair in zip(pieces, map(self._fitting, others, pieces), strict=False) for one in pair]
            if margins is not None:  # what is trained of these is one score
                pieces = [scored_at(piece.ids, self.template.pad_id) for piece in pieces]
            counts[number] = len(pieces)
            parts += pieces
            each = len(pieces) // len(made)
            desirable += [good for _, good in made for _ in range(each)]
            if margins is not None:
                margins += [[conversation.margin] for conversation, _ in made for _ in range(each)]
        whole, sizes = joined(parts), [len(part.ids) for part in parts]
        own = [float(weights_of(part).sum(dtype=np.float64)) for part in parts if part.weights is not None]
        return Encoding(
            whole.ids, whole.kept, whole.weights, sizes, counts, bad, long, shapes, unsupervised, found,
            (len(own), sum(own)), cut, notes=notes, seen=seen, desirable=desirable, values=margins,
        )  # fmt: skip

    def _mismatched(self, conversations: list[Conversation]) -> list[Encoded | BadRow]:
        """Every question with the answer to the one before, the first with the last one's."""
        if self.kind != preference.MISMATCHED:
            return []
        before = [*conversations[-1:], *conversations[:-1]]
        return self.template.encode(
            [
                Conversation([*one.messages[:-1], other.messages[-1]], tools=one.tools)
                for one, other in zip(conversations, before, strict=True)
            ]
        )

    def _fitting(self, item: Encoded | BadRow, own: Encoded) -> Encoded:
        """A mismatched sample, cut at its end to length; the question with its own answer where it cannot be had."""
        if isinstance(item, BadRow):
            return own
        item = item.part(slice(0, self.max_length)) if self.max_length > 0 else item
        return item if item.kept[1:].any() else own

    def _judged(self, items: list[Any], number: int, long: dict[int, int], text: bool) -> list[Encoded]:
        """The samples of a row, cut to length; none where one of them is too long, which `long` then says. Raises BadRow.

        Args:
            text: they are whole texts, not conversations, whose common messages carry no loss already.
        """
        for item in items:
            if isinstance(item, BadRow):
                raise item
        if text and len(items) == 2:
            items = _without_common(*items)
        longest = max(len(item.ids) for item in items)
        if 0 < self.max_length < longest:
            long[number] = longest
            if self.truncation == "delete":
                return []
        pieces = [piece for item in items for piece in self._cut(item)]
        if len(pieces) == 2 and np.array_equal(pieces[0].ids, pieces[1].ids):
            raise BadRow(SAME, "as tokens within max_length")
        if not all(piece.kept[1:].any() for piece in pieces):
            raise BadRow(NO_LOSS_LEFT if number in long else "no supervised token")
        return pieces


def _without_common(*items: Encoded) -> list[Encoded]:
    """Two whole texts without loss on the tokens that both begin with."""
    shorter = min(len(item.ids) for item in items)
    differs = np.flatnonzero(items[0].ids[:shorter] != items[1].ids[:shorter])
    common = int(differs[0]) if len(differs) else shorter
    return [Encoded(item.ids, item.kept & (np.arange(len(item.ids)) >= common), item.weights) for item in items]
