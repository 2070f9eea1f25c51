"""What a chat template writes around the texts of a conversation, and which of it an assistant turn must learn.

The template is rendered once with a unique mark in place of each text. What stands between the marks is the template's
own writing; from the end of the assistant's header to the end token it is supervised.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

from megaswift.data.conversation import BadRow, Conversation, Message
from megaswift.data.tokens import PieceEncoder

OPEN, CLOSE = "\ue0f0", "\ue0f1"  # private-use characters: no template writes them
MARK = re.compile(OPEN + r"([crt])(\d+)" + CLOSE)
NO_SYSTEM = OPEN + "none" + CLOSE  # content of a system message whose whole block is to be left out
EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")
THINK_OPENER = re.compile(r"<think>\s*\Z")

Slot = tuple[str, int]  # ("c" content | "r" reasoning, message number)


class Renders(Protocol):
    """What a structure is built from: a template and what is known about it."""

    header: str  # what add_generation_prompt appends; "" when the template ignores it
    after_user: str  # what follows the user's text in a prompt
    ends: tuple[str, ...]  # tokens that end an assistant turn; empty when the template writes none
    eos: str  # the tokenizer's own end token
    text_arguments: bool  # whether arguments of tool calls must be JSON text
    thoughts: str | None  # what stands before thoughts in the content; None where they have a field of their own
    encoder: PieceEncoder

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], prompt: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """A literal text of the template (`slot` None), or the place of a text; `weight`: that of its tokens in the loss."""

    text: str
    weight: float
    slot: Slot | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """One shape of conversation.

    Attributes:
        segments: what is tokenized.
        rendered: the template's own output, which a real rendering must match.
        deferred: how `render` writes the system prompt.
        unsupervised: assistant turns whose thoughts the template leaves out, so that they cannot be learnt as written.
    """

    segments: list[Segment]
    rendered: list[Segment]
    deferred: bool = False
    unsupervised: tuple[int, ...] = ()


def as_dicts(messages: list[Message], text_arguments: bool = False, thoughts: str | None = None) -> list[dict[str, Any]]:
    """Messages as templates expect them.

    Calls and their results get ids of nine letters and digits, which Mistral's templates demand; they depend on the
    calls alone, so that the same row always gives the same tokens. `text_arguments`: arguments as JSON text. `thoughts`:
    what stands before them in the content; None writes them as reasoning_content.
    """
    result: list[dict[str, Any]] = []
    open_ids: list[str] = []
    for message in messages:
        item: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not None and thoughts is not None:
            item["content"] = f"{thoughts}{message.reasoning}\n</think>\n\n{message.content}"
        elif message.reasoning:
            item["reasoning_content"] = message.reasoning
        if message.tool_calls:
            calls: list[dict[str, Any]] = []
            for call in message.tool_calls:
                open_ids.append(_call_id(call, len(result), len(calls)))
                arguments = json.dumps(call["arguments"], ensure_ascii=False) if text_arguments else call["arguments"]
                calls.append(
                    {"id": open_ids[-1], "type": "function", "function": {"name": call["name"], "arguments": arguments}}
                )
            item["tool_calls"] = calls
        elif message.role == "tool" and open_ids:
            item["tool_call_id"] = open_ids.pop(0)
        result.append(item)
    return result


def _call_id(call: dict[str, Any], message: int, place: int) -> str:
    text = json.dumps([call, message, place], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def marked(template: Renders, messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as this template takes them, with a mark in place of each text, and around the name of each tool call."""
    texts = [
        replace(
            message,
            content=f"{OPEN}c{number}{CLOSE}" if message.content and message.content != NO_SYSTEM else message.content,
            reasoning=f"{OPEN}r{number}{CLOSE}" if message.reasoning else message.reasoning,
        )
        for number, message in enumerate(messages)
    ]
    items = as_dicts(texts, template.text_arguments, template.thoughts)
    for number, item in enumerate(items):
        for call in item.get("tool_calls", ()):
            mark = f"{OPEN}t{number}{CLOSE}"
            call["function"]["name"] = f"{mark}{call['function']['name']}{mark}"
    return items


