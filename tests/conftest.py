"""Fixtures that tests share: a pool of ranks, tiny models and their Megatron form."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for a network

from tests import tiny
from tests.ranks import RankPool


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
