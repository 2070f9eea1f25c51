"""Thoughts in an answer's text: what a model says to itself before, or between, what it says to the user."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Qwen3, DeepSeek-R1 and what was taught from them; Magistral, Sky-T1, Seed-OSS, Kimi and prompts that ask for other names.
_NAMES = r"(?:seed:)?think(?:ing)?|thoughts?|reasoning"
_OPENS = re.compile(rf"<(?:{_NAMES})>|\[THINK\]|<\|begin_of_thought\|>|◁think▷")
_CLOSES = re.compile(rf"</(?:{_NAMES})>|\[/THINK\]|<\|end_of_thought\|>|◁/think▷")
_TAIL = 16  # tokens of a prompt's end that may hold an opening mark


def apart(text: str, opened: bool = False) -> tuple[str, bool]:
    """What of an answer stands outside its thoughts, and whether a thought was begun and never ended.

    Args:
        text: the answer. Where the prompt holds the opening mark, it has the closing one only.
        opened: the prompt ends within a thought, see `opens_thought`.
    """
    closes = list(_CLOSES.finditer(text))
    outside, place = [], 0
    if closes and (opened or not _OPENS.search(text, 0, closes[0].start())):
        place = closes[0].end()
    elif opened:
        return "", True
    while (begin := _OPENS.search(text, place)) is not None:
        outside.append(text[place : begin.start()])
        end = _CLOSES.search(text, begin.end())
        if end is None:
            return _joined(outside), True
        place = end.end()
    stray = [mark.end() for mark in closes if mark.end() > place]  # closed twice: what stands before it was a thought, too
    return _joined([*outside, text[stray[-1] if stray else place :]]), False


def _joined(parts: Sequence[str]) -> str:
    return "\n".join(part.strip() for part in parts if part.strip())


def opens_thought(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether a prompt (token ids) ends with the opening mark of a thought, as those of DeepSeek-R1 and Qwen3-Thinking do."""
    tail = tokenizer.decode(list(prompt[-_TAIL:]), skip_special_tokens=False).rstrip()
    return any(mark.end() == len(tail) for mark in _OPENS.finditer(tail))
