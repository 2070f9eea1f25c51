"""The fields of a request to the server, and of which type each is: what is wrong gets status 400, never a traceback."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megaswift.inference.gate import Refused

_UNSUPPORTED = (
    "tools",
    "functions",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "audio",
    "presence_penalty",
    "frequency_penalty",
)

_DECODING = {"temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float, "seed": int}


def _is_text(value: Any) -> bool:
    """Whether a value is a text that can be tokenized: JSON may hold half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_seed(value: Any) -> bool:
    return _is_whole(value) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # JSON's whole numbers have no end
        return False


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


_TYPES: tuple[tuple[Callable[[Any], bool], str, tuple[str, ...]], ...] = (
    (_is_text, "a text", ("model",)),
    (_is_a(list), "a list", ("tools", "functions")),
    (_is_a(dict), "an object", ("response_format", "stream_options", "logit_bias", "audio")),
    (_is_a(bool), "true or false", ("stream", "logprobs")),
    (_is_whole, "a whole number", ("n", "top_k", "max_tokens", "max_completion_tokens", "top_logprobs")),
    (_is_seed, "a whole number of 64 bits", ("seed",)),
    (_is_number, "a number", ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty")),
)


def check_types(request: Any) -> None:
    """Raise Refused for a request that is no object, and for a field of a type that it cannot have; null counts as absent."""
    if not isinstance(request, dict):
        raise Refused(400, "the body must be a JSON object")
    for fits, words, names in _TYPES:
        for name in names:
            if request.get(name) is not None and not fits(request[name]):
                raise Refused(400, f"{name} must be {words}", param=name)
    if not isinstance((request.get("stream_options") or {}).get("include_usage", False), bool | None):
        raise Refused(400, "include_usage must be true or false", param="stream_options")


def check_supported(request: dict[str, Any]) -> None:
    """Raise Refused for what is asked and would not be done. The types are checked already."""
    for name in _UNSUPPORTED:
        if request.get(name):
            raise Refused(400, f"{name} is not supported", param=name)
    if request.get("n") not in (None, 1):
        raise Refused(400, "n must be 1", param="n")
    if (request.get("response_format") or {"type": "text"}).get("type") != "text":
        raise Refused(400, "response_format must be text", param="response_format")


def message_of(message: Any) -> dict[str, str]:
    """Role and text of one message of a request. Raises Refused."""
    content: Any = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(map(_is_text, texts)) else None
    if not _is_text(content) or message.get("role") not in ("system", "developer", "user", "assistant"):
        raise Refused(400, "a message needs a role (system, user, assistant) and text as its content", param="messages")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise Refused(400, f"{name} of a message is not supported", param="messages")
    return {"role": "system" if message["role"] == "developer" else message["role"], "content": content}


def _stop_of(request: dict[str, Any]) -> tuple[str, ...] | None:
    """The stop words of a request; None where it has none. Raises Refused."""
    stop = request.get("stop")
    if stop is None:
        return None
    words = stop if isinstance(stop, list) else [stop]
    if len(words) > 16 or not all(word and _is_text(word) for word in words):
        raise Refused(400, "stop must be up to 16 texts", param="stop")
    return tuple(words)


def decoding_of(request: dict[str, Any], most: int) -> dict[str, Any]:
    """What a request says of GenerationOptions; `most`: tokens of an answer, whatever it wants. Raises Refused."""
    found: dict[str, Any] = {}
    for name, kind in _DECODING.items():
        if request.get(name) is not None:
            found[name] = kind(request[name])  # transformers takes no whole number for a temperature
    wanted, words = _new_tokens_of(request), _stop_of(request)
    if wanted is not None:
        found["max_new_tokens"] = min(wanted, most)
    if words is not None:
        found["stop_words"] = words
    return found


def _new_tokens_of(request: dict[str, Any]) -> int | None:
    """How many tokens a request wants; None where it does not say. Raises Refused."""
    wanted = None
    for name in ("max_tokens", "max_completion_tokens"):  # the second is the newer name, and wins
        if request.get(name) is not None:
            wanted = request[name]
            if wanted < 1:
                raise Refused(400, f"{name} must be a whole number of 1 or more", param=name)
    return wanted
