"""Rows of every shape become conversations; bad ones say why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megaswift.data.conversation import BadRow, Message
from megaswift.data.preference import PAIR
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


@pytest.mark.parametrize("row", [{"text": "t"}, {"content": "t", "id": 3}, {"document": "t"}, {"prompt": None, "text": "t"}])
def test_text_alone_is_pretraining(row: dict[str, Any]) -> None:
    assert to_conversation(row).text == "t"


@pytest.mark.parametrize(
    "row",
    [
        {"response": "t"},
        {"query": "", "response": "t"},
        {"query": None, "output": "t"},
        {"instruction": None, "input": None, "output": "t", "plan_first": "p"},
        {"answer": "t", "id": 3},
        {"messages": [A]},
        {"messages": [A, A]},
        {"chosen": "t", "rejected": "u"},
    ],
)
def test_a_row_without_a_question_is_no_text(row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="^no question"):
        to_conversation(row)


def test_an_answer_that_is_meant_as_text_is_named_so() -> None:
    with pytest.raises(BadRow, match=r"""--columns '\{"output": "text"\}'"""):
        to_conversation({"output": "t"})


def test_a_system_prompt_may_be_all_that_is_asked() -> None:
    assert turns({"messages": [{"role": "system", "content": "s"}, A]}) == [("system", "s"), ("assistant", "a")]


BAD_LABELS: list[dict[str, Any]] = [
    {"label": False},
    {"kto_tag": False},
    {"label": 0},
    {"label": -1.0},
    {"label": "False"},
    {"chosen": False},
    {"preference": "rejected"},
]


@pytest.mark.parametrize("column", BAD_LABELS, ids=str)
def test_a_bad_answer_is_not_trained(column: dict[str, Any]) -> None:
    for row in ({"query": "q", "response": "a"}, {"messages": [Q, A]}, {"instruction": "q", "output": "a"}):
        with pytest.raises(BadRow, match="^a rejected answer .*swift sft trains no rejected answer"):
            to_conversation(row | column)
        to_conversation(row | column, answered=False)  # it can still be asked
        assert not to_conversation(row | {next(iter(column)): True}).notes


def test_what_is_no_bad_answer() -> None:
    for column in ({"label": None}, {"label": 1}, {"label": "positive"}, {"preference": "chosen"}):
        to_conversation({"query": "q", "response": "a"} | column)
    assert to_conversation({"text": "t", "label": 0}).text == "t"  # the number of a class
    with pytest.raises(BadRow, match="a rejected answer"):
        to_conversation({"text": "t", "label": False})


B = {"role": "assistant", "content": "bad"}
PAIRS: list[dict[str, Any]] = [
    {"prompt": "q", "chosen": "a", "rejected": "bad"},
    {"instruction": "q", "input": "", "chosen": "a", "rejected": "bad"},
    {"query": "q", "response": "a", "rejected_response": "bad"},
    {"prompt": "q", "chosen_response": "a", "rejected_response": "bad"},
    {"chosen": [Q, A], "rejected": [Q, B]},
    {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]},
    {"prompt": [Q], "chosen": [A], "rejected": [B]},
    {"prompt": "q", "chosen": [A], "rejected": [B]},
    {"messages": [Q, A], "rejected_messages": [Q, B]},
    {"messages": [Q, A], "rejected_response": "bad"},
    {"messages": [Q], "chosen": "a", "rejected": "bad"},
    {"chosen_messages": [Q, A], "rejected_messages": [Q, B]},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": B},
    {"input": {"messages": [Q], "tools": []}, "preferred_output": [A], "non_preferred_output": [B]},
]


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: " ".join(row))
def test_of_a_pair_the_chosen_answer_is_trained_and_told(row: dict[str, Any]) -> None:
    assert turns(row) == [("user", "q"), ("assistant", "a")]
    assert [text for text, _ in to_conversation(row).notes] == [PAIR]


@pytest.mark.parametrize(
    "row",
    [{"prompt": "q", "rejected": "bad"}, {"messages": [Q], "rejected_response": "bad"}, {"instruction": "q", "rejected": "b"}],
    ids=str,
)
def test_a_rejected_answer_alone_is_not_trained(row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="^a rejected answer"):
        to_conversation(row)


def block(kind: str, value: str) -> dict[str, str]:
    return {"type": kind, "value": value}


def test_blocks_of_type_and_value() -> None:
    call = json.dumps({"name": "add", "arguments": {"a": 1, "none": None}})
    messages = to_conversation(
        {
            "messages": [
                {"role": "system", "content": [block("text", "s")]},
                {"role": "user", "content": [block("text", "q"), block("text", "2")]},
                {
                    "role": "assistant",
                    "content": [
                        block("reasoning", "th"),
                        block("reasoning", "ink"),
                        block("text", "a"),
                        block("tool_call", call),
                    ],
                },
                {"role": "tool", "content": [block("text", "3")]},
                {"role": "assistant", "content": [{"type": "text", "text": None, "value": "done"}]},
            ],
            "tools": json.dumps([{"name": "add"}]),
        }
    ).messages
    assert [(item.role, item.content, item.reasoning) for item in messages] == [
        ("system", "s", None),
        ("user", "q2", None),
        ("assistant", "a", "think"),
        ("tool", "3", None),
        ("assistant", "done", None),
    ]
    assert messages[2].tool_calls == [{"name": "add", "arguments": {"a": 1, "none": None}}]
    for kind in ("image_url", "video_url", "audio_url"):
        with pytest.raises(BadRow, match="images, video or audio"):
            to_conversation({"messages": [{"role": "user", "content": [block(kind, "x")]}, A]})
    with pytest.raises(BadRow, match="content block of type 'other'"):
        to_conversation({"messages": [{"role": "user", "content": [block("other", "x")]}, A]})
    with pytest.raises(BadRow, match="not JSON"):
        to_conversation({"messages": [Q, {"role": "assistant", "content": [block("tool_call", "x")]}]})


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


@pytest.mark.parametrize(("text", "found"), [("r", "r"), (None, ""), (5, "wrong type"), (["r"], "wrong type")], ids=str)
def test_results_within_results(text: Any, found: str) -> None:
    result = {"type": "tool_result", "content": [{"type": "text", "text": text}, {"type": "text", "text": ""}]}
    row = {"messages": [Q, A, {"role": "user", "content": [result]}, A]}
    if found != "wrong type":
        assert [message.content for message in to_conversation(row).messages if message.role == "tool"] == [found]
        return
    with pytest.raises(BadRow, match="^wrong type .*a tool result is list"):
        to_conversation(row)


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
