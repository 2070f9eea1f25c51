"""The first values of a head of scores, the same on every rank and at every layout: normal, as transformers begins one."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswift.models.head import SCORE, labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def first_scores(config: PreTrainedConfig, seed: int) -> Tensor:
    """fp32 [labels, hidden]: normal with the config's initializer_range as deviation, a function of the run's seed alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {SCORE}".encode()))
    deviation = float(getattr(config, "initializer_range", None) or 0.02)
    return torch.randn((labels_of(config) or 1, config.hidden_size), generator=generator) * deviation


@torch.no_grad()
def begin_head(chunks: list[Any], config: PreTrainedConfig, seed: int) -> None:
    """Give the head of the last stage its first values; on other stages there is nothing to do."""
    for chunk in chunks:
        if chunk.post_process:
            chunk.score.weight.copy_(first_scores(config, seed))
