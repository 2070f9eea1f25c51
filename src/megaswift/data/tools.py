"""Tools written into plain messages, for chat templates that know none: the Hermes form that most models have seen."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from megaswift.data.conversation import Message
from megaswift.data.structure import NO_SYSTEM

INTRODUCTION = """\
# Tools

You may call these functions:
<tools>
{tools}
</tools>

To call one, answer with its name and arguments as JSON inside tags:
<tool_call>
{{"name": "function_name", "arguments": {{}}}}
</tool_call>"""


def tools_as_text(messages: list[Message], tools: list[dict[str, Any]], default_system: str | None) -> list[Message]:
    """The same conversation without tools: they stand in the system prompt, calls and results in tags."""
    result: list[Message] = []
    for message in messages:
        if message.role == "tool":
            text = f"<tool_response>\n{message.content}\n</tool_response>"
            if result and result[-1].role == "user" and result[-1].content.endswith("</tool_response>"):
                result[-1] = replace(result[-1], content=f"{result[-1].content}\n{text}")
            else:
                result.append(Message("user", text))
        elif message.tool_calls:
            calls = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in message.tool_calls]
            result.append(
                replace(message, content="\n".join(([message.content] if message.content else []) + calls), tool_calls=[])
            )
        else:
            result.append(message)
    if not tools:
        return result
    introduction = INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if result and result[0].role == "system" and result[0].content != NO_SYSTEM:
        return [replace(result[0], content=f"{result[0].content}\n\n{introduction}"), *result[1:]]
    rest = result[1:] if result and result[0].role == "system" else result
    return [Message("system", f"{default_system}\n\n{introduction}" if default_system else introduction), *rest]
