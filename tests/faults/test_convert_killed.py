"""`swift export` killed at each of its disk operations, in both directions: no command accepts what is left, and the next one works."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments, InferArguments, SftArguments
from megaswift.errors import MegaswiftError
from megaswift.inference.model_ref import choose
from megaswift.run.source import resolve_source
from tests import tiny
from tests.faults import table
from tests.faults.conftest import ALL
from tests.faults.harness import _context

OPERATIONS = ("mkdir", "write", "fsync", "rename", "replace", "rmdir", "unlink", "open")  # of os, which pathlib and shutil call
STRIDE = 1 if ALL else 9


def _killed_at(number: int, options: dict[str, Any], counted: Any) -> None:
    """Convert; die by SIGKILL just before the disk operation with this number, or count them all."""
    import torch

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    seen = 0

    def before(name: str) -> Any:
        plain = getattr(os, name)

        def operation(*arguments: Any, **more: Any) -> Any:
            nonlocal seen
            if name != "open" or (len(arguments) > 1 and arguments[1] & (os.O_WRONLY | os.O_RDWR)):
                seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **more)

        return operation

    for name in OPERATIONS:
        setattr(os, name, before(name))
    export_main(ExportArguments(**options))
    counted.value = seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed") / "hf"
    tiny.save_tiny(root, "llama", vocab_size=300, eos_token_id=1, pad_token_id=2)
    tiny.write_tokenizer(root)
    return root


@pytest.fixture(scope="module")
def megatron(folder: Path) -> Path:
    return export_main(ExportArguments(**there(folder, folder.parent / "megatron")))


def there(folder: Path, target: Path) -> dict[str, Any]:
    return {"to_megatron": True, "model_type": "t", "model_id_or_path": str(folder), "megatron_output_dir": str(target), "verify": False}  # fmt: skip


def back(megatron: Path, target: Path) -> dict[str, Any]:
    return {"to_hf": True, "ckpt_dir": str(megatron), "hf_output_dir": str(target), "max_shard_size": "100KB", "verify": False}


def refused(path: Path) -> None:
    """Neither sft nor infer nor export takes a directory."""
    for attempt in (
        lambda: resolve_source(SftArguments(resume_from_checkpoint=str(path), model_type="t")),
        lambda: choose(InferArguments(ckpt_dir=str(path), model_type="t")).locate(),
        lambda: choose(InferArguments(model_id_or_path=str(path), model_type="t")).locate(),
        lambda: export_main(ExportArguments(to_hf=True, ckpt_dir=str(path), hf_output_dir=str(path.parent / "never"))),
        lambda: export_main(ExportArguments(**there(path, path.parent / "never"))),
    ):
        with pytest.raises(MegaswiftError):
            attempt()
    assert not (path.parent / "never").exists()


def accepted(path: Path, direction: str) -> None:
    if direction == "there":
        assert resolve_source(SftArguments(resume_from_checkpoint=str(path))).first_step == 0
    else:
        assert choose(InferArguments(model_id_or_path=str(path), model_type="t")).locate().path == path


@pytest.mark.parametrize("direction", ["there", "back"])
def test_killed_at_every_operation(direction: str, folder: Path, megatron: Path, tmp_path: Path) -> None:
    make = (lambda target: there(folder, target)) if direction == "there" else (lambda target: back(megatron, target))
    counted = multiprocessing.get_context("forkserver").Value("i", 0)
    total = _run(0, make(tmp_path / "whole"), counted)
    accepted(tmp_path / "whole", direction)
    assert total > 20
    outcomes = {"nothing": 0, "refused": 0, "complete": 0}
    for number in range(1, total + 1, STRIDE):
        place = tmp_path / str(number)
        place.mkdir()
        _run(number, make(place / "target"), counted)
        left = list(place.iterdir())
        for item in left:
            if item.name == "target":
                accepted(item, direction)
                outcomes["complete"] += 1
            else:
                assert item.name.startswith(".target.tmp-"), item
                refused(item)
                outcomes["refused"] += 1
        outcomes["nothing"] += not left
    again = tmp_path / "1" / "target"
    accepted(export_main(ExportArguments(**make(again))), direction)
    assert outcomes["refused"] > outcomes["complete"]
    names = {"there": "Hugging Face to Megatron", "back": "Megatron to Hugging Face"}
    table.add(
        f"conversion, {names[direction]}: SIGKILL before each of {total} disk operations",
        f"{outcomes['nothing']} times nothing was left, {outcomes['refused']} times a hidden directory, {outcomes['complete']} times the whole",
        "the hidden ones are refused by sft, infer and export",
    )


def _run(number: int, options: dict[str, Any], counted: Any) -> int:
    process = _context.Process(target=_killed_at, args=(number, options, counted))
    process.start()
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if number else 0), (number, process.exitcode)
    return int(counted.value)
