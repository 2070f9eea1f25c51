"""The tiny chat model of tests/inference, and the benchmark files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))

from eval_files import write_all  # noqa: E402
from tests.inference.conftest import make_model_dir  # noqa: E402


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four benchmarks; do not write into it."""
    return write_all(tmp_path_factory.mktemp("eval-data"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model; do not write into it."""
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny-chat", context=768)
