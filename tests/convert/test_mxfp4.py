"""Folders in MXFP4: read as bf16 with transformers' own values, converted with proof, and written back in bf16 with a config that says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments
from megaswift.errors import DataError, UserError
from megaswift.megatron.model import build
from megaswift.models import parameters_of
from megaswift.proof.streams import one_process
from megaswift.run.spec import Parallel, Precision
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.mxfp4 import dequantised
from megaswift.weights.hf.read import HFCheckpoint, Mxfp4Folder
from megaswift.weights.load_hf import load_hf_weights

HOW = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss as it is published: experts in blocks and scales, the rest in bf16."""
    path = tmp_path_factory.mktemp("mxfp4")
    tiny.tiny_model("gpt_oss", intermediate_size=64, vocab_size=300, eos_token_id=1, pad_token_id=2).to(
        torch.bfloat16
    ).save_pretrained(path)
    tiny.write_tokenizer(path)
    generator, made = torch.Generator().manual_seed(0), {}
    for name, value in load_file(path / "model.safetensors").items():
        if not name.endswith("_proj"):
            made[name] = value
            continue
        experts, inputs, outputs = value.shape
        made[name + "_blocks"] = torch.randint(
            0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator
        )
        made[name + "_scales"] = torch.randint(
            121, 124, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator
        )
    save_file(made, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": HOW}))
    return path


def test_values_are_those_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 255, (3, 8, 2), dtype=torch.uint8, generator=generator)
    theirs = convert_moe_packed_tensors(blocks, scales)
    ours = dequantised(blocks, scales).transpose(1, 2)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)


def test_it_is_seen_in_bf16(folder: Path) -> None:
    source, config = HFCheckpoint.open(folder), load_config(folder)
    assert type(source) is Mxfp4Folder and not hasattr(config, "quantization_config")
    stored = load_file(folder / "model.safetensors")
    for parameter in parameters_of(config):
        for part in parameter.hf:
            assert source.shape(part.name) == part.stored_shape and source.dtype(part.name) == torch.bfloat16
            assert torch.equal(source.part(part), part.of(source.tensor(part.name)))
            assert part.name in stored or part.name + "_blocks" in stored
            source.prefetch(part.name)
            source.release(part.name)
    assert source.nonfinite() == []


def test_logits_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16, attn_implementation="eager"
    ).float()
    tokens = torch.arange(3, 43)[None]
    with one_process(), torch.no_grad():
        ours = build(load_config(folder), Parallel(), Precision()).eval()
        load_hf_weights(ours, folder)
        found, wanted = ours(tokens, torch.arange(40)[None]), theirs(tokens, use_cache=False).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted with the proof of every tensor and of the logits; the folder that comes back is bf16, and says nothing else."""
    start = export_main(
        ExportArguments(
            model_type="tiny-chat", model_id_or_path=str(folder), to_megatron=True, megatron_output_dir=str(tmp_path / "start")
        )
    )
    assert "the experts are in MXFP4" in " ".join(capsys.readouterr().out.split())
    back = export_main(ExportArguments(ckpt_dir=str(start), to_hf=True, hf_output_dir=str(tmp_path / "back")))
    config = json.loads((Path(back) / "config.json").read_text())
    assert "quantization_config" not in config
    source, written = HFCheckpoint.open(folder), HFCheckpoint.open(back)
    assert set(written.names) == set(source.names) and type(written) is HFCheckpoint
    assert all(torch.equal(written.tensor(name), source.tensor(name)) for name in source.names)


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for wrong in (None, stored[name][:, :, :1].contiguous(), stored[name].int()):
        changed = {key: value for key, value in stored.items() if key != name} | ({} if wrong is None else {name: wrong})
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(DataError, match="down_proj_scales are not blocks and scales"):
            HFCheckpoint.open(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": HOW | {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="the weights are quantized"):
        load_config(tmp_path)
