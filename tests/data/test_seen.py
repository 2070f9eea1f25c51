"""What inference will see beside what is learnt: the same beginning, an end that is learnt, thoughts that are there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from data_chats import CHATS, tokenizer_of

from megaswift.data.chat import ChatTemplate
from megaswift.data.conversation import Conversation, Message
from megaswift.data.loss_rules import LossRules
from megaswift.data.seen import Seen
from megaswift.data.tokens import Encoded

ROWS = [
    [Message("user", "hello"), Message("assistant", "world")],
    [Message("user", "hello"), Message("assistant", "a"), Message("user", "and"), Message("assistant", "b\nc")],
]


def looked(template: ChatTemplate, rows: list[list[Message]], **change: Any) -> Seen:
    seen = Seen()
    for messages in rows:
        encoded = template.encode([Conversation(list(messages))])[0]
        assert isinstance(encoded, Encoded)
        for name, value in change.items():
            setattr(encoded, name, value(encoded))
        seen.look(template, Conversation(list(messages)), encoded)
    return seen


@pytest.mark.parametrize("name", [name for name in CHATS if name != "deepseek-r1"])
def test_rows_begin_as_their_prompts(name: str) -> None:
    assert looked(ChatTemplate(tokenizer_of(name)), ROWS) == Seen(rows=2), "nothing to remark"


def test_what_inference_sends_and_no_row_has() -> None:
    """DeepSeek-R1's prompt opens thoughts; answers without any are learnt behind another beginning."""
    seen = looked(ChatTemplate(tokenizer_of("deepseek-r1")), ROWS)
    assert (seen.rows, seen.other) == (2, 2) and seen.prompt.startswith("<think>") and seen.trained.startswith("world")
    assert "2 of 2 rows looked at do not begin as the prompt" in seen.remarks()[0] and "<think>" in seen.remarks()[0]


def test_an_end_that_is_not_learnt() -> None:
    template = ChatTemplate(tokenizer_of("chatml"))
    silent = looked(template, ROWS, kept=lambda row: np.append(row.kept[:-1], False))
    gone = looked(template, ROWS, ids=lambda row: row.ids[:-1], kept=lambda row: row.kept[:-1])
    assert silent.endless == gone.endless == 2 and "stopping is not learnt" in silent.remarks()[0]


def test_empty_thoughts() -> None:
    rows = [[Message("user", "hello"), Message("assistant", "<think>\n\n</think>\n\nworld")], ROWS[0]]
    for text, expected in (("default", True), ("ignore_empty_think", False)):
        seen = looked(ChatTemplate(tokenizer_of("chatml"), loss=LossRules.parse(text)), rows)
        assert bool(seen.thoughtless) is expected and seen.other == 0
    assert (
        looked(ChatTemplate(tokenizer_of("chatml")), [[*ROWS[0][:1], Message("assistant", "x", loss=0.0)], ROWS[0]][1:]).rows
        == 1
    )
