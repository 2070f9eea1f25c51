"""A family whose layers differ in their tensors, for tests: Qwen3 of which every second layer has no norms on query and key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from megaswift.models import families
from megaswift.models.families.qwen3 import QWEN3
from megaswift.models.kinds import Kind
from tests import tiny
from tests.training import run_job

MIXED = replace(
    QWEN3,
    rules=tuple(
        replace(rule, layers=lambda kind: kind.qk_norm) if rule.megatron.endswith(("q_layernorm.weight", "k_layernorm.weight")) else rule
        for rule in QWEN3.rules
    ),
    kind=lambda config, layer: Kind(qk_norm=layer % 2 == 0),
)  # fmt: skip


@contextlib.contextmanager
def mixed() -> Iterator[None]:
    """Inside, Qwen3 is the family above: for our code, for the tiny models of tests, and on pooled ranks of a training."""
    whole = tiny.tiny_model

    def model(name: str, seed: int = 0, **changes: Any) -> Any:
        made = whole(name, seed, **changes)
        for layer in made.model.layers[1::2]:
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
        return made

    with (
        mock.patch.dict(families(), qwen3=MIXED),
        mock.patch.object(tiny, "tiny_model", model),
        mock.patch("tests.training.run_job", run_mixed_job),
    ):
        yield


def on_rank(function: Any, *arguments: Any) -> Any:
    """`function` on a rank of the pool, with the family above."""
    with mixed():
        return function(*arguments)


def run_mixed_job(path: str) -> None:
    """The loop of one rank."""
    on_rank(run_job, path)
