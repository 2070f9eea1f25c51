"""What inference will see: the prompt that a model is given for an answer, beside the row from which it learns that answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megaswift.data.conversation import BadRow, Conversation
from megaswift.data.tokens import Encoded

if TYPE_CHECKING:
    from megaswift.data.chat import ChatTemplate

LOOKED_AT = 8  # rows of each call of the pipeline
_SHOWN = 60  # characters of a difference
_NO_THOUGHTS = re.compile(r"\s*<think>\s*</think>")


@dataclass
class Seen:
    """How the last answers of some rows begin and end.

    Attributes:
        rows: looked at.
        other: of them, whose text does not begin with the prompt of the last answer.
        endless: whose last token is none that ends an answer, or carries no loss.
        thoughtless: whose answer begins with empty thoughts.
        prompt, trained: what inference sends and what the row has, from where the first of `other` differs.
    """

    rows: int = 0
    other: int = 0
    endless: int = 0
    thoughtless: int = 0
    prompt: str = ""
    trained: str = ""

    def add(self, more: Seen) -> None:
        """Count the rows of another."""
        if self.other == 0:
            self.prompt, self.trained = more.prompt, more.trained
        for name in ("rows", "other", "endless", "thoughtless"):
            setattr(self, name, getattr(self, name) + getattr(more, name))

    def look(self, template: ChatTemplate, conversation: Conversation, row: Encoded) -> None:
        """Count one more row: a conversation that ends with an answer, and what it became.

        Left out are those whose last answer carries no loss, and those that no prompt can be made of.
        """
        if not conversation.messages[-1].loss:
            return
        try:
            asked = Conversation(conversation.messages[:-1], conversation.tools, shape=conversation.shape)
            prompt, text = template.decode(template.prompt(asked)), template.decode(row.ids)
        except BadRow:
            return
        self.rows += 1
        self.endless += not (bool(row.kept[-1]) and int(row.ids[-1]) in template.end_ids)
        if not text.startswith(prompt):
            if not self.other:
                first = next((n for n, (a, b) in enumerate(zip(prompt, text)) if a != b), min(len(prompt), len(text)))
                self.prompt, self.trained = (part[first : first + _SHOWN] for part in (prompt, text))
            self.other += 1
        silent = np.flatnonzero(~row.kept)
        answer = template.decode(row.ids[silent[-1] + 1 :] if len(silent) else row.ids)
        self.thoughtless += _NO_THOUGHTS.match(answer) is not None

    def remarks(self) -> list[str]:
        """What inference would see differently, in words."""
        of, result = f"of {self.rows:,} rows looked at", []
        if self.other:
            result.append(
                f"{self.other:,} {of} do not begin as the prompt of their last answer: inference sends {self.prompt!r} where the row has {self.trained!r}"
            )
        if self.endless:
            result.append(f"{self.endless:,} {of} end without a token that ends answers, so that stopping is not learnt there")
        if self.thoughtless:
            result.append(
                f"{self.thoughtless:,} {of} have empty thoughts in their last answer: the model learns not to think (--loss_scale ignore_empty_think: it does not)"
            )
        return result
