"""`--loss_scale`: which parts of a chat carry loss, and with what weight.

rules = LossRules.parse("last_round+ignore_empty_think+rules.json")

Words are joined by "+": which turns (default: every answer; last_round: what follows the last question; all: every token, what
the user and the template wrote included), then what within answers has none (ignore_empty_think; last_think: thoughts of
earlier rounds; no_think: all thoughts), and files of weights. A file is a JSON object, in ms-swift's form:

{"\\"confidence\\": *[0-9.]+": 3, "Action:": [2, 2], "Thought:": [1, 0.5]}

A number is the weight of what the regular expression finds in an answer; two are those of a word and of what follows it up to
the next such word. {"query": {...}, "response": {...}} has these under "response", and under "query" the weight of a whole
answer whose question holds a text. Weights multiply those that rows bring; tokens are never cut differently because of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.data.conversation import Message
from megaswift.data.tokens import Piece
from megaswift.errors import DataError, UserError, nearest

DEFAULT, LAST_ROUND, ALL = "default", "last_round", "all"
ROUNDS = (DEFAULT, LAST_ROUND, ALL)
EMPTY, LAST_THINK, NO_THINK = "ignore_empty_think", "last_think", "no_think"
WITHIN = (EMPTY, LAST_THINK, NO_THINK)
_THOUGHTS = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_NO_THOUGHTS = re.compile(r"<think>\s*</think>\s*")
_OPTION = "--loss_scale"


@dataclass(frozen=True)
class LossRules:
    """What `--loss_scale` says.

    Args:
        rounds: which turns carry loss, one of ROUNDS.
        within: of WITHIN.
        found: (regular expression, weight of what it finds in an answer).
        words: (word, its weight, the weight of what follows it).
        asked: (text in the question, weight of its answer).
    """

    rounds: str = DEFAULT
    within: tuple[str, ...] = ()
    found: tuple[tuple[str, float], ...] = ()
    words: tuple[tuple[str, float, float], ...] = ()
    asked: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> LossRules:
        """Of the option's text. Raises UserError for words that are none, and DataError for a file that cannot be read."""
        rules, rounds = cls(), []
        for word in filter(None, (part.strip() for part in text.split("+"))):
            if word in ROUNDS:
                rounds.append(word)
            elif word in WITHIN:
                rules = replace(rules, within=tuple(sorted({*rules.within, word})))
            elif word.endswith(".json"):
                rules = rules._with_file(Path(word).expanduser())
            else:
                close = nearest(word, (*ROUNDS, *WITHIN))
                raise UserError(
                    f"{_OPTION} {word!r} is not known.",
                    where=_OPTION,
                    fix=f"nearest: {close}; one of {', '.join(ROUNDS)}, with + any of {', '.join(WITHIN)} and files that end in .json",
                )
        if len(rounds) > 1:
            raise UserError(
                f"{' and '.join(rounds)} contradict each other.", where=_OPTION, fix=f"name one of {', '.join(ROUNDS)}"
            )
        if LAST_THINK in rules.within and NO_THINK in rules.within:
            raise UserError(f"{LAST_THINK} and {NO_THINK} contradict each other.", where=_OPTION, fix="name one of them")
        return replace(rules, rounds=rounds[0] if rounds else DEFAULT)

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> LossRules:
        """Of what `record` made, also after JSON."""
        lists = {key: tuple(tuple(item) for item in values[key]) for key in ("found", "words", "asked")}
        return cls(values["rounds"], tuple(values["within"]), **lists)

    def record(self) -> dict[str, Any]:
        """JSON-ready; `from_record` reads it."""
        return asdict(self)

    def _with_file(self, path: Path) -> LossRules:
        rules = self
        for kind, key, weights in _entries(path):
            if kind == "query":
                rules = replace(rules, asked=(*rules.asked, (key, weights[0])))
            elif len(weights) == 1:
                rules = replace(rules, found=(*rules.found, (key, weights[0])))
            else:
                rules = replace(rules, words=(*rules.words, (key, weights[0], weights[1])))
        return rules

    @property
    def changes_text(self) -> bool:
        """Whether weights differ within an answer or by its question."""
        return bool(self.within or self.found or self.words or self.asked)

    def chosen(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, those that carry no loss marked so."""
        if self.rounds != LAST_ROUND:
            return list(messages)
        last = _last_question(messages)
        return [
            replace(message, loss=0.0) if message.role == "assistant" and number < last else message
            for number, message in enumerate(messages)
        ]

    def everything(self, pieces: Sequence[Piece], messages: Sequence[Message]) -> list[Piece]:
        """With `all`: what carries no loss as yet does, but for answers whose row says that they have none."""
        if self.rounds != ALL:
            return list(pieces)
        silent = {number for number, message in enumerate(messages) if message.role == "assistant" and not message.loss}
        return [replace(piece, weight=1.0) if not piece.weight and piece.turn not in silent else piece for piece in pieces]

    def factors(self, pieces: Sequence[Piece], messages: Sequence[Message]) -> np.ndarray | None:
        """fp32, what the weight of each character of all pieces is multiplied by; None where that is 1 everywhere."""
        if not self.changes_text:
            return None
        text, last = "".join(piece.text for piece in pieces), _last_question(messages)
        result = np.ones(len(text), np.float32)
        for number, first, stop in _answers(pieces):
            answer, own = text[first:stop], result[first:stop]
            for span, weight in self._spans(answer, _question(messages, number)):
                own[span] = weight
            for thoughts in self._silent(number < last):
                for match in thoughts.finditer(answer):
                    own[match.start() : match.end()] = 0.0
        return None if bool((result == 1.0).all()) else result

    def _spans(self, answer: str, question: str) -> Iterator[tuple[slice, float]]:
        yield from ((slice(None), weight) for text, weight in self.asked if text in question)
        places = sorted(
            (match.start(), match.end(), own, behind)
            for word, own, behind in self.words
            for match in re.finditer(re.escape(word), answer)
        )
        for number, (start, end, own, behind) in enumerate(places, 1):
            yield slice(start, end), own
            yield slice(end, places[number][0] if number < len(places) else len(answer)), behind
        for expression, weight in self.found:
            yield from ((slice(*match.span()), weight) for match in re.finditer(expression, answer, re.DOTALL))

    def _silent(self, earlier: bool) -> Iterator[re.Pattern[str]]:
        if NO_THINK in self.within or (LAST_THINK in self.within and earlier):
            yield _THOUGHTS
        elif EMPTY in self.within:
            yield _NO_THOUGHTS


def _entries(path: Path) -> Iterator[tuple[str, str, list[float]]]:
    """(query or response, key, one or two weights) of a file. Raises DataError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the loss rules cannot be read: {error}.", where=f"{_OPTION} {path}") from error
    nested = isinstance(content, dict) and set(content) <= {"query", "response"} and bool(content)
    parts = content if nested else {"response": content}
    for kind, rules in parts.items():
        if not isinstance(rules, dict) or not rules:
            raise DataError(
                f"expected an object from text to weights, found {json.dumps(rules)[:60]}.", where=f"{_OPTION} {path}"
            )
        for key, value in rules.items():
            yield kind, key, _weights(kind, key, value, path)


def _weights(kind: str, key: str, value: Any, path: Path) -> list[float]:
    where, values = f"{_OPTION} {path}, {key!r}", value if isinstance(value, list) else [value]
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) and x >= 0 for x in values)
    if not numbers or len(values) not in ((1,) if kind == "query" else (1, 2)):
        wanted = "a weight of 0 or more" if kind == "query" else "a weight of 0 or more, or two"
        raise DataError(f"{json.dumps(value)[:60]} is not {wanted}.", where=where)
    if kind == "response" and len(values) == 1:
        try:
            empty = re.compile(key, re.DOTALL).match("") is not None
        except re.error as error:
            raise DataError(f"it is no regular expression: {error}.", where=where) from error
        if empty:
            raise DataError("the regular expression matches no text at all.", where=where, fix="write + in place of *")
    elif not key:
        raise DataError("a text is empty.", where=where)
    return [float(number) for number in values]


def _last_question(messages: Sequence[Message]) -> int:
    """The number of the last message of a user; 0 where there is none."""
    return max((number for number, message in enumerate(messages) if message.role == "user"), default=0)


def _question(messages: Sequence[Message], number: int) -> str:
    """What an answer follows."""
    return next((m.content for m in reversed(messages[:number]) if m.role in ("user", "tool")), "")


def _answers(pieces: Sequence[Piece]) -> Iterator[tuple[int, int, int]]:
    """(number of the message, first character, the one after the last) of each answer with loss, without its end token."""
    position, first, last, number = 0, None, 0, -1
    for piece in [*pieces, Piece("", pieces[0].kind)]:
        if piece.weight and first is None:
            first, last = position, position
        if piece.turn >= 0 and first is not None and piece.weight:
            number, last = piece.turn, position + len(piece.text)
        if not piece.weight and first is not None:
            yield number, first, last
            first, number = None, -1
        position += len(piece.text)
