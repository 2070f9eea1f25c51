"""Who asks and who judges: EvalScope where it is installed, else our own prompts and rules, behind one interface."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from megaswift import __version__
from megaswift.evaluation.items import LETTERS, Bench, Item
from megaswift.evaluation.reading import normal, own_words, read_letter, read_number


@dataclass(frozen=True)
class Asked:
    """A question as the model gets it.

    Attributes:
        item: the question.
        messages: the conversation; its last message is answered.
        handle: what the scorer needs again.
    """

    item: Item
    messages: list[dict[str, Any]]
    handle: Any = None


@dataclass(frozen=True)
class Verdict:
    """What became of an answer.

    Attributes:
        prediction: what was read from it; empty where there was nothing to read.
        correct: whether it is right.
        score: 1 or 0 for right or wrong; for open questions the overlap with the right answer, 0 to 1.
    """

    prediction: str
    correct: bool
    score: float


class Scorer(Protocol):
    """Prompts for a benchmark and the verdict on each answer.

    Attributes:
        title: who it is, for results ("scored_by").
        version: of the benchmark's prompts and rules.
        max_new_tokens: longest answer that its prompts ask for.
    """

    title: str
    version: str
    max_new_tokens: int

    def asked(self) -> list[Asked]:
        """The questions of the benchmark, in order."""

    def judge(self, asked: Asked, text: str) -> Verdict:
        """The verdict on one answer."""

    def judging(self) -> AbstractContextManager[Callable[[Asked, str], Verdict]]:
        """`judge` for many answers, fast and bounded in time, while the context is open."""


class OwnScorer:
    """Short prompts that ask for a letter or a number, and rules that read it.

    Args:
        bench: the questions.
        few_shot: solved examples before each.
    """

    version = "3"

    def __init__(self, bench: Bench, few_shot: int) -> None:
        self.title = f"megaswift {__version__}"
        self.max_new_tokens = {"gsm8k": 512, "general_qa": 512}.get(bench.kind, 32)
        self._bench, self._few_shot = bench, few_shot

    def asked(self) -> list[Asked]:
        """The questions with their solved examples, as one message of the user each."""
        return [Asked(item, [{"role": "user", "content": self._prompt(item)}]) for item in self._bench.items]

    def _prompt(self, item: Item) -> str:
        shown = [f"{question_text(shot, self._bench.kind)}\n{_solution(shot, self._bench.kind)}" for shot in self._shots(item)]
        return "\n\n".join([*shown, f"{question_text(item, self._bench.kind)}\n\n{_REQUESTS[self._bench.kind]}"])

    def _shots(self, item: Item) -> Sequence[Item]:
        return self._bench.examples(item, self._few_shot) if self._few_shot else ()

    def judge(self, asked: Asked, text: str) -> Verdict:
        """Read a letter, a number or a text from an answer and compare."""
        item = asked.item
        if item.choices:
            letter = read_letter(text, item.choices)
            return Verdict(letter, letter == item.answer, float(letter == item.answer))
        if self._bench.kind == "gsm8k":
            number, right = read_number(text), read_number(item.answer)
            return Verdict(number, number == right != "", float(number == right != ""))
        said = own_words(text, item.answer)
        return Verdict(said, normal(said) == normal(item.answer) != "", rouge_l(said, item.answer))

    def judging(self) -> AbstractContextManager[Callable[[Asked, str], Verdict]]:
        """`judge` itself: these rules take microseconds."""
        return nullcontext(self.judge)


_MARKS = {"ceval": ("问题：", "答案：")}
_ENGLISH = ("Question: ", "Answer: ")
_REQUESTS = {
    "arc": "Reply with the letter of the right choice only.",
    "mmlu": "Reply with the letter of the right choice only.",
    "ceval": "只回答正确选项的字母。",
    "gsm8k": "Think step by step. End with a line that holds nothing but: The answer is NUMBER.",
    "general_qa": "",
}


def question_text(item: Item, kind: str) -> str:
    """A question with its lettered choices."""
    if not item.choices:
        return item.question
    lines = [f"{_MARKS.get(kind, _ENGLISH)[0]}{item.question}"]
    return "\n".join(lines + [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices)])


def _solution(item: Item, kind: str) -> str:
    if kind == "gsm8k":
        return f"{item.explanation}\nThe answer is {item.answer}."
    return f"{_MARKS.get(kind, _ENGLISH)[1]}{item.answer}"


def rouge_l(text: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (of characters in Chinese); Lin, ROUGE, 2004, section 3.1."""
    left, right = _units(text)[:2000], _units(reference)[:2000]
    if not left or not right:
        return 0.0
    row = [0] * (len(right) + 1)
    for unit in left:
        corner = 0
        for place, other in enumerate(right, 1):
            corner, row[place] = row[place], corner + 1 if unit == other else max(row[place], row[place - 1])
    common = row[-1]
    return 2 * common / (len(left) + len(right))


def _units(text: str) -> list[str]:
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower())
