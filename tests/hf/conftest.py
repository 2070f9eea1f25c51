"""Settings for the tests of megaswift.weights.hf: one thread, and no cache, hub or option of the machine they run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_SETTINGS = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "USE_HF",
    "MODELSCOPE_CACHE",
    "HF_ENDPOINT",
    "XDG_CACHE_HOME",
)


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    for name in _SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MEGASWIFT_CACHE", str(home / "megaswift"))
    return home