def render(
    template: Renders, messages: list[dict[str, Any]], tools: list[dict[str, Any]], prompt: bool, deferred: bool = False
) -> str:
    """The template's text. `deferred`: with the system prompt where a prompt at the last user turn would have it.

    Mistral's templates write the system prompt into the last user turn, and only when nothing follows it, so that a whole
    conversation loses it. What the model sees when it answers is the prompt, so that is what training must show.
    """
    if not deferred:
        return template.render(messages, tools, prompt)
    last_user = max((number for number, item in enumerate(messages) if item["role"] == "user"), default=0)
    whole, before = template.render(messages[1:], tools, prompt), template.render(messages[1 : last_user + 1], tools, True)
    if not whole.startswith(before):
        raise BadRow("the chat template leaves out a system message", "message 1; choose another with --template_type")
    return template.render(messages[: last_user + 1], tools, True) + whole[len(before) :]


def build(template: Renders, conversation: Conversation, prompt: bool = False) -> Structure:
    """The structure of a conversation. Raises BadRow when the template drops, repeats or moves a message."""
    messages = conversation.messages
    items = marked(template, messages)
    text = template.render(items, conversation.tools, prompt)
    has_system = messages[0].role == "system" and messages[0].content not in ("", NO_SYSTEM)
    deferred = has_system and len(messages) > 1 and items[0]["content"] not in text
    if deferred:
        text = render(template, items, conversation.tools, prompt, deferred)
    rendered = _cut(text, [])
    _require_all(messages, text)
    last = messages[-1]
    if last.role == "assistant" and last.reasoning and f"{OPEN}r{len(messages) - 1}{CLOSE}" not in text:
        text = _write_reasoning(text, len(messages) - 1)
    ranges, unsupervised = [], []
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        marks = [match for match in MARK.finditer(text) if int(match.group(2)) == number]
        if not marks and not message.reasoning:  # an empty answer in the history of a prompt
            continue
        if message.reasoning and not any(match.group(1) == "r" for match in marks):
            unsupervised.append(number)
            continue
        start = _header_end(template, conversation, number, text, marks[0].start())
        stop = _turn_end(template, text, marks[-1].end())
        if number == len(messages) - 1 and not prompt:
            # What the template writes after the last end token is never seen by a loss.
            text = text[:stop] if stop else text[: marks[-1].end()] + template.eos
            stop = len(text)
        if message.loss:
            ranges.append((start, stop or marks[-1].end(), message.loss))
    return Structure(_cut(text, ranges), rendered, deferred, tuple(unsupervised))


def align(structure: Structure, messages: list[Message], text: str) -> dict[Slot, str]:
    """The texts in a real rendering, as the template wrote them (some trim white space).

    Raises BadRow when `text` is not what the structure says: the template then depends on the content in some other way.
    """
    found: dict[Slot, str] = {}
    position = 0
    parts = structure.rendered
    for index, part in enumerate(parts):
        if part.slot is None:
            if not text.startswith(part.text, position):
                break
            position += len(part.text)
            continue
        kind, number = part.slot
        value = messages[number].content if kind == "c" else messages[number].reasoning or ""
        following = parts[index + 1].text if index + 1 < len(parts) and parts[index + 1].slot is None else ""
        for candidate in _ways_to_write(value):
            if text.startswith(candidate, position) and text.startswith(following, position + len(candidate)):
                found[part.slot] = candidate
                position += len(candidate)
                break
        else:
            break
    else:
        if position == len(text):
            return found
    raise BadRow("the chat template rewrites a message", f"near character {position} of the rendered text")


def _ways_to_write(value: str) -> Iterator[str]:
    """A text as templates write it: as it is, with white space cut off, or as the inside of a JSON text."""
    yield value
    yield value.strip()
    yield value.strip("\n")
    yield value.lstrip()
    yield value.rstrip()
    yield value.lstrip("\n")
    yield value.rstrip("\n")
    yield json.dumps(value, ensure_ascii=False)[1:-1]


