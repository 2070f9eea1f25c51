"""From a row of any recognised shape to a Conversation.

Shapes, in the order in which they are looked for: swift (query, response, history), alpaca (instruction, input,
output), conversations, messages, conversation, prompt with completion under the usual names, and text alone.
"""

from __future__ import annotations

import ast
import json
from typing import Any

from megaswift.data import preference
from megaswift.data.conversation import NOT_TEXT, BadRow, Conversation, Message
from megaswift.data.messages import read_messages, tools_of

QUERY_NAMES = ("query", "prompt", "input", "instruction", "question", "problem", "inputs", "user")
RESPONSE_NAMES = (
    "response",
    "answer",
    "output",
    "completion",
    "target",
    "targets",
    "solution",
    "chosen_response",
    "assistant",
    "answer_content",
)
TEXT_NAMES = ("text", "content", "document")
SYSTEM_NAMES = ("system", "system_prompt")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
CHAT_COLUMNS = ("conversations", "messages", "conversation")


def to_conversation(row: dict[str, Any], *, answered: bool = True) -> Conversation:
    """Turn a row into a conversation.

    Args:
        row: column name to value; None counts as absent.
        answered: whether an answer is needed, as for training; what stands after the last one is left out. False for questions.

    Raises:
        BadRow: nothing is recognised, or something in the row has a wrong type, is empty or out of order.
    """
    row = {key: value for key, value in row.items() if value is not None}
    if any(row.get(name) for name in MEDIA):
        raise BadRow(NOT_TEXT, "only text can be trained")
    if isinstance(row.get("messages"), str) or isinstance(row.get("conversations"), str):
        row = _unpack_json_columns(row)
    row = preference.with_chosen(row, CHAT_COLUMNS)
    conversation = _by_shape(row)
    if answered:
        ends = conversation.text is not None or any(message.role == "assistant" for message in conversation.messages[-1:])
        preference.refuse_bad(row, numbers=conversation.text is None, answered_at_end=ends)
        if preference.is_pair(row):
            conversation.note(preference.PAIR)
    if conversation.text is None:
        _add_system(conversation, row)
        conversation.tools = tools_of(row.get("tools"))
        _check(conversation, answered)
    else:
        check_text(conversation.text, "text")
    return conversation


def _by_shape(row: dict[str, Any]) -> Conversation:
    if "response" in row:
        return _query_response(row, _first(row, QUERY_NAMES), "response", "query, response")
    if "instruction" in row and "output" in row:
        return _alpaca(row)
    for name in CHAT_COLUMNS:
        if isinstance(row.get(name), list):
            return _chat(row[name], name)
        if name in row and name != "conversation":
            raise BadRow("wrong type", f"{name} is {_kind(row[name])}, expected a list")
    return _prompt_completion(row)


def _alpaca(row: dict[str, Any]) -> Conversation:
    instruction, extra = _text(row, "instruction"), _text(row, "input") if "input" in row else ""
    query = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    turns = _history(row) + [Message("user", query), Message("assistant", _text(row, "output"))]
    return Conversation(turns, shape="instruction, input, output")


def _query_response(row: dict[str, Any], query_name: str | None, response_name: str, shape: str) -> Conversation:
    response = _text(row, response_name)
    query = _text(row, query_name) if query_name else ""
    history = _history(row)
    if not query.strip() and not history:
        if not response.strip():
            raise BadRow("empty content", f"{response_name} is empty")
        if response_name not in TEXT_NAMES:
            as_text = f"""--columns '{{"{response_name}": "text"}}'"""
            raise BadRow("no question", f"{response_name} alone; to train it as plain text: {as_text}")
        return Conversation(text=response, shape=f"{response_name} alone (pre-training)")
    return Conversation([*history, Message("user", query), Message("assistant", response)], shape=shape)


def _chat(turns: list[Any], name: str) -> Conversation:
    if turns and isinstance(turns[0], dict) and "human" in turns[0] and "assistant" in turns[0]:
        messages = []
        for turn in turns:
            if not isinstance(turn, dict):
                raise BadRow("wrong type", f"a turn is {_kind(turn)}, expected an object")
            messages += [Message("user", _text(turn, "human")), Message("assistant", _text(turn, "assistant"))]
        return Conversation(messages, shape=f"{name} of human, assistant")
    return Conversation(read_messages(turns), shape=name)


