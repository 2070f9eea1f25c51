"""A list of role/content objects, under any of the usual names, as messages: ShareGPT, OpenAI, Anthropic."""

from __future__ import annotations

import json
from typing import Any

from megaswift.data.conversation import NOT_TEXT, BadRow, Message

ALIASES = {
    "system": "system developer",
    "user": "user human",
    "assistant": "assistant gpt bot model chatgpt bing",
    "tool": "tool observation tool_response tool_result function ipython",
    "call": "tool_call function_call",
}
WEIGHT_NAMES = ("loss", "loss_scale", "weight", "train", "loss_weight")
MAX_WEIGHT = 1_000_000
ROLES = {alias: role for role, aliases in ALIASES.items() for alias in aliases.split()}


def role_of(item: Any) -> str | None:
    """What a message says that it is, under the names of ALIASES; None where it is none of them, or no message."""
    name = item.get("role", item.get("from")) if isinstance(item, dict) else None
    return ROLES.get(name.lower()) if isinstance(name, str) else None


def read_messages(items: list[Any]) -> list[Message]:
    """Normalise the roles, contents, tool calls and `loss` of a conversation. Raises BadRow."""
    messages: list[Message] = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise BadRow("wrong type", f"message {number} is no object")
        role_name, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        role = role_of(item)
        if role is None:
            raise BadRow("unknown role", f"message {number}: {role_name!r}")
        where = f"message {number}, {role_name}"
        if isinstance(content, list):
            messages.extend(_blocks(item, content, role, where))
        elif role == "call":
            _append_call(messages, content, _loss(item, "assistant", where), where)
        else:
            messages.append(_message(item, role, content, where))
    return messages


def tools_of(value: Any) -> list[dict[str, Any]]:
    """The `tools` column: a list or its JSON text, bare functions or OpenAI's wrapping. Raises BadRow."""
    if isinstance(value, str):
        if not value.strip():
            return []
        value = _json(value, "tools")
    if not value:
        return []
    tools = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            item = _json(item, "tools")
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("wrong type", "an entry of tools has no name")
        if "input_schema" in function:  # Anthropic's name for it
            function = {("parameters" if key == "input_schema" else key): part for key, part in function.items()}
        tools.append({"type": "function", "function": function})
    return tools


def _message(item: dict[str, Any], role: str, content: Any, where: str) -> Message:
    calls, reasoning = _beside(item, role, where)
    if content is None and calls:
        content = ""
    if isinstance(content, dict) and role == "tool":
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise BadRow("wrong type", f"{where}: content is {type(content).__name__}, expected text")
    return Message(role, content, reasoning, calls, _loss(item, role, where))


def _beside(item: dict[str, Any], role: str, where: str) -> tuple[list[dict[str, Any]], str | None]:
    """The tool calls and thoughts that stand beside the content of an assistant's message."""
    if role != "assistant":
        return [], None
    calls = [_call(call, where) for call in _json_list(item.get("tool_calls"), where)]
    reasoning = item.get("reasoning_content") or item.get("reasoning") or None
    if reasoning is not None and not isinstance(reasoning, str):
        raise BadRow("wrong type", f"{where}: reasoning_content is {type(reasoning).__name__}, expected text")
    return calls, reasoning


def _append_call(messages: list[Message], content: Any, loss: float, where: str) -> None:
    """A message that is a tool call belongs to the assistant turn before it, or is one of its own."""
    parsed = _json(content, where) if isinstance(content, str) else content
    calls = [_call(call, where) for call in (parsed if isinstance(parsed, list) else [parsed])]
    if messages and messages[-1].role == "assistant" and messages[-1].loss == loss:
        messages[-1].tool_calls.extend(calls)
    else:
        messages.append(Message("assistant", "", None, calls, loss))


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("wrong type", f"{where}: a tool call has no name")
    arguments = function.get("arguments", function.get("parameters", function.get("input", {})))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise BadRow("wrong type", f"{where}: arguments of {function['name']} are no JSON") from None
    return {"name": function["name"], "arguments": {} if arguments is None else arguments}


def _blocks(item: dict[str, Any], blocks: list[Any], role: str, where: str) -> list[Message]:
    """Content blocks with what the message has beside them: text, Anthropic's and LLaMA-Factory's thoughts, calls and results."""
    loss = _loss(item, role, where)
    role = "assistant" if role == "call" else role
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[Message] = []
    for block in blocks:
        block = block if isinstance(block, dict) else {}
        kind, value = block.get("type"), block.get("value")  # LLaMA-Factory's v1 form: {"type", "value"}
        text = value if block.get("text") is None else block["text"]
        if kind == "text" and isinstance(text, str):
            texts.append(text)
        elif kind == "reasoning" and isinstance(value, str):
            thoughts[-1:] = [f"{thoughts[-1]}{value}" if thoughts else value]
        elif kind == "tool_call" and isinstance(value, (str, dict)):
            calls.append(_call(_json(value, where) if isinstance(value, str) else value, where))
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind == "tool_use":
            calls.append(_call(block, where))
        elif kind == "tool_result":
            results.append(Message("tool", _result_text(block.get("content"), where)))
        elif kind in ("image", "image_url", "video", "video_url", "audio", "audio_url", "input_audio"):
            raise BadRow(NOT_TEXT, "only text can be trained")
        else:
            raise BadRow("wrong type", f"{where}: content block of type {kind!r}")
    own_calls, reasoning = _beside(item, role, where)
    # Some programs write the same calls and thoughts both ways: as blocks, and beside them.
    calls += [call for call in own_calls if call not in calls]
    if reasoning and not all(thought in reasoning for thought in thoughts):
        reasoning = "\n".join([reasoning, *thoughts])
    reasoning = reasoning or "\n".join(thoughts) or None
    if results and calls:
        raise BadRow("wrong type", f"{where}: a tool call and a tool result in one message")  # which comes first is not said
    if results and not texts and not reasoning:
        return results
    return results + [Message(role, "".join(texts), reasoning, calls, loss)]


def _result_text(content: Any, where: str) -> str:
    if isinstance(content, list):
        content = [block.get("text") or "" for block in content if isinstance(block, dict)]
        if all(isinstance(text, str) for text in content):
            return "".join(content)
    if content is None or isinstance(content, str):
        return content or ""
    raise BadRow("wrong type", f"{where}: a tool result is {type(content).__name__}, expected text")


def _loss(item: dict[str, Any], role: str, where: str) -> float:
    """The weight of a message's tokens in the loss, 0 for none, under one of the names that are usual.

    `loss` and `loss_scale` are ms-swift's, `weight` is OpenAI's, `train` Axolotl's, `loss_weight` LLaMA-Factory's.
    """
    for name in WEIGHT_NAMES:
        value = item.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= MAX_WEIGHT:  # NaN is not within
            raise BadRow("wrong type", f"{where}: {name} is {value!r}, expected a number from 0 to {MAX_WEIGHT:,}")
        if role in ("assistant", "call"):
            return float(value)
        if value:
            raise BadRow("loss on a turn that is not the assistant's", where)
    return 1.0


def _json_list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        value = _json(value, where)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{where}: tool_calls is {type(value).__name__}, expected a list")
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("not JSON", f"{where}: {error}") from None
