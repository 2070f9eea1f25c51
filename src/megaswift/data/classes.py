"""Rows that are scored as wholes: a text or a conversation, and beside it its class, its classes, or numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from megaswift.data.conversation import BadRow, Conversation
from megaswift.data.labels import LABEL, Classes
from megaswift.data.pipeline import Checked, Encoding, Note, Pipeline, Recipe, renamed
from megaswift.data.places import fill_places
from megaswift.data.read import Raw
from megaswift.data.rows import to_conversation
from megaswift.data.tables import NULLS, TableRow
from megaswift.data.tokens import Encoded, joined, pooled_place


class ClassPipeline(Pipeline):
    """A Pipeline whose rows are scored: each gives one sample, and what its scores are compared with.

    A conversation that ends with a question is read as inference would give it, the assistant's header at its end; one that
    ends with an answer as it stands.
    """

    def __init__(self, classes: Classes, *args: Any) -> None:
        super().__init__(*args)
        self.classes = classes

    def labelled(self, raw: Raw, recipe: Recipe, found: set[str] | None = None) -> tuple[Conversation, list[float]]:
        """The conversation of a row, and what its scores are compared with. Raises BadRow."""
        row = renamed(raw, recipe, found)
        values = self.classes.values(row.get(LABEL))
        conversation = to_conversation({key: value for key, value in row.items() if key != LABEL}, answered=False)
        fill_places(conversation, recipe.names, row.get("tag"))
        if isinstance(raw, TableRow) and raw.nulls:
            conversation.note(NULLS, ", ".join(raw.nulls))
        conversation.shape += f" with {LABEL}"
        return conversation, values

    def check(self, raws: list[Raw], recipe: Recipe) -> Checked:
        """As a Pipeline does."""
        return self._read(raws, recipe)[1]

    def _read(self, raws: list[Raw], recipe: Recipe) -> tuple[dict[int, tuple[Conversation, list[float]]], Checked]:
        """Conversation and values of each row that can be used, by its number; and what `check` says of all."""
        made: dict[int, tuple[Conversation, list[float]]] = {}
        bad, found, notes = {}, set[str](), list[Note]()
        for number, raw in enumerate(raws):
            try:
                made[number] = self.labelled(raw, recipe, found)
                notes += ((number, *note) for note in made[number][0].notes)
            except BadRow as error:
                bad[number] = error
        shapes = Counter(conversation.shape for conversation, _ in made.values())
        return made, (bad, shapes, frozenset(found), notes)

    def encode(self, raws: list[Raw], recipe: Recipe) -> Encoding:
        """Samples of these rows; what carries loss of each is the token of whose state the scores are made."""
        made, (bad, shapes, found, notes) = self._read(raws, recipe)
        counts, long, parts, values = [0] * len(raws), dict[int, int](), list[Encoded](), list[list[float]]()
        short = {number: one for number, one in made.items() if not self._surely_long(one[0])}
        long = dict.fromkeys(made.keys() - short.keys(), -1)
        encoded = scored_tokens(self.template, [conversation for conversation, _ in short.values()])
        for (number, (_, own)), item in zip(short.items(), encoded, strict=True):
            if isinstance(item, BadRow):
                bad[number] = item
                continue
            if 0 < self.max_length < len(item):
                long[number] = len(item)
                if self.truncation == "delete":
                    continue
                item = item[-self.max_length :]
            counts[number] = 1
            parts.append(scored_at(item, self.template.pad_id))
            values.append(own)
        whole, sizes = joined(parts), [len(part.ids) for part in parts]
        return Encoding(whole.ids, whole.kept, None, sizes, counts, bad, long, shapes, 0, found, notes=notes, values=values)


def scored_at(ids: np.ndarray, pad_id: int) -> Encoded:
    """A sample with loss at the one token whose state is scored."""
    return Encoded(ids, np.arange(len(ids)) == pooled_place(ids, pad_id))


def scored_tokens(template: Any, conversations: list[Conversation]) -> list[np.ndarray | BadRow]:
    """int32 ids of each conversation as it is scored, in training and by `swift infer` alike, or why it cannot be had."""
    made: list[np.ndarray | BadRow] = []
    for conversation in conversations:
        last = conversation.messages[-1:]
        try:
            if conversation.text is None and last and last[0].role != "assistant":
                ids = template.prompt(conversation)
            else:
                (item,) = template.encode([conversation])
                if isinstance(item, BadRow):
                    raise item
                ids = item.ids
            if not len(ids):
                raise BadRow("no token", "nothing is left of the row")
            made.append(ids)
        except BadRow as error:
            made.append(error)
    return made