def _prompt_completion(row: dict[str, Any]) -> Conversation:
    query_name, response_name = _first(row, QUERY_NAMES), _first(row, RESPONSE_NAMES)
    if query_name and response_name:
        if isinstance(row[query_name], list) and isinstance(row[response_name], list):
            return Conversation(
                read_messages(row[query_name] + row[response_name]), shape=f"{query_name}, {response_name} (messages)"
            )
        return _query_response(row, query_name, response_name, f"{query_name}, {response_name}")
    text_name = _first(row, TEXT_NAMES)
    if query_name and text_name:
        return _query_response(row, query_name, text_name, f"{query_name}, {text_name}")
    alone = text_name or response_name
    if alone:
        return _query_response(row, None, alone, "")
    if query_name:  # a question without an answer
        value = row[query_name]
        turns = read_messages(value) if isinstance(value, list) else [*_history(row), Message("user", _text(row, query_name))]
        return Conversation(turns, shape=query_name)
    raise BadRow("columns not recognised", f"columns: {', '.join(map(str, row)) or 'none'}")


def _history(row: dict[str, Any]) -> list[Message]:
    """Earlier turns as [[query, response], ...]; CSV files hold the list as text."""
    history = row.get("history")
    if isinstance(history, str) and history.strip():
        history = _literal(history)
    if not history:
        return []
    turns = []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadRow("wrong type", "history must be a list of [query, response] texts")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise BadRow("wrong type", "history is text that is no list") from None


def _unpack_json_columns(row: dict[str, Any]) -> dict[str, Any]:
    """CSV files hold whole conversations as JSON text."""
    row = dict(row)
    for name in ("messages", "conversations"):
        value = row.get(name)
        if isinstance(value, str):
            try:
                row[name] = json.loads(value)
            except (ValueError, RecursionError):
                raise BadRow("wrong type", f"{name} is text that is no JSON") from None
    return row


def _add_system(conversation: Conversation, row: dict[str, Any]) -> None:
    name = _first(row, SYSTEM_NAMES)
    if name and not (conversation.messages and conversation.messages[0].role == "system"):
        conversation.messages.insert(0, Message("system", _text(row, name)))


def _check(conversation: Conversation, answered: bool) -> None:
    """What every conversation must fulfil: texts that can be tokenized, none empty, an answer where one is needed."""
    if answered:
        _cut_after_last_answer(conversation)
    messages = conversation.messages
    for number, message in enumerate(messages, 1):
        where = f"message {number}, {message.role}"
        check_text(message.content, where)
        if message.reasoning:
            check_text(message.reasoning, where)
        if not message.content.strip() and not message.tool_calls and message.role in ("user", "assistant"):
            raise BadRow("empty content", where)
    if not messages:
        raise BadRow("no message", "the list of messages is empty")
    if not answered:
        return
    if not any(message.role == "assistant" for message in messages):
        raise BadRow("no assistant turn", f"roles: {', '.join(message.role for message in messages)}")
    if all(message.role == "assistant" for message in messages):
        raise BadRow("no question", "nothing but the assistant's messages")
    if not any(message.role == "assistant" and message.loss for message in messages):
        raise BadRow("no supervised turn", "loss is 0 on every assistant turn")


def _cut_after_last_answer(conversation: Conversation) -> None:
    """Leave out the messages that nobody answers; where there is no answer at all, they stay."""
    messages = conversation.messages
    size = max((number for number, message in enumerate(messages, 1) if message.role == "assistant"), default=len(messages))
    conversation.cut = len(messages) - size
    conversation.messages = messages[:size]


def check_text(text: str, where: str) -> None:
    """Raise BadRow for a text that has no form in UTF-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("lone surrogate", f"{where}, character {error.start + 1}") from None


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{name} is {_kind(value)}, expected text")
    return value


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)


def _kind(value: Any) -> str:
    return {list: "a list", dict: "an object", str: "text", bool: "true/false", int: "a number", float: "a number"}.get(
        type(value), type(value).__name__
    )
