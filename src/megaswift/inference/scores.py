"""Scores of rows by a model that has a head for them: a reward of each answer, a class, or numbers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megaswift.config.options import BackendArguments, InferArguments
from megaswift.data import preference
from megaswift.data.classes import scored_tokens
from megaswift.data.conversation import BadRow, Conversation, Message
from megaswift.data.encode import recipe_of
from megaswift.data.encoding import refuse_encoding
from megaswift.data.labels import LABEL
from megaswift.data.pairs import to_pair
from megaswift.data.pipeline import renamed
from megaswift.data.resolve import resolve
from megaswift.data.rows import to_conversation
from megaswift.data.sampling import sample_validation, split_and_sample
from megaswift.data.spec import parse_specs
from megaswift.errors import DataError
from megaswift.inference.options import limited_context
from megaswift.inference.prompts import Prompts
from megaswift.models.head import MULTI, REGRESSION
from megaswift.models.lengths import context_length

if TYPE_CHECKING:
    from megaswift.data.pipeline import Recipe
    from megaswift.hub.locate import Located
    from megaswift.inference.results import ResultWriter

QUIET_FROM = 100  # rows; so many are not printed one by one
_SHOWN = 5  # bad rows named one by one


@dataclass(frozen=True)
class ScoredRow:
    """One row to score.

    Attributes:
        conversations: one; of a pair two, the chosen one first.
        label: what the row says of itself, or None.
        where: file and line.
    """

    conversations: tuple[Conversation, ...]
    label: Any
    where: str

    @property
    def is_pair(self) -> bool:
        return len(self.conversations) == 2


def scored_row(row: dict[str, Any], where: str, system: str | None = None) -> ScoredRow:
    """A row as it is scored. Raises BadRow.

    Args:
        row: under the names that its dataset gives its columns.
        system: system prompt of rows that bring none.
    """
    if preference.is_pair(row):
        made, label = to_pair(row), None
    else:
        label = row.get(LABEL)
        made = (to_conversation({key: value for key, value in row.items() if key != LABEL}, answered=False),)  # type: ignore[assignment]
    return ScoredRow(tuple(with_system(one, system) for one in made), label, where)


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """A conversation with a system prompt, unless it brings one."""
    messages = conversation.messages
    if system is None or not messages or messages[0].role == "system":
        return conversation
    return replace(conversation, messages=[Message("system", system), *messages])


def read_rows(args: InferArguments) -> list[ScoredRow]:
    """The rows that the options name: at most --show_dataset_sample of them, in their order.

    These are the rows of --val_dataset; without it the validation rows that training takes from --dataset. Bad rows are
    counted, and the first ones shown, on stderr. Raises DataError when no row is left, with --strict for the first bad one.
    """
    rows, bad, limit = list[ScoredRow](), list[str](), args.show_dataset_sample
    total = 0
    for made in _drawn(args):
        total += 1
        if isinstance(made, ScoredRow):
            if limit < 0 or len(rows) < limit:
                rows.append(made)
        else:
            bad.append(made)
    if bad:
        _note(f"left out, they cannot be scored: {len(bad)}" + "".join(f"\n  {line}" for line in bad[:_SHOWN]))
    if not rows:
        where = " ".join(args.val_dataset or args.dataset)
        raise DataError("no row is left to score.", where=where, fix='for example {"messages": [...]}, or pairs')
    if len(rows) + len(bad) < total:
        _note(f"{len(rows)} of {total} rows (--show_dataset_sample -1 for all)")
    return rows


def _drawn(args: InferArguments) -> Iterator[ScoredRow | str]:
    """Each row that is meant, or why it cannot be scored."""
    seed = args.seed if args.dataset_seed is None else args.dataset_seed
    for spec in parse_specs(args.val_dataset or args.dataset):
        dataset = resolve(spec, args.custom_dataset_info)
        recipe, source = recipe_of(dataset, args), dataset.source
        made = [_read(source.raw(number), source.where(number), recipe, args) for number in range(len(source))]
        if args.val_dataset and spec.count is None:
            yield from made
            continue
        usable = [one for one in made if isinstance(one, ScoredRow)]
        if args.val_dataset:
            yield from (usable[place] for place in sample_validation(len(usable), spec.count, seed, spec.text))
        elif args.dataset_test_ratio > 0 and usable:  # the same rows that training held out
            yield from (usable[place] for place in split_and_sample(len(usable), spec.count, args.dataset_test_ratio, seed)[1])


def _read(raw: Any, where: str, recipe: Recipe, args: InferArguments) -> ScoredRow | str:
    try:
        return scored_row(renamed(raw, recipe), where, args.system)
    except BadRow as error:
        refuse_encoding(error, where)
        if args.strict:
            raise DataError(f"bad row: {error}.", where=where, fix="mend the row, or leave --strict out") from error
        return f"{where}: {error}"


class Scorer:
    """A model with a head of scores, loaded by transformers.

    Attributes:
        labels: scores of each sequence; problem: what they are, by transformers' names, or None: a reward.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: Prompts, context: int) -> None:
        self.model, self.tokenizer, self.prompts, self.context = model, tokenizer, prompts, context
        self.labels, self.problem = int(model.config.num_labels), getattr(model.config, "problem_type", None)

    @classmethod
    def load(cls, args: BackendArguments, located: Located) -> Scorer:
        """Raises DataError or UserError for a folder that cannot be loaded."""
        from megaswift.inference.loading import load_model, load_tokenizer

        tokenizer, model = load_tokenizer(located.path), load_model(located.path, args.dtype)
        prompts = Prompts(tokenizer, template_type=args.template_type, model_type=located.model_type)
        return cls(model, tokenizer, prompts, limited_context(context_length(model.config), args.max_model_len))

    @property
    def description(self) -> str:
        """Device and precision, in words."""
        return f"pt, {self.model.device.type}, {str(self.model.dtype).removeprefix('torch.')}"

    @property
    def dtype(self) -> Any:
        """torch's, in which the model computes."""
        return self.model.dtype

    def close(self) -> None:
        """Let go of the model."""
        self.model = None

    def ids(self, conversation: Conversation) -> list[int]:
        """Token ids as in training. Raises BadRow, also for what is longer than the model takes."""
        (made,) = scored_tokens(self.prompts.template, [conversation])
        if isinstance(made, BadRow):
            raise made
        if len(made) > self.context:
            raise BadRow("too long", f"{len(made):,} tokens, the model takes {self.context:,}")
        return [int(one) for one in made]

    def scores(self, sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[tuple[int, list[float]]]:
        """(number of the sequence, its scores), batches of similar length together."""
        import torch

        order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place]))
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            width = len(sequences[places[0]])
            ids = torch.full((len(places), width), self.model.config.pad_token_id, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, place in enumerate(places):
                ids[row, : len(sequences[place])] = torch.tensor(sequences[place])
                mask[row, : len(sequences[place])] = 1
            with torch.inference_mode():
                # transformers finds the token that is scored by itself: the last that is not the pad token.
                found = self.model(
                    input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device), use_cache=False
                ).logits
            yield from zip(places, found.float().tolist(), strict=True)

    def said(self, scores: list[float]) -> dict[str, Any]:
        """What scores mean: a reward, a class with the probability of each, classes, or numbers."""
        if self.labels == 1 and self.problem != MULTI:
            return {"score": scores[0]}
        if self.problem == REGRESSION:
            return {"scores": scores}
        if self.problem == MULTI:
            sure = [_sigmoid(one) for one in scores]
            return {
                "classes": [number for number, one in enumerate(scores) if one > 0],
                "probabilities": sure,
                "scores": scores,
            }
        return {"class": max(range(len(scores)), key=scores.__getitem__), "probabilities": _softmax(scores), "scores": scores}


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _softmax(values: list[float]) -> list[float]:
    parts = [math.exp(one - max(values)) for one in values]
    return [one / sum(parts) for one in parts]


