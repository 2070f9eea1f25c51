"""What a chat template does with control tokens and thoughts, found out by rendering small conversations."""

from __future__ import annotations

import contextlib
import re
from typing import Any, Protocol

from megaswift.data.conversation import BadRow, Message
from megaswift.data.structure import Renders, as_dicts

_PARAMETERS = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
A_TOOL = [{"type": "function", "function": {"name": "f", "description": "f", "parameters": _PARAMETERS}}]
A_CALL = Message("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": 1}}])


class Probed(Renders, Protocol):
    """A template of which it is known how it takes tools."""

    state: dict[str, Any]
    writes_tools: bool
    any_tools: list[dict[str, Any]]  # what to give where a conversation has no tools


def own_tokens(template: Probed) -> set[str]:
    """The control tokens that a template writes, those that it is given, and those that end an answer."""
    user, answer, tool = (Message(role, "x") for role in ("user", "assistant", "tool"))
    turns = [[user, answer], [Message("system", "x"), user, answer]]
    turns += [[user, A_CALL, tool, answer]] if template.writes_tools else []
    texts = [template.state["source"]]
    for messages in turns:  # a template may join a token from its parts
        with contextlib.suppress(BadRow):
            tools = A_TOOL if A_CALL in messages else template.any_tools
            texts.append(template.render(as_dicts(messages, template.text_arguments), tools, False))
            texts.append(template.render(as_dicts(messages[:-1], template.text_arguments), tools, True))
    given = {template.eos, template.state["special"].get("bos_token", ""), *template.ends}
    return template.encoder.written("\n".join(texts)) | given.intersection(template.encoder.control)


def where_thoughts_stand(template: Probed) -> str | None:
    """What stands before an answer's thoughts in its content, where the template takes them from there; else None.

    None too for a template that drops the thoughts of the last turn: they are written for it.
    """
    reasoning, answer = "\ue0e0", "\ue0e1"
    turns = [Message("user", "x"), Message("assistant", answer, reasoning)]
    for opening in (None, "<think>\n", ""):
        with contextlib.suppress(BadRow):
            text = template.render(as_dicts(turns, thoughts=opening), template.any_tools, False)
            before, mark, _ = text.partition(reasoning)
            if mark and answer in text and not re.search(r"<think>\s*<think>\s*\Z", before):
                return opening
    return None
