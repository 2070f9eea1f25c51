"""Old checkpoints, mp_rank_XX[_YYY]/model_optim_rng.pt: read at any layout without running code, exported, and trained from."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import tempfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny

from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments
from megaswift.errors import DataError, UserError
from megaswift.models import family_of
from megaswift.models.experts import expert_sizes
from megaswift.models.family import is_tied, sizes_of
from megaswift.models.rules import expanded
from megaswift.weights import classic


def write_classic(
    root: Path, model: Any, tp: int, pp: int, *, local_names: bool = False, separate_output: bool = False, **args: Any
) -> Path:
    """Write a model as the original system did: release/mp_rank_XX[_YYY]/model_optim_rng.pt."""
    family, sizes = family_of(model.config.model_type), sizes_of(model.config)
    with tempfile.TemporaryDirectory() as folder:  # experts are loaded into other tensors than a folder has
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    parts: dict[tuple[int, int], OrderedDict[str, Any]] = {(t, p): OrderedDict() for t in range(tp) for p in range(pp)}
    each = sizes.layers // pp
    rules = family.rules_for(is_tied(model.config) and not separate_output)
    kinds = family.layers(model.config)
    for parameter in expanded(rules, replace(sizes, more=expert_sizes(kinds)), kinds):
        source = [tensors.get(part.name, tensors["model.embed_tokens.weight"]) for part in parameter.hf]
        layered = parameter.name.startswith("decoder.layers.")
        layer = int(parameter.name.split(".")[2]) if layered else 0
        stage = layer // each if layered else (0 if parameter.name.startswith("embedding") else pp - 1)
        name = parameter.name.replace(f".layers.{layer}.", f".layers.{layer % each}.")
        if local_names:
            name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight").replace(
                "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
            )
        for t, piece in enumerate(parameter.arrangement.shard(parameter.arrangement.pack(source), tp)):
            parts[t, stage][name] = piece.contiguous()
            if name.endswith("linear_qkv.weight"):
                parts[t, stage][name.removesuffix("weight") + "_extra_state"] = None
    for (t, p), state in parts.items():
        place = root / "release" / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else ""))
        place.mkdir(parents=True)
        told = argparse.Namespace(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, params_dtype=torch.bfloat16, **args
        )
        torch.save({"args": told, "checkpoint_version": 3.0, "iteration": 0, "model": state}, place / classic.FILE)
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return root


def equal_folders(one: Path, other: Path) -> bool:
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("name", "tp", "pp", "local"),
    [
        ("llama", 2, 1, False),
        ("qwen2", 2, 2, True),
        ("qwen3", 1, 4, False),
        ("mistral", 4, 1, True),
        ("mixtral", 2, 2, False),
        ("qwen2_moe", 2, 1, True),
    ],
)
def test_every_layout_comes_back_bit_for_bit(name: str, tp: int, pp: int, local: bool, tmp_path: Path) -> None:
    model = tiny.save_tiny(tmp_path / "hf", name, vocab_size=132)
    old = write_classic(tmp_path / "old", model, tp, pp, local_names=local)
    shutil.copy(tmp_path / "hf" / "config.json", old)
    back = export_main(
        ExportArguments(
            ckpt_dir=str(old), to_hf=True, model_type="t", hf_output_dir=str(tmp_path / "back"), verify=name == "qwen2"
        )
    )
    assert equal_folders(tmp_path / "hf", back)

    # As the start of a training: the layout of today, from there to Hugging Face once more.
    start = export_main(
        ExportArguments(ckpt_dir=str(old), to_megatron=True, model_type="t", megatron_output_dir=str(tmp_path / "start"))
    )
    again = export_main(ExportArguments(ckpt_dir=str(start), to_hf=True, verify=False))
    assert equal_folders(tmp_path / "hf", again)


def test_a_separate_output_layer_of_a_tied_model_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The original system trained tied models with an output layer of their own, and lost it on export."""
    import json

    model = tiny.save_tiny(tmp_path / "hf", "qwen2", vocab_size=132, tie_word_embeddings=True)
    for change in (False, True):
        old = write_classic(tmp_path / f"old{change}", model, 2, 1, separate_output=True)
        shutil.copy(tmp_path / "hf" / "config.json", old)
        if change:
            for place in (old / "release").glob("mp_rank_*"):
                state = torch.load(place / classic.FILE, weights_only=False)
                state["model"]["output_layer.weight"] = state["model"]["output_layer.weight"] + 1
                torch.save(state, place / classic.FILE)
        back = export_main(ExportArguments(ckpt_dir=str(old), to_hf=True, model_type="t", verify=True))
        assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is not change
        assert ("lm_head.weight" in load_file(back / "model.safetensors")) is change
    assert "config.json gets tie_word_embeddings false" in capsys.readouterr().out


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/megaswift-payload-ran",)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    marker = Path("/tmp/megaswift-payload-ran")
    marker.unlink(missing_ok=True)
    model = tiny.save_tiny(tmp_path / "hf", "llama", vocab_size=132)
    old = write_classic(tmp_path / "old", model, 1, 1, evil=Payload())
    shutil.copy(tmp_path / "hf" / "config.json", old)
    with pytest.raises(DataError, match=r"not safe to read: it names posix\.system"):
        export_main(ExportArguments(ckpt_dir=str(old), to_hf=True, model_type="t"))
    assert not marker.exists()


def test_faults_are_named(tmp_path: Path) -> None:
    model = tiny.save_tiny(tmp_path / "hf", "llama", vocab_size=132)
    old = write_classic(tmp_path / "old", model, 2, 2)
    with pytest.raises(UserError, match=r"no config\.json"):
        export_main(ExportArguments(ckpt_dir=str(old), to_hf=True))
    shutil.copy(tmp_path / "hf" / "config.json", old)
    with pytest.raises(UserError, match="does not say its model_type"):
        export_main(ExportArguments(ckpt_dir=str(old), to_hf=True))
    with pytest.raises(UserError, match="--tp 4 does not fit the checkpoint: it has tp 2"):
        export_main(ExportArguments(ckpt_dir=str(old), to_hf=True, model_type="t", tp=4))
    place = old / "release" / "mp_rank_01_001" / classic.FILE
    data = place.read_bytes()
    place.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="damaged or not safe") as caught:
        export_main(ExportArguments(ckpt_dir=str(old), to_hf=True, model_type="t"))
    assert "mp_rank_01_001" in caught.value.where
    place.write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(DataError, match="damaged or not safe"):
        export_main(ExportArguments(ckpt_dir=str(old), to_hf=True, model_type="t"))
    shutil.rmtree(place.parent)
    with pytest.raises(DataError, match="parts of the checkpoint are missing: mp_rank_01_001"):
        export_main(ExportArguments(ckpt_dir=str(old), to_hf=True, model_type="t"))
