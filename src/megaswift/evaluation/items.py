"""What a benchmark is here: questions in one form, whatever file they came from, and which of them are asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megaswift.errors import UserError, nearest

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        subset: subject, or the benchmark's only part.
        id: stable within the subset: the file's own id, else its row number.
        choices: texts to choose from; empty for an open question.
        answer: letter of the right choice, or the right text.
        explanation: worked solution, where the file brings one (used in solved examples only).
    """

    subset: str
    id: str
    question: str
    choices: tuple[str, ...]
    answer: str
    explanation: str = ""

    @property
    def gold(self) -> int:
        """Place of the right choice."""
        return LETTERS.index(self.answer)


@dataclass(frozen=True)
class Bench:
    """A benchmark with the questions that will be asked.

    Attributes:
        name: as in --eval_dataset.
        kind: which prompts and which scoring: arc, mmlu, ceval, gsm8k, or general_qa for own questions with a text answer.
        split: which part of the original is scored.
        items: questions, subset after subset.
        shots: solved examples by subset; "" holds those of all subsets.
        source: file or hub, for messages and results.
        total: questions there are without --eval_limit.
        custom: made from --custom_eval_config.
    """

    name: str
    kind: str
    split: str
    items: tuple[Item, ...]
    shots: Mapping[str, tuple[Item, ...]] = field(default_factory=dict)
    source: str = ""
    total: int = 0
    custom: bool = False

    @property
    def generated(self) -> bool:
        """Whether its answers are texts, which have no choices whose likelihood could be taken."""
        return self.kind in ("gsm8k", "general_qa")

    @property
    def sha256(self) -> str:
        """Hash of the questions that are asked: the same hash means the same questions, choices and right answers."""
        rows = [[item.subset, item.id, item.question, item.choices, item.answer] for item in self.items]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    def examples(self, item: Item, count: int) -> tuple[Item, ...]:
        """The first `count` solved examples for a question. Raises UserError where there are fewer."""
        return self.common_examples([item], count)

    def common_examples(self, items: Sequence[Item], count: int) -> tuple[Item, ...]:
        """The first `count` solved examples that are none of some questions of one subset, which all get them.

        Raises UserError where there are fewer.
        """
        subset, asked = items[0].subset, {" ".join(item.question.split()) for item in items}
        shots = self.shots.get(subset, self.shots.get("", ()))
        found = [shot for shot in shots if " ".join(shot.question.split()) not in asked]
        if len(found) < count:
            same = f" beside {len(shots) - len(found)} that are asked themselves" if len(found) < len(shots) else ""
            raise UserError(
                f"{self.name} has {len(found)} solved examples for {subset}{same}, but --eval_few_shot asks for {count}.",
                where=self.source,
                fix=f"use --eval_few_shot {len(found)}, or add the {'train' if self.kind in ('arc', 'gsm8k') else 'dev'} split",
            )
        return tuple(found[:count])


def by_subset(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Questions by their subset, both in the order in which they stand."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.subset, []).append(item)
    return found


KINDS = {"arc": "arc", "arc_easy": "arc", "mmlu": "mmlu", "ceval": "ceval", "gsm8k": "gsm8k"}
SPLITS = {"arc": "test", "arc_easy": "test", "mmlu": "test", "ceval": "val", "gsm8k": "test"}


def check_names(names: Sequence[str], custom: Sequence[str] = ()) -> list[str]:
    """The benchmarks that are asked for, each once. Raises UserError for none and for unknown ones."""
    known = (*KINDS, *custom)
    wanted = list(dict.fromkeys(part for name in names for part in name.split(",") if part))
    if not wanted:
        raise UserError("no benchmark is named.", where="--eval_dataset", fix=f"use some of: {', '.join(known)}")
    for name in wanted:
        if name not in known:
            raise UserError(
                f"there is no benchmark {name!r}.", where="--eval_dataset", fix=f"did you mean: {nearest(name, known)}?"
            )
    return wanted


def limited(bench: Bench, limit: int | None) -> Bench:
    """The benchmark with at most `limit` questions: the first ones of each subset, evenly, so that every subject is asked."""
    total = len(bench.items)
    if limit is None or limit >= total:
        return replace(bench, total=total)
    waiting = by_subset(bench.items)
    if limit < len(waiting):  # not the first subjects of the alphabet, but subjects from all over it
        subsets = list(waiting)
        chosen = {subsets[place * len(subsets) // limit] for place in range(limit)}
        waiting = {subset: items for subset, items in waiting.items() if subset in chosen}
    taken: dict[str, int] = dict.fromkeys(waiting, 0)
    left = limit
    while left:
        for subset, items in waiting.items():
            if left and taken[subset] < len(items):
                taken[subset] += 1
                left -= 1
    kept = tuple(item for subset, items in waiting.items() for item in items[: taken[subset]])
    return replace(bench, items=kept, total=total)
