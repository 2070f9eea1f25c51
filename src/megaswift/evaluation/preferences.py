"""Preference accuracy: in how many pairs of a held-out file a model puts the chosen answer before the rejected one.

A model with a head of one score does it by that score, a language model by the mean log-probability of the answer's tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megaswift import __version__
from megaswift.config.options import EvalArguments
from megaswift.data.conversation import BadRow, Conversation
from megaswift.data.pairs import to_pair
from megaswift.data.pipeline import Recipe, renamed
from megaswift.data.resolve import resolve
from megaswift.data.spec import parse_specs
from megaswift.data.tokens import Encoded
from megaswift.errors import DataError, NonFiniteError, UserError
from megaswift.evaluation.answers import AnswerStore, answer_key
from megaswift.evaluation.items import Bench, Item
from megaswift.evaluation.run import BenchResult, Tell
from megaswift.inference.prompts import Prompts
from megaswift.inference.scores import Scorer, with_system

KIND = "pairs"
OPTION = "--preference_dataset"
_SHOWN = 3  # bad rows in an error


@dataclass(frozen=True)
class PairBench:
    """Pairs as a benchmark, whose items are for people, and as the conversations that are judged, the chosen one first."""

    bench: Bench
    pairs: tuple[tuple[Conversation, Conversation], ...]


def read_pairs(args: EvalArguments, tell: Callable[[str], None]) -> list[PairBench]:
    """The pairs of --preference_dataset, a benchmark for each of its items: the first --eval_limit of them.

    Args:
        tell: hears of rows that are left out.

    Raises DataError for an item without a pair.
    """
    found = []
    for spec in parse_specs(args.preference_dataset):
        dataset = resolve(spec, None)
        source, bad, items, pairs = dataset.source, list[str](), list[Item](), list[tuple[Conversation, Conversation]]()
        recipe = Recipe(dict(dataset.columns), frozenset(), dataset.converter)
        for number in range(len(source)):
            try:
                chosen, rejected = to_pair(renamed(source.raw(number), recipe))
            except BadRow as error:
                bad.append(f"{source.where(number)}: {error}")
                continue
            pairs.append((with_system(chosen, args.system), with_system(rejected, args.system)))
            items.append(Item(KIND, str(number + 1), _asked(chosen), (_answer(chosen), _answer(rejected)), "A"))
        if not pairs:
            raise DataError(
                f"{spec.text} has no pair: {'; '.join(bad[:_SHOWN]) or 'it is empty'}.",
                where=OPTION,
                fix="see docs/rlhf.md for rows",
            )
        if bad:
            tell(f"{spec.text}: {len(bad)} rows are no pairs and are left out" + "".join(f"\n  {one}" for one in bad[:_SHOWN]))
        kept, total = spec.count or len(items), len(items)
        kept = min(kept, args.eval_limit or kept, total)
        name = Path(spec.name).stem if spec.is_local else spec.text
        bench = Bench(f"{KIND}:{name}", KIND, "all", tuple(items[:kept]), source=dataset.place, total=total)
        found.append(PairBench(bench, tuple(pairs[:kept])))
    return found


def _asked(conversation: Conversation) -> str:
    return next((one.content for one in reversed(conversation.messages) if one.role == "user"), conversation.text or "")


def _answer(conversation: Conversation) -> str:
    return conversation.messages[-1].content if conversation.messages else conversation.text or ""


class Judge(Protocol):
    """What makes a number of a conversation, the larger the better."""

    title: str

    def tokens(self, conversation: Conversation) -> Any:
        """What the number depends on beside the weights, in tokens. Raises BadRow."""

    def values(self, tokens: Sequence[Any], batch_size: int) -> list[float]:
        """The number of each."""


class ByScore:
    """A reward model. Raises UserError for one with several scores."""

    def __init__(self, scorer: Scorer) -> None:
        if scorer.labels != 1:
            raise UserError(
                f"a model of {scorer.labels} scores does not say which of two answers is better.",
                where=OPTION,
                fix="leave it out",
            )
        self.scorer, self.title = scorer, f"megaswift {__version__}, reward"

    def tokens(self, conversation: Conversation) -> list[int]:
        """See Judge."""
        return self.scorer.ids(conversation)

    def values(self, tokens: Sequence[list[int]], batch_size: int) -> list[float]:
        """See Judge."""
        found = dict(self.scorer.scores(tokens, batch_size))
        return [found[place][0] for place in range(len(tokens))]


class ByLikelihood:
    """A language model."""

    def __init__(self, model: Any, prompts: Prompts, context: int) -> None:
        self.model, self.prompts, self.context = model, prompts, context
        self.title = f"megaswift {__version__}, mean log-probability of the answer's tokens"

    def tokens(self, conversation: Conversation) -> Encoded:
        """See Judge; what both answers begin with carries no loss."""
        (made,) = self.prompts.template.encode([conversation])
        if isinstance(made, BadRow):
            raise made
        if len(made.ids) > self.context:
            raise BadRow("too long", f"{len(made.ids):,} tokens")
        return made

    def values(self, tokens: Sequence[Encoded], batch_size: int) -> list[float]:
        """See Judge. One at a time: what a vocabulary makes of several long answers would fill the memory."""
        import torch

        with torch.inference_mode():
            return [self._value(one) for one in tokens]

    def _value(self, one: Encoded) -> float:
        import torch

        ids = torch.tensor(one.ids.tolist(), device=self.model.device)[None]
        kept = torch.from_numpy(one.kept[1:].copy()).to(ids.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1][kept].float()
        return float(logits.log_softmax(-1).gather(1, ids[0, 1:][kept][:, None]).double().mean())


def run_pairs(judge: Judge, model_key: str, own: PairBench, batch_size: int, store: AnswerStore, tell: Tell) -> BenchResult:
    """Judge all pairs; what an earlier evaluation knows is taken. A tie, and a pair that is too long, counts as wrong.

    Raises NonFiniteError for a number that is none.
    """
    bench, rows = own.bench, dict[int, dict[str, Any]]()
    result, began = BenchResult(bench, scored_by=judge.title, version="1"), time.perf_counter()
    waiting: list[tuple[int, str, Any, Any]] = []
    for place, (item, pair) in enumerate(zip(bench.items, own.pairs, strict=True)):
        head = {"benchmark": bench.name, "subset": item.subset, "id": item.id, "gold": "chosen"}
        try:
            chosen, rejected = (judge.tokens(one) for one in pair)
        except BadRow:
            rows[place] = head | {
                "key": "",
                "prediction": "",
                "correct": False,
                "score": 0.0,
                "finish": "too_long",
                "tokens": 0,
            }
            continue
        key = answer_key(model_key, bench.name, item.id, [judge.title, _plain(chosen), _plain(rejected)])
        known = store.known(key)
        if known is not None:
            rows[place] = known
            store.write(known)
            store.reused += 1
        else:
            waiting.append((place, key, chosen, rejected))
    for first in range(0, len(waiting), batch_size):
        group = waiting[first : first + batch_size]
        values = judge.values([one for *_, chosen, rejected in group for one in (chosen, rejected)], batch_size)
        for (place, key, *_), good, bad in zip(group, values[::2], values[1::2], strict=True):
            if not (good - good == 0 == bad - bad):
                raise NonFiniteError("the model's output is not a number.", fix="try --dtype fp32; check the weights")
            item = bench.items[place]
            rows[place] = {
                "benchmark": bench.name, "subset": item.subset, "id": item.id, "key": key, "gold": "chosen",
                "prediction": "chosen" if good > bad else "rejected", "correct": good > bad, "score": float(good > bad), "finish": "stop",
                "tokens": 0, "values": [round(good, 6), round(bad, 6)],
            }  # fmt: skip
            store.write(rows[place])
        tell(bench.name, len(rows), len(bench.items), time.perf_counter() - began)
    result.rows = [rows[place] for place in range(len(bench.items))]
    result.asked, result.seconds = len(waiting), time.perf_counter() - began
    margins = [row["values"][0] - row["values"][1] for row in result.rows if "values" in row]
    result.more["mean_margin"] = f"{sum(margins) / len(margins):.6g}" if margins else None
    return result


def _plain(tokens: Any) -> Any:
    return [tokens.ids.tolist(), tokens.kept.tolist()] if isinstance(tokens, Encoded) else list(tokens)
