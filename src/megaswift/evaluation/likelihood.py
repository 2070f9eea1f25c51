"""Log-likelihood of choices: how likely a model finds each choice after the question, without generating anything.

The question is computed once for all its choices. Prompts are the plain texts of EleutherAI's harness, without chat
template, so that figures can be set beside published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megaswift.errors import NonFiniteError, UserError
from megaswift.evaluation.items import LETTERS, Bench, Item

_WINDOW = 16  # batches that are sorted by length together


@dataclass(frozen=True)
class Likelihoods:
    """Log-likelihoods of one question's choices.

    Attributes:
        sums: natural logarithm of each choice's probability.
        lengths: UTF-8 bytes of each choice, for the normalised score.
        tokens: tokens of question and choices together.
    """

    sums: tuple[float, ...]
    lengths: tuple[int, ...]
    tokens: int

    @property
    def best(self) -> int:
        """Place of the likeliest choice."""
        return max(range(len(self.sums)), key=lambda place: self.sums[place])

    @property
    def best_normalised(self) -> int:
        """Place of the choice that is likeliest for its length."""
        return max(range(len(self.sums)), key=lambda place: self.sums[place] / max(self.lengths[place], 1))


def texts(bench: Bench, item: Item, few_shot: int) -> tuple[str, list[str]]:
    """(context, continuations) of a question."""
    shots = bench.examples(item, few_shot) if few_shot else ()
    head = _description(bench, item)
    parts = [_context(bench, shot) + _continuations(bench, shot)[shot.gold] for shot in shots]
    return head + "\n\n".join([*parts, _context(bench, item)]), _continuations(bench, item)


def _description(bench: Bench, item: Item) -> str:
    if bench.kind == "mmlu":
        return f"The following are multiple choice questions (with answers) about {item.subset.replace('_', ' ')}.\n\n"
    return ""


def _context(bench: Bench, item: Item) -> str:
    if bench.kind == "arc":
        return f"Question: {item.question}\nAnswer:"
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices))
    return f"{item.question}\n{choices}\n{'答案：' if bench.kind == 'ceval' else 'Answer:'}"


def _continuations(bench: Bench, item: Item) -> list[str]:
    if bench.kind == "arc":
        return [f" {choice}" for choice in item.choices]
    space = "" if bench.kind == "ceval" else " "
    return [f"{space}{letter}" for letter in LETTERS[: len(item.choices)]]


class LikelihoodScorer:
    """Log-likelihoods from a loaded transformers model.

    Args:
        model, tokenizer: of transformers.
        context: most tokens that fit; longer questions lose their oldest tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, context: int) -> None:
        self._model, self._tokenizer, self._context = model, tokenizer, context
        self._body = model.base_model
        self._head = model.get_output_embeddings()
        first = tokenizer("x")["input_ids"][:1]
        self._begins = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        if self._head is None:
            raise UserError("the model has no output layer to read likelihoods from.", fix="use --eval_method generate")

    def score_all(self, questions: Sequence[tuple[str, list[str]]], batch_size: int) -> Iterator[tuple[int, Likelihoods]]:
        """Log-likelihoods as (index of the question, result), each batch as soon as it is done."""
        encoded = [self._encode(context, choices) for context, choices in questions]
        for start in range(0, len(encoded), _WINDOW * batch_size):
            window = range(start, min(start + _WINDOW * batch_size, len(encoded)))
            by_length = sorted(window, key=lambda place: -len(encoded[place][0]))
            for first in range(0, len(by_length), batch_size):
                places = by_length[first : first + batch_size]
                for place, sums in zip(places, self._batch([encoded[place] for place in places]), strict=True):
                    context, choices = encoded[place]
                    lengths = tuple(len(choice.encode()) for choice in questions[place][1])
                    lengths = tuple(length - (questions[place][1][k][:1] == " ") for k, length in enumerate(lengths))
                    yield place, Likelihoods(tuple(sums), lengths, len(context) + sum(map(len, choices)))

    def _encode(self, context: str, choices: list[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids of the context and of each choice behind it, as they are when written together."""
        head = self._tokenizer(context, add_special_tokens=False)["input_ids"]
        start = [self._tokenizer.bos_token_id] if self._begins else []
        tails = [self._tokenizer(context + choice, add_special_tokens=False)["input_ids"][len(head) :] for choice in choices]
        room = self._context - max(map(len, tails)) - len(start)
        if room < 1 or not head or not all(tails):
            raise UserError(
                "a choice does not fit the model's context.", fix="raise --max_model_len, or use --eval_method generate"
            )
        return start + head[-room:], tails

    @torch.inference_mode()
    def _batch(self, batch: list[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
        """Sums of log probabilities, [question][choice]."""
        device = self._model.device
        longest = max(len(head) for head, _ in batch)
        ids = torch.tensor([[0] * (longest - len(head)) + head for head, _ in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(head)) + [1] * len(head) for head, _ in batch], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self._body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        first = self._log_probabilities(output.last_hidden_state[:, -1].to(device))
        owner = [row for row, (_, tails) in enumerate(batch) for _ in tails]
        tails = [tail for _, group in batch for tail in group]
        sums = [float(first[row, tail[0]]) for row, tail in zip(owner, tails)]
        if max(map(len, tails)) > 1:
            rest = self._rest(output.past_key_values, mask, [len(head) for head, _ in batch], owner, tails)
            sums = [start + more for start, more in zip(sums, rest)]
        if any(value != value for value in sums):
            raise NonFiniteError("the model's output is not a number.", fix="try --dtype fp32; check the weights")
        places = iter(sums)
        return [[next(places) for _ in group] for _, group in batch]

    def _rest(
        self, cache: Any, mask: torch.Tensor, lengths: list[int], owner: list[int], tails: list[list[int]]
    ) -> list[float]:
        """Log probabilities of the second and later tokens of each choice."""
        device, width = mask.device, max(map(len, tails)) - 1
        rows = torch.tensor(owner)  # on the CPU: a model split over GPUs has each layer's cache on that layer's GPU
        cache.reorder_cache(rows)  # what layers with linear attention know, too
        given = torch.tensor([tail[:-1] + [0] * (width - len(tail) + 1) for tail in tails], device=device)
        wanted = torch.tensor([tail[1:] + [-1] * (width - len(tail) + 1) for tail in tails], device=device)
        shown = torch.tensor([[1] * (len(tail) - 1) + [0] * (width - len(tail) + 1) for tail in tails], device=device)
        begin = torch.tensor([lengths[row] for row in owner], device=device)[:, None]
        output = self._body(
            input_ids=given,
            attention_mask=torch.cat([mask[rows], shown], dim=1),
            position_ids=begin + torch.arange(width, device=device)[None],
            past_key_values=cache,
            use_cache=True,
        )
        kept = wanted >= 0
        values = torch.zeros(wanted.shape, device=device)
        logs = self._log_probabilities(output.last_hidden_state.to(device)[kept])
        values[kept] = logs.gather(1, wanted[kept][:, None])[:, 0]
        return values.sum(1).tolist()

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Over the vocabulary, on the device of `hidden`, wherever the output layer lies."""
        return torch.log_softmax(self._head(hidden).to(hidden.device).float(), dim=-1)
