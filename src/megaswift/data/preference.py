"""Rows of preference data: the good answer of a pair is trained, a bad answer never is."""

from __future__ import annotations

from typing import Any

from megaswift.data.conversation import BadRow

CHOSEN = ("chosen", "chosen_messages", "preferred_output", "chosen_response")
REJECTED = ("rejected", "rejected_messages", "non_preferred_output", "rejected_response")
LABELS = ("label", "kto_tag")  # true or false, and numbers above 0 or not
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
    chat = next((column for column in chats if isinstance(rest.get(column), list)), None)
    if isinstance(chosen, str):
        if chat is None:
            return rest | {"output" if "instruction" in rest else "response": chosen}
        return rest | {chat: [*rest[chat], {"role": "assistant", "content": chosen}]}
    messages = chosen if isinstance(chosen, list) else [chosen]
    first = messages[0] if messages else None
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    if role in ("assistant", "gpt"):  # the answer alone: what is asked stands in another column
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