def score_file(
    scorer: Scorer, rows: Sequence[ScoredRow], batch_size: int, results: ResultWriter | None
) -> list[dict[str, Any]]:
    """Score rows, show them (fewer than 100), and return the rows of the results file; what they come to is said on stderr.

    Rows that are too long, or that the chat template refuses, are left out and counted.
    """
    sequences, kept, refused = list[list[int]](), list[ScoredRow](), list[str]()
    for row in rows:
        try:
            own = [scorer.ids(conversation) for conversation in row.conversations]
        except BadRow as error:
            refused.append(f"{row.where}: {error}")
            continue
        kept.append(row)
        sequences += own
    if refused:
        _note(f"left out, they cannot be scored: {len(refused)}" + "".join(f"\n  {line}" for line in refused[:_SHOWN]))
    if not kept:
        raise DataError("no row can be scored.", where=refused[0], fix="see the reason")
    began, found = time.perf_counter(), dict[int, list[float]]()
    for place, own_scores in scorer.scores(sequences, batch_size):
        found[place] = own_scores
    made, first = list[dict[str, Any]](), 0
    for row in kept:
        values = [found[first + number] for number in range(len(row.conversations))]
        first += len(row.conversations)
        made.append(_result(scorer, row, values))
        if results is not None:
            results.write(made[-1])
        if len(kept) < QUIET_FROM:
            print(json.dumps(made[-1], ensure_ascii=False))
    seconds = max(time.perf_counter() - began, 1e-9)
    _note(f"{len(made)} rows in {seconds:.1f} s ({sum(map(len, sequences)) / seconds:,.0f} tokens/s){_sum(made)}")
    return made


def _result(scorer: Scorer, row: ScoredRow, values: list[list[float]]) -> dict[str, Any]:
    asked = _plain(row.conversations[0])
    if row.is_pair:
        chosen, rejected = (one[0] for one in values)
        return asked | {"rejected": _plain(row.conversations[1])["messages" if "messages" in asked else "text"]} | {
            "score": chosen, "rejected_score": rejected, "correct": chosen > rejected
        }  # fmt: skip
    made = asked | scorer.said(values[0])
    if row.label is not None:
        made[LABEL] = row.label
        if "class" in made:
            with suppress(TypeError, ValueError):
                made["correct"] = made["class"] == int(row.label)
        elif "classes" in made and isinstance(row.label, list):
            made["correct"] = made["classes"] == sorted(set(row.label))
    return made


def _plain(conversation: Conversation) -> dict[str, Any]:
    if conversation.text is not None:
        return {"text": conversation.text}
    return {"messages": [{"role": message.role, "content": message.content} for message in conversation.messages]}


def _sum(rows: list[dict[str, Any]]) -> str:
    judged = [row["correct"] for row in rows if "correct" in row]
    return f"; {sum(judged)} of {len(judged)} right, {sum(judged) / len(judged):.1%}" if judged else ""


def _note(text: str) -> None:
    """A line about the program: stdout holds the scores only."""
    print(text, file=sys.stderr, flush=True)


__all__ = ["ScoredRow", "Scorer", "read_rows", "score_file", "scored_row", "with_system"]
