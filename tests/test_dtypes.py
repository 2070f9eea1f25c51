"""The table of number formats agrees with torch, with safetensors and with the classes of old pickles."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import _TYPES

from megaswift.weights import torch_dtypes
from megaswift.weights.dtypes import BYTES, DTYPES, FLAG_OF, ITEM_SIZE, NAMES, TRAINED, WEIGHTS, Dtype


@pytest.mark.parametrize("item", DTYPES, ids=lambda item: item.name)
def test_a_format_is_the_same_everywhere(item: Dtype) -> None:
    dtype = torch_dtypes.OF_HEADER[item.header]
    assert str(dtype) == f"torch.{item.name}" and dtype.itemsize == item.size == ITEM_SIZE[item.header]
    assert _TYPES[item.header] == dtype and torch_dtypes.HEADERS[dtype] == item.header and item.name in NAMES
    if item.storage:
        assert getattr(torch, item.storage)(0).dtype == dtype == torch_dtypes.OF_STORAGE[item.storage]
    if item.flag:
        assert dtype.is_floating_point and torch_dtypes.FLAGS[torch_dtypes.OF_FLAG[item.flag]] == item.flag
        assert FLAG_OF[item.header] == item.flag and BYTES[item.flag] == item.size and item.header in WEIGHTS


def test_what_models_are_trained_in() -> None:
    assert {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16} == torch_dtypes.TORCH_DTYPES
    assert tuple(torch_dtypes.TORCH_DTYPES) == TRAINED


def test_names_and_sizes_come_without_torch() -> None:
    code = "import sys, megaswift.weights.dtypes, megaswift.weights.hf.header; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
