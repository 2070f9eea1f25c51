"""What a chat template writes around the texts of a conversation, and which of it an assistant turn must learn.

The template is rendered once with a unique mark in place of each text. What stands between the marks is the template's
own writing; from the end of the assistant's header to the end token it is supervised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from megaswift.data.conversation import BadRow, Conversation, Message

OPEN, CLOSE = "\ue0f0", "\ue0f1"  # private-use characters: no template writes them
MARK = re.compile(OPEN + r"([crt])(\d+)" + CLOSE)
NO_SYSTEM = OPEN + "none" + CLOSE  # content of a system message whose whole block is to be left out
EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")
THINK_OPENER = re.compile(r"<think>\s*\Z")

Slot = tuple[str, int]  # ("c" content | "r" reasoning, message number)


class Renders(Protocol):
    """What a structure is built from: a template and what is known about it."""

    header: str  # what add_generation_prompt appends; "" when the template ignores it
    ends: tuple[str, ...]  # tokens that end an assistant turn; empty when the template writes none
    eos: str  # the tokenizer's own end token

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], prompt: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """A literal text of the template (`slot` None), or the place of a text; `kept`: it carries loss."""

    text: str
    kept: bool
    slot: Slot | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """One shape of conversation.

    Attributes:
        segments: what is tokenized.
        rendered: the template's own output, which a real rendering must match.
        unsupervised: assistant turns whose thoughts the template leaves out, so that they cannot be learnt as written.
    """

    segments: list[Segment]
    rendered: list[Segment]
    unsupervised: tuple[int, ...] = ()


def as_dict(message: Message) -> dict[str, Any]:
    """A message as templates expect it."""
    item: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        item["reasoning_content"] = message.reasoning
    if message.tool_calls:
        item["tool_calls"] = [{"type": "function", "function": call} for call in message.tool_calls]
    return item


def marked(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages with a mark in place of each text, and around the name of each tool call."""
    result = []
    for number, message in enumerate(messages):
        item = as_dict(message)
        if message.content and message.content != NO_SYSTEM:
            item["content"] = f"{OPEN}c{number}{CLOSE}"
        if message.reasoning:
            item["reasoning_content"] = f"{OPEN}r{number}{CLOSE}"
        if message.tool_calls:
            mark = f"{OPEN}t{number}{CLOSE}"
            calls = [{**call, "name": f"{mark}{call['name']}{mark}"} for call in message.tool_calls]
            item["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        result.append(item)
    return result


def build(template: Renders, conversation: Conversation, prompt: bool = False) -> Structure:
    """The structure of a conversation. Raises BadRow when the template drops, repeats or moves a message."""
    messages = conversation.messages
    text = template.render(marked(messages), conversation.tools, prompt)
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
            ranges.append((start, stop or marks[-1].end()))
    return Structure(_cut(text, ranges), rendered, tuple(unsupervised))


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
        for candidate in (
            value,
            value.strip(),
            value.strip("\n"),
            value.lstrip(),
            value.rstrip(),
            value.lstrip("\n"),
            value.rstrip("\n"),
        ):
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


def _cut(text: str, ranges: list[tuple[int, int]]) -> list[Segment]:
    """Cut a marked text into literals and slots; `ranges` are the kept stretches. Marks of tool calls just go away."""
    borders = sorted({0, len(text), *(position for pair in ranges for position in pair)})
    segments: list[Segment] = []
    for first, last in pairwise(borders):
        kept = any(start <= first and last <= stop for start, stop in ranges)
        position = first
        for match in MARK.finditer(text, first, last):
            segments.append(Segment(text[position : match.start()], kept))
            if match.group(1) != "t":
                segments.append(Segment("", kept, (match.group(1), int(match.group(2)))))
            position = match.end()
        segments.append(Segment(text[position:last], kept))
    return _joined(segments)


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbouring literals of one kind as one; empty ones dropped."""
    result: list[Segment] = []
    for segment in segments:
        if segment.slot is None and not segment.text:
            continue
        before = result[-1] if result else None
        if before and before.slot is None and segment.slot is None and before.kept == segment.kept:
            result[-1] = Segment(before.text + segment.text, segment.kept)
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
    for pattern in (THINK_OPENER, re.compile(EMPTY_THINK.pattern + r"\Z")):
        before = pattern.sub("", before)
    return f"{before}<think>\n{OPEN}r{number}{CLOSE}\n</think>\n\n{mark}{after}"


def _header_end(template: Renders, conversation: Conversation, number: int, text: str, first: int) -> int:
    """Where the header of an assistant turn ends, as the prompt of a generation would; `first`: its first mark."""
    floor = max((match.end() for match in MARK.finditer(text, 0, first)), default=0)
    for header in (template.header, THINK_OPENER.sub("", template.header)):
        found = text.rfind(header, floor, first) if header else -1
        if found >= 0:
            start = found + len(header)
            break
    else:
        prefix = template.render(marked(conversation.messages[:number]), conversation.tools, True)
        if not text.startswith(prefix) or not floor <= len(prefix) <= first:
            raise BadRow(
                "the chat template writes an answer unlike its prompt",
                f"message {number + 1}; choose another with --template_type",
            )
        start = len(prefix)
    if conversation.messages[number].reasoning is None:  # an empty block that the row does not bring belongs to the prompt
        written = EMPTY_THINK.match(text, start, first)
        start = written.end() if written else start
    return start


def _turn_end(template: Renders, text: str, last: int) -> int | None:
    """Where the end token after the last mark of a turn ends; None when the template writes none there."""
    following = MARK.search(text, last)
    stop = following.start() if following else len(text)
    found = [(position, token) for token in template.ends if (position := text.find(token, last, stop)) >= 0]
    if not found:
        return None
    position, token = min(found)
    return position + len(token)