def _cut(text: str, ranges: list[tuple[int, int, float]]) -> list[Segment]:
    """Cut a marked text into literals and slots; `ranges`: (first, last, weight in the loss). Marks of tool calls just go away."""
    borders = sorted({0, len(text), *(position for part in ranges for position in part[:2])})
    segments: list[Segment] = []
    for first, last in pairwise(borders):
        weight = next((weight for start, stop, weight in ranges if start <= first and last <= stop), 0.0)
        position = first
        for match in MARK.finditer(text, first, last):
            segments.append(Segment(text[position : match.start()], weight))
            if match.group(1) != "t":
                segments.append(Segment("", weight, (match.group(1), int(match.group(2)))))
            position = match.end()
        segments.append(Segment(text[position:last], weight))
    return _joined(segments)


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbouring literals of one kind as one; empty ones dropped."""
    result: list[Segment] = []
    for segment in segments:
        if segment.slot is None and not segment.text:
            continue
        before = result[-1] if result else None
        if before and before.slot is None and segment.slot is None and before.weight == segment.weight:
            result[-1] = Segment(before.text + segment.text, segment.weight)
        else:
            result.append(segment)
    return result


def _require_all(messages: list[Message], text: str) -> None:
    marks = [(match.group(1), int(match.group(2))) for match in MARK.finditer(text)]
    for number, message in enumerate(messages):
        expected = ("c", number) if message.content and message.content != NO_SYSTEM else None
        if expected and marks.count(expected) != 1:
            what = "repeats" if expected in marks else "leaves out"
            raise BadRow(
                f"the chat template {what} a {message.role} message",
                f"message {number + 1}; choose another with --template_type",
            )
        if message.tool_calls and marks.count(("t", number)) != 2 * len(message.tool_calls):
            raise BadRow(
                "the chat template leaves out tool calls", f"message {number + 1}; choose another with --template_type"
            )
    order = [number for kind, number in marks if kind == "c" and messages[number].role in ("user", "assistant")]
    if order != sorted(order):
        raise BadRow("the chat template changes the order of messages", "choose another with --template_type")


def _write_reasoning(text: str, number: int) -> str:
    """Write the thoughts of the last turn ourselves, for templates that know thinking only from the prompt's side."""
    before, mark, after = text.partition(f"{OPEN}c{number}{CLOSE}")
    if not mark:
        raise BadRow("the chat template leaves out thoughts", f"message {number + 1}; choose another with --template_type")
    for pattern in (THINK_OPENER, re.compile(EMPTY_THINK.pattern + r"\Z")):
        before = pattern.sub("", before)
    return f"{before}<think>\n{OPEN}r{number}{CLOSE}\n</think>\n\n{mark}{after}"


def _header_end(template: Renders, conversation: Conversation, number: int, text: str, first: int) -> int:
    """Where the header of an assistant turn ends, as the prompt of a generation would; `first`: its first mark."""
    floor = max((match.end() for match in MARK.finditer(text, 0, first)), default=0)
    start = _after_prompt(template, conversation, number, text, floor, first)
    if start is None:
        raise BadRow(
            "the chat template writes an answer unlike its prompt", f"message {number + 1}; choose another with --template_type"
        )
    if conversation.messages[number].reasoning is None:  # an empty block that the row does not bring belongs to the prompt
        written = EMPTY_THINK.match(text, start, first)
        start = written.end() if written else start
    return start


def _after_prompt(template: Renders, conversation: Conversation, number: int, text: str, floor: int, first: int) -> int | None:
    """Where the prompt of a turn ends, between the mark before it (`floor`) and its own first mark (`first`)."""
    for header in (template.header, THINK_OPENER.sub("", template.header)):
        found = text.rfind(header, floor, first) if header else -1
        if found >= 0:
            return found + len(header)
    items = marked(template, conversation.messages[:number])
    for skipped in (0, 1):  # a template may write the system prompt into the last user turn only
        if number > skipped and (skipped == 0 or items[0]["role"] == "system"):
            prefix = template.render(items[skipped:], conversation.tools, True)
            if text.startswith(prefix) and floor <= len(prefix) <= first:
                return len(prefix)
    found = text.rfind(template.after_user, floor, first) if template.after_user else -1
    if found >= 0:
        return found + len(template.after_user)
    if text.startswith(f"{OPEN}c", first):  # an answer after the results of tools
        return template.encoder.last_control(text, floor, first)
    return None


def _turn_end(template: Renders, text: str, last: int) -> int | None:
    """Where the end token after the last mark of a turn ends; None when the template writes none there."""
    following = MARK.search(text, last)
    stop = following.start() if following else len(text)
    found = [(position, token) for token in template.ends if (position := text.find(token, last, stop)) >= 0]
    if not found:
        return None
    position, token = min(found)
    return position + len(token)
