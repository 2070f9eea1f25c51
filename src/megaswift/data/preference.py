"""Rows of preference data: `swift sft` trains the good answer of a pair alone; `swift rlhf` takes rows apart into both."""

from __future__ import annotations

from typing import Any

from megaswift.data.conversation import BadRow
from megaswift.data.messages import role_of

CHOSEN = ("chosen", "chosen_messages", "preferred_output", "chosen_response")
REJECTED = ("rejected", "rejected_messages", "non_preferred_output", "rejected_response")
LABELS = ("label", "kto_tag")  # true or false, and numbers above 0 or not
# What `swift rlhf` takes rows for: chosen and rejected; one answer with its label; the same, and after it the question with the
# answer to another one, by which KTO measures how far it is from its reference.
PAIRS, LABELLED, MISMATCHED = "pairs", "labelled", "labelled, mismatched beside"
MARGINS = "pairs, margins beside"  # as pairs, with the margin by which the chosen answer shall be ahead where a row has one
MARGIN = "margin"  # its column
PAIR = "preference pairs, trained on the chosen answer; swift sft leaves the rejected one out"
_ONLY_GOOD = "swift sft trains no rejected answer"


def says_bad(row: dict[str, Any], numbers: bool = True) -> str:
    """What in a row says that its answer is a bad one, or "".

    Args:
        numbers: whether a label of 0 or less says it too; beside plain text it is the number of a class.
    """
    for name in (*LABELS, "chosen"):
        value = row.get(name)
        if value is False or (isinstance(value, str) and value.strip().lower() == "false"):
            return f"{name} is {value!r}"
        if numbers and name in LABELS and isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            return f"{name} is {value!r}"
    return "preference is 'rejected'" if row.get("preference") == "rejected" else ""


def refuse_bad(row: dict[str, Any], numbers: bool, answered_at_end: bool) -> None:
    """Raise BadRow for a row whose only answer is a bad one."""
    if found := says_bad(row, numbers):
        column = found.split(" ", 1)[0]
        raise BadRow(
            "a rejected answer", f"""{found}; {_ONLY_GOOD}. Where it means something else: --columns '{{"{column}": "-"}}'"""
        )
    if not answered_at_end and (name := _first(row, REJECTED)):
        raise BadRow("a rejected answer", f"{name} without a chosen one; {_ONLY_GOOD}")


def is_pair(row: dict[str, Any]) -> bool:
    """Whether a row brings a rejected answer (beside a chosen one, where the row is used at all)."""
    return _first(row, REJECTED) is not None


def both(row: dict[str, Any], chats: tuple[str, ...], answers: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The two answers of a pair as two rows that nothing else tells apart, and the name of the rejected one's column.

    Args:
        row: without columns that are None.
        chats: names of columns that hold messages; answers: of columns that hold an answer as text.

    Raises BadRow where there is no rejected answer, or it is neither text nor messages.
    """
    given = row.get("input")
    if isinstance(given, dict):
        row = {key: value for key, value in row.items() if key != "input"} | given
    good, bad = _first(row, CHOSEN), _first(row, REJECTED)
    if bad is None:
        raise BadRow("no rejected answer", f"columns: {', '.join(map(str, row)) or 'none'}")
    for name in (good, bad):
        if name is not None and (not isinstance(row[name], (str, list, dict)) or not row[name]):
            raise BadRow("no answer in a pair", f"{name} is {row[name]!r}"[:200])
    rest = {key: value for key, value in row.items() if key not in (*CHOSEN, *REJECTED, *LABELS, MARGIN)}
    asked = {key: value for key, value in rest.items() if key not in answers}
    if good is None:  # the row's own answer is the chosen one
        return rest, _without_answer(asked, chats) | {"chosen": row[bad]}, bad
    if isinstance(row[good], str) and isinstance(row[bad], str) and not _asked(asked, _chat_of(asked, chats)):
        return {"text": row[good]}, {"text": row[bad]}, bad  # whole texts, the question in both
    return asked | {"chosen": row[good]}, asked | {"chosen": row[bad]}, bad


def desirable(row: dict[str, Any]) -> bool:
    """What the label of an answer says of it. Raises BadRow where there is none, or it is neither true nor false."""
    name = next((name for name in LABELS if name in row), None)
    if name is None:
        raise BadRow("no label", f"neither {' nor '.join(LABELS)}; columns: {', '.join(map(str, row)) or 'none'}")
    value = row[name].strip().lower() if isinstance(row[name], str) else row[name]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if value in ("true", "false"):
        return value == "true"
    raise BadRow("a label that is none", f"{name} is {row[name]!r}, expected true or false"[:200])


def without_label(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what says how good its answer is."""
    return {key: value for key, value in row.items() if key not in LABELS}


def _without_answer(row: dict[str, Any], chats: tuple[str, ...]) -> dict[str, Any]:
    """A row without the last answer of its messages, and what follows it."""
    chat = _chat_of(row, chats)
    if chat is None:
        return row
    turns = list(row[chat])
    while turns and not _is_answer(turns[-1]):
        turns.pop()
    while turns and _is_answer(turns[-1]):
        turns.pop()
    return row | {chat: turns}


def _is_answer(turn: Any) -> bool:
    return role_of(turn) in ("assistant", "call")


def _chat_of(row: dict[str, Any], chats: tuple[str, ...]) -> str | None:
    return next((column for column in chats if isinstance(row.get(column), list)), None)


def with_chosen(row: dict[str, Any], chats: tuple[str, ...]) -> dict[str, Any]:
    """A row whose chosen answer stands where other rows have theirs.

    Args:
        chats: names of columns that hold messages.
    """
    given = row.get("input")
    if isinstance(given, dict):  # OpenAI's form: {"input": {"messages": ..., "tools": ...}, "preferred_output": ...}
        row = {key: value for key, value in row.items() if key != "input"} | given
    name = _first(row, CHOSEN)
    if name is None or not isinstance(row[name], (str, list, dict)):
        return row
    chosen, rest = row[name], {key: value for key, value in row.items() if key != name}
    chat = _chat_of(rest, chats)
    if isinstance(chosen, str):
        if chat is None:
            return rest | {"output" if "instruction" in rest else "response": chosen}
        return rest | {chat: [*rest[chat], {"role": "assistant", "content": chosen}]}
    messages = chosen if isinstance(chosen, list) else [chosen]
    first = messages[0] if messages else None
    if role_of(first) == "assistant":  # the answer alone: what is asked stands in another column
        messages = _asked(rest, chat) + messages
    return {key: value for key, value in rest.items() if key not in (*chats, "prompt")} | {"messages": messages}


def _asked(row: dict[str, Any], chat: str | None) -> list[Any]:
    if chat is not None:
        return list(row[chat])
    for name in ("prompt", "query", "question", "instruction"):
        if isinstance(row.get(name), list):
            return list(row[name])
        if isinstance(row.get(name), str):
            extra = row.get("input") if name == "instruction" else None
            return [{"role": "user", "content": f"{row[name]}\n{extra}" if extra else row[name]}]
    return []


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row and not isinstance(row[name], bool)), None)
