"""Rows of every shape become conversations; bad ones say why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megaswift.data.conversation import BadRow, Message
from megaswift.data.rows import to_conversation

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def turns(row: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in to_conversation(row, **options).messages]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "response": "a"},
        {"query": "q", "response": "a", "history": []},
        {"query": "q", "response": "a", "history": "[]", "images": []},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [Q, A]},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        {"messages": [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]},
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"conversation": [Q, A]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [Q], "completion": [A]},
        {"question": "q", "answer": "a"},
        {"problem": "q", "solution": "a"},
        {"input": "q", "target": "a"},
        {"instruction": "q", "response": "a"},
    ],
)
def test_shapes(row: dict[str, Any]) -> None:
    assert turns(row) == [("user", "q"), ("assistant", "a")]


def test_history_and_system() -> None:
    expected = [("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "q"), ("assistant", "a")]
    for history in ([["1", "2"]], '[["1", "2"]]', "[('1', '2')]"):
        assert turns({"system": "s", "query": "q", "response": "a", "history": history}) == expected
    assert turns({"system": "s", "instruction": "q", "output": "a", "history": [["1", "2"]]}) == expected
    assert turns({"system": "s", "messages": [Q, A]})[0] == ("system", "s")
    assert turns({"system": "s", "messages": [{"role": "system", "content": "own"}, Q, A]})[0] == ("system", "own")
    assert turns({"system": "s", "conversation": [{"human": "q", "assistant": "a"}]})[0] == ("system", "s")
    assert turns({"system": None, "query": "q", "response": "a"})[0] == ("user", "q")
    assert turns({"system": "", "query": "q", "response": "a"})[0] == ("system", "")


def test_alpaca_joins_instruction_and_input() -> None:
    assert turns({"instruction": "add", "input": "1 2", "output": "3"})[0] == ("user", "add\n1 2")


@pytest.mark.parametrize("row", [{"response": "t"}, {"query": "", "response": "t"}, {"text": "t"}, {"content": "t", "id": 3}])
def test_text_alone_is_pretraining(row: dict[str, Any]) -> None:
    assert to_conversation(row).text == "t"


def test_questions_need_no_answer() -> None:
    assert turns({"query": "q"}, answered=False) == [("user", "q")]
    assert turns({"messages": [Q]}, answered=False) == [("user", "q")]


@pytest.mark.parametrize("name", ["loss", "loss_scale", "weight", "train", "loss_weight"])
def test_loss_per_message(name: str) -> None:
    messages = to_conversation({"messages": [Q, A | {name: 0}, Q, A | {name: True}, Q, A | {name: 0.3}, Q, A]}).messages
    assert [message.loss for message in messages if message.role == "assistant"] == [0.0, 1.0, 0.3, 1.0]
    for wrong in (-1, "1", float("nan"), float("inf"), [1]):
        with pytest.raises(BadRow, match=f"{name} is .*expected a number from 0"):
            to_conversation({"messages": [Q, A | {name: wrong}]})
    with pytest.raises(BadRow, match="not the assistant's"):
        to_conversation({"messages": [Q | {name: 0.5}, A]})
    assert to_conversation({"messages": [Q | {name: 0}, A]}).messages[1].loss == 1.0


def test_tool_calls_of_every_kind() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    openai = [
        Q,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": "r"},
        A,
    ]
    sharegpt = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a"},
    ]
    anthropic = [
        Q,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]}]},
        A,
    ]
    for messages in (openai, sharegpt, anthropic):
        found = to_conversation({"messages": messages, "tools": '[{"name": "f"}]'})
        assert [(message.role, message.content) for message in found.messages] == [
            ("user", "q"),
            ("assistant", ""),
            ("tool", "r"),
            ("assistant", "a"),
        ]
        assert found.messages[1].tool_calls == [call]
        assert found.tools == [{"type": "function", "function": {"name": "f"}}]


def test_several_calls_in_a_row_are_one_turn() -> None:
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    found = to_conversation({"messages": [Q, call, call, {"role": "tool", "content": "r"}, A]})
    assert len(found.messages[1].tool_calls) == 2


def test_thinking_blocks() -> None:
    found = to_conversation(
        {
            "messages": [
                Q,
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]},
            ]
        }
    )
    assert (found.messages[1].reasoning, found.messages[1].content) == ("hm", "a")


def test_calls_and_thoughts_beside_content_blocks() -> None:
    """Both ways of writing them are read, and what stands there both ways is read once."""
    call = {"name": "f", "arguments": {"x": 1}}
    own = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    text, use = {"type": "text", "text": "a"}, {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}
    thinking = {"type": "thinking", "thinking": "hm"}

    def read(*blocks: dict, **beside: object) -> Message:
        item = {"role": "assistant", "content": list(blocks), **beside}
        return to_conversation({"messages": [Q, item, {"role": "tool", "content": "r"}, A]}).messages[1]

    plain = Message("assistant", "a", "hm", [call])
    assert read(text, tool_calls=own, reasoning_content="hm") == plain
    assert read(text, thinking, tool_calls=json.dumps(own), reasoning="hm") == plain
    assert read(text, use, tool_calls=own, reasoning_content="hm") == plain
    assert read(tool_calls=own + own) == Message("assistant", "", None, [call, call])
    assert read(text, use, thinking, tool_calls=[{"name": "g"}], reasoning_content="so") == Message(
        "assistant", "a", "so\nhm", [call, {"name": "g", "arguments": {}}]
    )
    result = {"type": "tool_result", "content": "r"}
    for blocks, beside, found in (([text], {"tool_calls": [1]}, "no name"), ([result], {"tool_calls": own}, "in one message")):
        with pytest.raises(BadRow, match=found):
            read(*blocks, **beside)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "columns not recognised"),
        ({"a": "b"}, "columns not recognised"),
        ({"messages": []}, "no message"),
        ({"messages": {}}, "wrong type"),
        ({"messages": "x"}, "wrong type"),
        ({"messages": [1]}, "wrong type"),
        ({"messages": [Q]}, "no assistant turn"),
        ({"messages": [Q, {"role": "king", "content": "a"}]}, "unknown role"),
        ({"messages": [Q, {"content": "a"}]}, "unknown role"),
        ({"messages": [Q, {"role": "assistant"}]}, "wrong type"),
        ({"messages": [Q, {"role": "assistant", "content": 3}]}, "wrong type"),
        ({"messages": [Q, {"role": "assistant", "content": ""}]}, "empty content"),
        ({"messages": [{"role": "user", "content": " \n"}, A]}, "empty content"),
        ({"messages": [Q, A | {"loss": 0}]}, "no supervised turn"),
        ({"messages": [Q, A | {"loss": "0.5"}]}, "wrong type"),
        ({"messages": [Q | {"loss": 1}, A]}, "loss on a turn that is not the assistant's"),
        ({"messages": [Q, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "images, video or audio"),
        ({"messages": [Q, {"role": "tool_call", "content": "no json"}, A]}, "not JSON"),
        ({"messages": [Q, {"role": "tool_call", "content": "{}"}, A]}, "wrong type"),
        ({"messages": [Q, A], "tools": "no json"}, "not JSON"),
        ({"messages": [Q, A], "tools": [{}]}, "wrong type"),
        ({"messages": [Q, A], "system": 3}, "wrong type"),
        ({"query": "q", "response": 3}, "wrong type"),
        ({"query": "q", "response": ["a"]}, "wrong type"),
        ({"query": 1, "response": "a"}, "wrong type"),
        ({"query": "q", "response": " "}, "empty content"),
        ({"response": ""}, "empty content"),
        ({"query": "q", "response": "a", "history": [["1"]]}, "wrong type"),
        ({"query": "q", "response": "a", "history": "1 +"}, "wrong type"),
        ({"query": "q", "response": "a", "images": ["x.png"]}, "images, video or audio"),
        ({"query": "q", "response": "\ud800"}, "lone surrogate"),
        ({"text": "a\udfff"}, "lone surrogate"),
    ],
)
def test_bad_rows(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        to_conversation(row)
    assert caught.value.reason == reason
