"""{{name}} and {{author}} in rows: the places that identity files leave for the name of the model and of its maker."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from megaswift.data.conversation import Conversation

OPTIONS = {"name": "model_name", "author": "model_author"}
_PLACE = re.compile(r"\{\{(name|author)\}\}", re.IGNORECASE)
_FENCE = "```"  # what stands between two of them is code, where the same braces are another language's
_CHINESE = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Names:
    """What the places are filled with.

    Attributes:
        values: "name" and "author", as far as they are given -> (Chinese, English).
        told: whether rows that were filled are counted; the built-in self-cognition rows are there to be filled.
    """

    values: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    told: bool = True


def fill_places(conversation: Conversation, names: Names, tag: object) -> None:
    """Fill the places of a conversation in place, and note what was filled and what is left.

    Args:
        tag: "zh" or "en" where the row says its language; else Chinese characters in it decide.
    """
    texts = [conversation.text or "", *(f"{item.content}{item.reasoning or ''}" for item in conversation.messages)]
    if not any("{{" in text for text in texts):
        return
    chinese = tag == "zh" if tag in ("zh", "en") else any(_CHINESE.search(text) for text in texts)
    filled, left = set[str](), set[str]()

    def value(match: re.Match[str]) -> str:
        place = match[1].lower()
        (filled if place in names.values else left).add(place)
        return names.values[place][0 if chinese else 1] if place in names.values else match[0]

    def fill(text: str) -> str:
        parts = text.split(_FENCE)
        return _FENCE.join(part if number % 2 else _PLACE.sub(value, part) for number, part in enumerate(parts))

    if conversation.text is not None:
        conversation.text = fill(conversation.text)
    for message in conversation.messages:
        message.content = fill(message.content)
        message.reasoning = None if message.reasoning is None else fill(message.reasoning)
    for place in sorted(filled) if names.told else ():
        conversation.note(f"{{{{{place}}}}} filled from --{OPTIONS[place]}")
    for place in sorted(left):
        conversation.note(f"{{{{{place}}}}} is left as it stands and will be learnt: give --{OPTIONS[place]}")
