"""Fixtures that tests share: a pool of ranks, tiny models and their Megatron form."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for a network

from tests import tiny
from tests.ranks import RankPool

# How long an example takes is not judged: a machine may have other work.
hypothesis.settings.register_profile("megaswift", deadline=None)
hypothesis.settings.load_profile("megaswift")

# Files that take long with few tests: begun last, one of two workers would wait for the other.
LONG = (
    "test_whole_story", "test_document", "test_processes", "test_points", "test_golden", "test_training", "test_loss_scaler",
    "test_convert_resume", "test_save_safetensors",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first (`make test` hands out files in this order)."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Processes that act as ranks, shared by the whole session."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> (Hugging Face folder, Megatron release directory) of a family's tiny model, each made once."""
    made: dict[Any, tuple[Path, Path]] = {}

    def get(name: str, **changes: Any) -> tuple[Path, Path]:
        key = (name, tuple(sorted(changes.items())))
        if key not in made:
            root = tmp_path_factory.mktemp(name)
            tiny.save_tiny(root / "hf", name, **changes)
            made[key] = (root / "hf", tiny.to_megatron(root / "hf", root / "megatron"))
        return made[key]

    return get
