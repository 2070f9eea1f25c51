"""Counting without making lists: the same as the lists."""

from __future__ import annotations

import pytest

from megaswift.models import family_of, parameters_of
from megaswift.models.adapters import Lora, target_modules
from megaswift.models.tally import AFTER, BEFORE, tally, trained_tally
from tests import tiny


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "dots1"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_counted_as_it_is_made(family: str, dora: bool) -> None:
    config = tiny.tiny_config(family)
    base = parameters_of(config)
    words = ["all-linear"] if dora or family in ("llama", "qwen2") else ["all-linear", "all-experts", "all-router"]
    adapter = Lora(rank=3, alpha=6, dropout=0.0, targets=target_modules(base, words), saved=("model.norm",), dora=dora)
    made = adapter.parameters(family_of(config.model_type), config)
    found = trained_tally(config, adapter, ())
    assert sum(found.values()) == sum(parameter.size for parameter in made)
    for split in (False, True):
        wanted = sum(parameter.size for parameter in made if (parameter.arrangement.split is not None) == split)
        assert sum(size for group, size in found.items() if group.split == split) == wanted
    experts = sum(parameter.size for parameter in made if ".local_experts." in parameter.name)
    assert sum(size for group, size in found.items() if group.expert) == experts


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_a_model_is_counted_by_its_places(family: str) -> None:
    config = tiny.tiny_config(family)
    found = tally(config)
    assert sum(found.values()) == sum(parameter.size for parameter in parameters_of(config))
    assert {group.layer for group in found} == {BEFORE, AFTER, *range(config.num_hidden_layers)}
    changed = tiny.tiny_config(family, vocab_size=config.vocab_size + 8)
    assert sum(tally(changed).values()) > sum(found.values()), "another config is another count"
