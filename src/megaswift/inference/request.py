"""The fields of a request to the server, and of which type each is: what is wrong gets status 400, never a traceback."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megaswift.inference.gate import Refused

_COMMON = (
    "model", "stream", "stream_options", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "max_tokens", "stop",
)  # fmt: skip
CHAT = frozenset({*_COMMON, "messages", "max_completion_tokens", "tools", "tool_choice"})  # what has an effect here
COMPLETION = frozenset({*_COMMON, "prompt"})

# Who asks, what is kept and what is computed where: nothing of it changes an answer.
BOOKKEEPING = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "prediction",
    }
)  # fmt: skip

# Fields that are refused unless they have a value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "functions": ([],), "function_call": ("none", "auto"), "audio": ({},),
    "modalities": (["text"],), "parallel_tool_calls": (True,), "response_format": ({"type": "text"}, {}), "verbosity": ("medium",),
    "web_search_options": (), "reasoning_effort": (), "moderation": (), "tools": ([],), "tool_choice": ("none", "auto"),
}  # fmt: skip
_VLLM_HAS = frozenset(
    {
        "n", "echo", "logprobs", "top_logprobs", "logit_bias", "presence_penalty", "frequency_penalty", "parallel_tool_calls",
        "response_format", "reasoning_effort", "tool_choice", "tools",
    }
)  # fmt: skip

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
    (_is_a(bool), "true or false", ("stream", "echo", "parallel_tool_calls")),
    (_is_whole, "a whole number", ("n", "best_of", "top_k", "max_tokens", "max_completion_tokens", "top_logprobs")),
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


def check_supported(request: dict[str, Any], known: frozenset[str]) -> None:
    """Raise Refused, by name, for what is asked and would not be done. The types are checked already.

    Args:
        known: fields that have their effect, CHAT or COMPLETION.
    """
    for name, value in request.items():
        if name not in known and not asks_for_nothing(name, value):
            raise unsupported(name)
    for name in request.get("stream_options") or {}:
        if name not in ("include_usage", "include_obfuscation"):
            raise unsupported(f"stream_options.{name}", "stream_options")
    choice = request.get("tool_choice")
    if known is CHAT and choice is not None and choice not in ("auto", "none"):
        raise Refused(400, f"tool_choice must be auto or none{_hint('tool_choice')}", param="tool_choice")


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a field changes no answer: it is absent, bookkeeping, or has the value that is the same as none."""
    same = (0, 0.0) if name in ("presence_penalty", "frequency_penalty") else _NEUTRAL.get(name, ())
    return value is None or name in BOOKKEEPING or any(value == other and type(value) is type(other) for other in same)


def unsupported(name: str, param: str | None = None) -> Refused:
    """The refusal of a field that would have no effect."""
    wanted = {"n": "n must be 1", "response_format": "response_format must be text"}.get(name, f"{name} is not supported")
    return Refused(400, f"{wanted}{_hint(name)}", param=param or name)


def _hint(name: str) -> str:
    return " with --infer_backend pt; vllm has it" if name in _VLLM_HAS else ""


_MEDIA = ("image_url", "image", "input_image", "input_audio", "audio_url", "video_url", "video", "audio", "file", "input_file")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_OF_MESSAGE = {  # beside role and content, which all have: what is read, and what is only a name for something
    "assistant": ("tool_calls", "reasoning_content", "reasoning", "annotations"),
    "tool": ("tool_call_id", "name"),
}


def refuse_media(messages: Any) -> None:
    """Raise Refused, by the kind of its part, for a message that holds a picture, a sound or a file; anything else passes."""
    for number, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        for place, part in enumerate(content if isinstance(content, list) else []):
            kind = part.get("type") if isinstance(part, dict) else None
            named = kind if kind in _MEDIA else next((name for name in _MEDIA if isinstance(part, dict) and name in part), None)
            if named is not None:
                where = f"messages[{number}].content[{place}]"
                raise Refused(400, f"{where}: {named} is not supported; the model reads text only", param="messages")


def message_of(message: Any, number: int) -> dict[str, Any]:
    """One message of a request as data rows have it: role, content, thoughts and tool calls. Raises Refused.

    Args:
        number: its place, for the error.
    """
    role = message.get("role") if isinstance(message, dict) else None
    if role not in _ROLES:
        raise Refused(400, f"a message needs a role ({', '.join(_ROLES)}) and text as its content", param="messages")
    for name, value in message.items():
        if name not in ("role", "content", *_OF_MESSAGE.get(role, ())) and value not in (None, [], {}):
            raise unsupported(f"messages[{number}].{name}", "messages")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(map(_is_text, texts)) else None
    calls = message.get("tool_calls") or []
    if content is None and calls:
        content = ""
    if not _is_text(content):
        raise Refused(400, f"messages[{number}] needs text as its content", param="messages")
    found: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    return found | ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thoughts} if thoughts else {})


def prompts_of(prompt: Any, most: int) -> list[str | list[int]]:
    """The prompts of a completion: a text, token ids, or a list of either. Raises Refused."""
    ids = isinstance(prompt, list) and bool(prompt) and all(map(_is_whole, prompt))
    prompts = prompt if isinstance(prompt, list) and not ids else [prompt]
    for one in prompts:
        if not (_is_text(one) and one) and not (isinstance(one, list) and one and all(map(_is_whole, one))):
            raise Refused(400, "prompt must be a text, a list of token ids, or a list of either", param="prompt")
    if not 0 < len(prompts) <= most:
        raise Refused(400, f"prompt must hold 1 to {most} texts", param="prompt")
    return prompts


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
