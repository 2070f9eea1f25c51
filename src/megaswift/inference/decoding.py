"""What is handed to transformers' generate(): its settings, our logits processors and our stopping rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from megaswift.errors import NonFiniteError
from megaswift.inference.options import GenerationOptions
from megaswift.inference.text import first_stop, tail_text


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """End tokens that the model's folder names: generation_config.json (one or a list), config.json, the tokenizer."""
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id, getattr(model.config, "eos_token_id", None), tokenizer.eos_token_id):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)


def special_stop_ids(tokenizer: Any, words: Sequence[str]) -> frozenset[int]:
    """Stop words that are one token of their own, such as <|im_end|>: decoded text never shows those."""
    added = tokenizer.get_added_vocab() if words else {}
    return frozenset(added[word] for word in words if word in added)


def generation_config(options: GenerationOptions, max_new_tokens: int, ends: list[int], pad: int) -> GenerationConfig:
    """Our options in transformers' form. The repetition penalty is not here: see `processors`."""
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": options.num_beams,
        "do_sample": options.samples,
        "eos_token_id": ends or None,
        "pad_token_id": pad,
        "use_cache": True,
    }
    if options.samples:
        settings |= {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    return GenerationConfig(**settings)


def processors(options: GenerationOptions, mask: torch.Tensor, ids: torch.Tensor) -> LogitsProcessorList:
    """The processors that run before temperature, top_k and top_p."""
    chain = LogitsProcessorList([_RefuseNonFinite()])
    if options.repetition_penalty != 1:
        chain.append(_RepetitionPenalty(options.repetition_penalty, mask, ids))
    return chain


def criteria(
    tokenizer: Any,
    options: GenerationOptions,
    prompt_length: int,
    room: Sequence[int],
    stops: Sequence[Callable[[], bool]] | None,
) -> StoppingCriteriaList:
    """Stopping rules beside end tokens: length limits of single rows, stop words, requests to stop rows."""
    rules = StoppingCriteriaList()
    if min(room) != max(room):
        rules.append(_RowLimit(prompt_length, room))
    if options.stop_words:
        rules.append(_StopWordRule(tokenizer, options.stop_words, prompt_length))
    if stops is not None:
        rules.append(_OnRequest(stops))
    return rules


class _RefuseNonFinite(LogitsProcessor):
    """Stops at the first token if the model computes NaN; greedy decoding would answer token 0 for ever."""

    def __init__(self) -> None:
        self._checked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self._checked:
            self._checked = True  # once: reading the verdict makes the host wait for the GPU
            if bool(torch.isnan(scores).any()):
                raise NonFiniteError("the model's output is not a number.", fix="try --dtype fp32; check the weights")
        return scores


class _RepetitionPenalty(LogitsProcessor):
    """Divides positive and multiplies negative scores of tokens that appeared (CTRL, arXiv 1909.05858, section 4.1).

    transformers' own also punishes the padding token of shorter prompts, so a batch would answer unlike single rows.
    """

    def __init__(self, penalty: float, mask: torch.Tensor, ids: torch.Tensor) -> None:
        # Padding is replaced by a token that is in the prompt anyway: its last.
        self._penalty = penalty
        self._prompt = torch.where(mask.bool(), ids, ids[:, -1:])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        beams = input_ids.shape[0] // self._prompt.shape[0]
        prompt = self._prompt.repeat_interleave(beams, dim=0)
        seen = torch.cat([prompt, input_ids[:, prompt.shape[1] :]], dim=1)
        values = torch.gather(scores, 1, seen)
        values = torch.where(values < 0, values * self._penalty, values / self._penalty)
        return scores.scatter(1, seen, values)


class _RowLimit(StoppingCriteria):
    """Ends a row at its own limit: shorter prompts of a batch have more room in the model's context."""

    def __init__(self, prompt_length: int, room: Sequence[int]) -> None:
        self._prompt_length, self._room = prompt_length, torch.tensor(room)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        room = self._room.repeat_interleave(input_ids.shape[0] // len(self._room))
        return (input_ids.shape[1] - self._prompt_length >= room).to(input_ids.device)


class _StopWordRule(StoppingCriteria):
    """Ends a row whose latest tokens spell a stop word."""

    def __init__(self, tokenizer: Any, words: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._words, self._prompt_length = tokenizer, words, prompt_length
        self._reach = max(len(word.encode()) for word in words) + 4  # a token spells at least one byte

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tails = input_ids[:, max(self._prompt_length, input_ids.shape[1] - self._reach) :].tolist()
        found = [first_stop(tail_text(self._tokenizer, tail), self._words) is not None for tail in tails]
        return torch.tensor(found, device=input_ids.device)


class _OnRequest(StoppingCriteria):
    """Ends a row when asked to: by Ctrl-C, or because nobody waits for it any more."""

    def __init__(self, stops: Sequence[Callable[[], bool]]) -> None:
        self._stops = stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        asked = torch.tensor([stop() for stop in self._stops])
        return asked.repeat_interleave(input_ids.shape[0] // len(self._stops)).to(input_ids.device)
