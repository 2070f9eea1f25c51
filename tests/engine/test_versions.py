"""Packages of versions that were never tried are named with what is needed."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from megaswift.config.options import SftArguments
from megaswift.errors import UserError
from megaswift.inference.loading import pick_dtype
from megaswift.launch.versions import check_versions
from megaswift.run import source as start


def test_this_environment_is_good() -> None:
    check_versions()


@pytest.mark.parametrize(
    ("version", "words"), [("1.0", "1.0 is installed"), (None, "none is installed"), ("99", "99 is installed")]
)
def test_found_and_needed_are_said(version: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "requires", lambda package: ["torch<2.14,>=2.11", "gguf>=0.1", 'vllm>=0.11; extra == "vllm"'])
    monkeypatch.setattr(metadata, "version", found)
    with pytest.raises(UserError) as caught:
        check_versions(("torch", "vllm"))
    assert "torch <2.14,>=2.11 is needed" in caught.value.what
    assert words in caught.value.what
    assert "vllm" not in caught.value.what


def test_a_source_tree_declares_nothing() -> None:
    check_versions(package="no-such-package")


@pytest.mark.parametrize(("ampere", "name"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_bf16_only_on_a_gpu_that_has_it(ampere: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older ones emulate it, which torch counts unless it is told not to; training and inference choose alike."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: ampere or including_emulation)
    for stored in ("bf16", "fp16", "fp32"):
        assert start._dtype(SftArguments(), stored) == name
    assert start._dtype(SftArguments(dtype="bf16"), "bf16") == "bf16"
    assert pick_dtype("AUTO") == {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
