"""Answers as objects of OpenAI's API: chat completions and completions of text, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from megaswift.inference.options import Answer
from megaswift.inference.text import StopWords
from megaswift.inference.tool_calls import OPEN, Call, split_calls

_FINISH = {"stop": "stop", "length": "length", "interrupted": "stop"}


class Pieces:
    """The choices of the events of one answer; the text that they carry joins to that of the whole."""

    def __init__(self, index: int) -> None:
        self._index = index

    def first(self) -> Iterator[dict[str, Any]]:
        """What comes before the answer's text."""
        return iter(())

    def text(self, piece: str) -> Iterator[dict[str, Any]]:
        """What a piece of text becomes."""
        yield {"index": self._index, "text": piece, "logprobs": None, "finish_reason": None}

    def last(self, answer: Answer) -> Iterator[dict[str, Any]]:
        """What comes when the answer is whole."""
        yield {"index": self._index, "text": "", "logprobs": None, "finish_reason": _FINISH[answer.finish]}


class ChatPieces(Pieces):
    """Those of a chat completion. Where the model may call tools, text is held back from the first mark of a call on.

    Args:
        index: of the choice.
        tools: whether calls are looked for.
    """

    def __init__(self, index: int, tools: bool) -> None:
        super().__init__(index)
        self._tools, self._shown = tools, ""
        self._calls = StopWords((OPEN,) if tools else ())

    def _choice(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def first(self) -> Iterator[dict[str, Any]]:
        """The role."""
        yield self._choice({"role": "assistant", "content": ""})

    def text(self, piece: str) -> Iterator[dict[str, Any]]:
        """A piece of the content, as far as it can be no call."""
        shown = self._calls.feed(piece)
        self._shown += shown
        if shown:
            yield self._choice({"content": shown})

    def last(self, answer: Answer) -> Iterator[dict[str, Any]]:
        """What was held back, the calls, and the reason of the end."""
        text, calls = split_calls(answer.text) if self._tools else (self._shown, [])
        rest = text.removeprefix(self._shown.strip() if calls else self._shown)
        if rest:
            yield self._choice({"content": rest})
        for place, call in enumerate(calls):
            yield self._choice({"tool_calls": [{"index": place, **_call(call)}]})
        yield self._choice({}, "tool_calls" if calls else _FINISH[answer.finish])


class Form:
    """One of the two kinds of object.

    Attributes:
        prefix: of their ids.
    """

    prefix = "cmpl"
    _kinds = ("text_completion", "text_completion")

    def object(self, model: str, number: str, chunk: bool = False) -> dict[str, Any]:
        """What every object, or every event of a stream, has."""
        return {"id": number, "object": self._kinds[chunk], "created": int(time.time()), "model": model}

    def choice(self, answer: Answer, index: int, tools: bool) -> dict[str, Any]:
        """A whole answer."""
        return {"index": index, "text": answer.text, "logprobs": None, "finish_reason": _FINISH[answer.finish]}

    def pieces(self, index: int, tools: bool) -> Pieces:
        """The events of an answer."""
        return Pieces(index)


class _ChatForm(Form):
    prefix = "chatcmpl"
    _kinds = ("chat.completion", "chat.completion.chunk")

    def choice(self, answer: Answer, index: int, tools: bool) -> dict[str, Any]:
        text, calls = split_calls(answer.text) if tools else (answer.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        finish = "tool_calls" if calls else _FINISH[answer.finish]
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}

    def pieces(self, index: int, tools: bool) -> Pieces:
        return ChatPieces(index, tools)


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


CHAT_FORM, TEXT_FORM = _ChatForm(), Form()
