"""Log-likelihoods of choices behind one context, read once, are those of each text by itself, whatever a model keeps of the context."""

from __future__ import annotations

import pytest
import torch
from tests import tiny

from megaswift.evaluation.likelihood import LikelihoodScorer


class Tokenizer:
    """One that puts nothing before a text."""

    bos_token_id = None

    def __call__(self, _: str) -> dict[str, list[int]]:
        return {"input_ids": [7]}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_text", "gpt_oss"])
def test_choices_behind_a_context(name: str) -> None:
    """Keys and values, states of linear attention, windows; contexts and choices of different lengths in one batch."""
    model, generator = tiny.tiny_model(name), torch.Generator().manual_seed(1)

    def text(length: int) -> list[int]:
        return torch.randint(3, 120, (length,), generator=generator).tolist()

    batch = [(text(5), [text(3), text(1), text(2)]), (text(20), [text(2), text(4)])]
    scorer = LikelihoodScorer(model, Tokenizer(), 99)
    for (head, tails), found in zip(batch, scorer._batch(batch), strict=True):
        for tail, value in zip(tails, found, strict=True):
            with torch.no_grad():
                logs = model(torch.tensor([head + tail]), use_cache=False).logits[0].log_softmax(-1)
            wanted = sum(float(logs[len(head) - 1 + place, token]) for place, token in enumerate(tail))
            assert value == pytest.approx(wanted, abs=1e-5)
