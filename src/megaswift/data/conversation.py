"""What every data row becomes: messages, or plain text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NOT_TEXT = "images, video or audio"  # the reason for which rows with more than text are refused


class BadRow(Exception):
    """A row that cannot be used.

    Args:
        reason: one of few short texts, for counting.
        detail: what exactly was found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@dataclass(slots=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool.
        content: its text.
        reasoning: thinking text of an assistant turn, without its tags; None when there is none.
        tool_calls: {"name": str, "arguments": dict or text} of an assistant turn.
        loss: weight of an assistant turn's tokens in the loss; 0: it is not supervised.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    loss: float = 1.0


@dataclass(slots=True)
class Conversation:
    """Messages with the tools that they may call; or `text` alone, every token of which is supervised.

    Attributes:
        literal: control tokens in `text` are read as characters.
        cut: messages after the last answer, which are left out of `messages`.
        margin: of an answer in a pair, by how much the chosen one shall be ahead.
        notes: (what was changed or is doubtful in the row, where in it), to be counted and told.
    """

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    text: str | None = None
    shape: str = ""
    literal: bool = False
    cut: int = 0
    margin: float = 0.0
    notes: list[tuple[str, str]] = field(default_factory=list)

    def note(self, text: str, detail: str = "") -> None:
        """Something about the row that the user must be told."""
        self.notes.append((text, detail))
