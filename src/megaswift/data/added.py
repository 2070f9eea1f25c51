"""Where the added tokens of a tokenizer stand in a text, as the tokenizers library itself finds them.

Which ones match, where (`single_word`, `normalized`, the longest first) and which white space they swallow (`lstrip`,
`rstrip`) is left to the library: a tokenizer that has these tokens and no vocabulary is asked.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

_REST = "\ue0f3"  # what all other text becomes: a private-use character, which is no added token


class Found(NamedTuple):
    """An added token in a text, in characters.

    Attributes:
        token: its id.
        start, stop: what it replaces.
        first, last: the same without the white space that it swallowed.
        normalized: it was looked for in the normalized text, which it does not cut.
        rest: other text stands before it, if only a prefix of the normalizer.
    """

    token: int
    start: int
    stop: int
    first: int
    last: int
    normalized: bool
    rest: bool

    def moved(self, by: int) -> Found:
        """The same token in a longer text, `by` characters further on."""
        start, stop, first, last = (place + by for place in (self.start, self.stop, self.first, self.last))
        return self._replace(start=start, stop=stop, first=first, last=last)


class AddedTokens:
    """Finds added tokens, given as in tokenizer.json, with the normalizer given there."""

    def __init__(self, added: list[dict[str, Any]], normalizer: dict[str, Any] | None) -> None:
        from tokenizers import AddedToken, Tokenizer

        self._known: dict[int, dict[str, Any]] = {}  # by the finder's own id
        self._finder = None
        if not added:
            return
        normal = normalizer if any(token["normalized"] for token in added) else None
        parts: dict[str, Any] = {
            "added_tokens": [],
            "normalizer": normal,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": None,
        }
        model = {"type": "WordLevel", "vocab": {_REST: 0}, "unk_token": _REST}
        finder = Tokenizer.from_str(json.dumps(parts | {"version": "1.0", "model": model}))
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        finder.add_tokens([AddedToken(token["content"], **{flag: token[flag] for flag in flags}) for token in added])
        numbers = [finder.token_to_id(token["content"]) for token in added]
        self._known = {number: token for number, token in zip(numbers, added, strict=True) if number is not None}
        self._finder = finder

    def find(self, texts: list[str]) -> list[list[Found]]:
        """The added tokens of each text, in order."""
        if self._finder is None:
            return [[] for _ in texts]
        known, result = self._known, []
        for text, encoding in zip(texts, self._finder.encode_batch(texts, add_special_tokens=False), strict=True):
            ids, places = encoding.ids, encoding.offsets
            result.append(
                [
                    _found(known[local], text, *places[number], number > 0 and ids[number - 1] not in known)
                    for number, local in enumerate(ids)
                    if local in known
                ]
            )
        return result


def _found(token: dict[str, Any], text: str, start: int, stop: int, rest: bool) -> Found:
    first, last = start, stop
    inside = text[start:stop]
    if inside.strip():
        first += len(inside) - len(inside.lstrip()) if token["lstrip"] else 0
        last -= len(inside) - len(inside.rstrip()) if token["rstrip"] else 0
    return Found(token["id"], start, stop, first, last, token["normalized"], rest)
