"""From generated tokens to shown text: never half a character, never a stop word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_BROKEN = "\ufffd"  # what decoding gives for bytes that are no whole character (yet)
_LONGEST = 4  # bytes of a character in UTF-8


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of token ids, without special tokens and exactly as the tokenizer has it."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def whole_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of a whole answer, as TextAssembler shows it; bytes of an unfinished character at its end are left out.

    Tokenizers with a token for each byte (Llama 2, Mistral) decode a whole run of them as broken where one character of
    it is, so an answer that is cut within an emoji would lose the one before it, too.
    """
    text = decode(tokenizer, ids)
    if _BROKEN not in text:
        return text
    assembler = TextAssembler(tokenizer)
    return "".join([*map(assembler.push, ids), assembler.flush()])


def tail_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of the last tokens of an answer; bytes of a character that began before them are left out."""
    for start in range(_LONGEST):
        text = decode(tokenizer, ids[start:])
        if not text.startswith(_BROKEN):
            return text
    return decode(tokenizer, ids)


class TextAssembler:
    """Turns a stream of tokens into pieces of text that join to the text of all of them.

    One character of Chinese, or one emoji, often takes several tokens: a piece is held back until its last character
    is whole. Each piece is decoded together with the tokens before it, because some tokenizers drop the first space of
    what they decode.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens of the piece shown last
        self._waiting: list[int] = []  # tokens not shown yet

    def push(self, token: int) -> str:
        """Add a token; returns the text that can be shown now, perhaps none."""
        self._waiting.append(token)
        return self._piece(final=False)

    def flush(self) -> str:
        """The text still held back, when no more tokens come."""
        return self._piece(final=True)

    def _piece(self, *, final: bool) -> str:
        if not self._waiting:
            return ""
        whole = decode(self._tokenizer, self._context + self._waiting)
        if whole.endswith(_BROKEN) and not final:
            return ""
        shown = decode(self._tokenizer, self._context)
        if not whole.startswith(shown):  # a wrong byte breaks the whole run of bytes, the part that is shown already, too
            shown, whole = "", decode(self._tokenizer, self._waiting)
        piece = whole.rstrip(_BROKEN)[len(shown) :]
        if piece:
            self._context, self._waiting = self._waiting, []
        return piece


class StopWords:
    """Ends a text at the first of some words, holding back what may be the beginning of one."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = tuple(words)
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Add text; returns what can be shown now. After a stop word (`found`) that is nothing."""
        if self.found:
            return ""
        text = self._held + piece
        cut = first_stop(text, self._words)
        if cut is not None:
            self.found, self._held = True, ""
            return text[:cut]
        held = max((_overlap(text, word) for word in self._words), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The text still held back, when no more comes."""
        held, self._held = self._held, ""
        return held


def first_stop(text: str, words: Iterable[str]) -> int | None:
    """Where in `text` the first of `words` begins; None where there is none of them."""
    places = [place for place in (text.find(word) for word in words) if place >= 0]
    return min(places) if places else None


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a beginning of `word`."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0


def printable(text: str) -> str:
    """`text` without control characters that a terminal would obey (colours, cursor moves); newlines and tabs stay."""
    return "".join(char for char in text if char in "\n\t" or not _is_control(char))


def _is_control(char: str) -> bool:
    return ord(char) < 32 or 127 <= ord(char) < 160


def clean_input(text: str) -> str:
    """What a user typed or piped in, with bytes that are no text replaced, so that it can be tokenized and stored."""
    return "".join(_BROKEN if 0xD800 <= ord(char) <= 0xDFFF else char for char in text)
