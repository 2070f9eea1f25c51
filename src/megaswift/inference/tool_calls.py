"""Tool calls in an answer's text: which form a chat template writes them in, and the calls of the one that is read here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from megaswift.data.conversation import Conversation, Message
from megaswift.inference.options import PromptError
from megaswift.inference.prompts import Prompts
from megaswift.inference.text import decode
from megaswift.inference.thoughts import apart

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_BLOCK = re.compile(rf"{OPEN}\s*(\{{.*?\}})\s*{CLOSE}", re.DOTALL)
_NAME, _ARGUMENTS = "look_up_the_hour", {"town": "Nuuk"}
_PARAMETERS = {"type": "object", "properties": {"town": {"type": "string", "description": "x"}}, "required": ["town"]}
_TOOL = {"type": "function", "function": {"name": _NAME, "description": "x", "parameters": _PARAMETERS}}


@dataclass(frozen=True)
class Call:
    """One call: the function's name, and its arguments as JSON text."""

    name: str
    arguments: str


def split_calls(text: str) -> tuple[str, list[Call]]:
    """The text of an answer without its calls, and the calls; thoughts hold none. What cannot be read stays text.

    The form is that of Hermes, which Qwen's models and templates without tools of their own have:
    <tool_call>{"name": ..., "arguments": {...}}</tool_call>.
    """
    outside, unfinished = apart(text)
    if unfinished or OPEN not in outside:
        return text, []
    calls, kept = [], text
    for match in _BLOCK.finditer(text):
        call = _read(match.group(1))
        if call is not None and match.group() in outside:
            calls.append(call)
            kept = kept.replace(match.group(), "", 1)
    return (kept.strip(), calls) if calls else (text, [])


def _read(text: str) -> Call | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found.get("name"), str) or not isinstance(found.get("arguments", {}), dict):
        return None
    return Call(found["name"], json.dumps(found.get("arguments", {}), ensure_ascii=False))


def form_of(prompts: Prompts, tokenizer: Any) -> str | None:
    """How a chat template writes calls, under vLLM's name of the parser that reads them; None where nobody here knows.

    The template is asked: it writes a call, and what a reader of an answer would see of that is looked at. "hermes" is the form
    of `split_calls`, which has read that very call.
    """
    asked, call = Message("user", "x"), Message("assistant", "", tool_calls=[{"name": _NAME, "arguments": _ARGUMENTS}])
    try:
        ids = prompts.ids(Conversation([asked, call, Message("tool", "x"), asked], [_TOOL]))
    except PromptError:
        return None
    seen = decode(tokenizer, ids)
    if seen.count(_NAME) < 2:
        return None  # the tools themselves are not written
    last = seen.rpartition(OPEN)
    if split_calls(f"{last[1]}{last[2]}")[1] == [Call(_NAME, json.dumps(_ARGUMENTS))]:
        return "hermes"
    written = tokenizer.decode(ids, skip_special_tokens=False)
    forms = (
        ("qwen3_coder", f"<function={_NAME}>"),
        ("mistral", "[TOOL_CALLS]"),
        ("llama3_json", f'{{"name": "{_NAME}", "parameters": '),
    )
    return next((name for name, mark in forms if mark in written), None)
