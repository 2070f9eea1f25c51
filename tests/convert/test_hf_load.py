"""Without a conversion: safetensors straight into a sharded model give exactly what the converted checkpoint gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.ranks import RankFailed, RankPool

from megaswift.config.options import SftArguments
from megaswift.run.source import resolve_source
from megaswift.run.spec import Parallel, Precision
from megaswift.weights.hf.config import load_config


def both_ways(folder: str, release: str, tp: int, pp: int) -> tuple[list[str], int]:
    """On one rank: parameters that differ between the two ways, and bytes of the folder that were mapped in."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.megatron.model import build
    from megaswift.train.checkpoint.load import load_weights
    from megaswift.weights.load_hf import load_hf_weights

    config = load_config(Path(folder))
    parallel = Parallel(tp=tp, pp=pp)
    with ranks.joined(parallel, seed=0):
        direct, converted = (build(config, parallel, Precision()) for _ in range(2))
        load_hf_weights(direct, Path(folder))
        load_weights(converted, Path(release))
        pairs = zip(direct.named_parameters(), converted.parameters())
        return [name for (name, left), right in pairs if not torch.equal(left, right) or not left.abs().sum()], len(
            list(direct.parameters())
        )


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 1)])
def test_equal_to_the_converted_checkpoint(name: str, tp: int, pp: int, tiny_folders: Any, pool: RankPool) -> None:
    folder, release = tiny_folders(name, tie_word_embeddings=name in ("qwen2", "mistral"))
    for different, count in pool.run(tp * pp, both_ways, str(folder), str(release), tp, pp):
        assert different == []
        assert count > 5


def load_only(folder: str) -> None:
    from megaswift.megatron import process_groups as ranks
    from megaswift.megatron.model import build
    from megaswift.weights.load_hf import load_hf_weights

    config = load_config(Path(folder))
    with ranks.joined(Parallel(), seed=0):
        load_hf_weights(build(config, Parallel(), Precision()), Path(folder))


def test_missing_and_infinite_tensors_are_named(tiny_folders: Any, pool: RankPool, tmp_path: Path) -> None:
    folder, _ = tiny_folders("llama", tie_word_embeddings=False)
    for fault in ("missing", "infinite"):
        copy = tmp_path / fault
        shutil.copytree(folder, copy)
        tensors = load_file(copy / "model.safetensors")
        if fault == "missing":
            del tensors["model.layers.2.mlp.up_proj.weight"]
        else:
            tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = float("inf")
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(RankFailed, match="model.layers.2.mlp.up_proj.weight"):
            pool.run(1, load_only, str(copy))


def test_a_folder_has_no_layout(tiny_folders: Any, tmp_path: Path) -> None:
    """Its options file tells the layout that it was exported from, which says nothing about where it goes."""
    folder, _ = tiny_folders("llama", tie_word_embeddings=False)
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    (copy / "sft_args.json").write_text(json.dumps({"model_type": "tiny", "tp": 2, "pp": 2}), encoding="utf-8")
    args = resolve_source(SftArguments(resume_from_checkpoint=str(copy))).args
    assert (args.model_type, args.tp, args.pp) == ("tiny", 1, 1)
