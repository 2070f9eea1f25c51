"""FP8 weights with scales of blocks: read as transformers reads them, to the bit; what is made of them is bf16 and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.convert.test_export_targets import to_hf, to_megatron

from megaswift.errors import DataError, UserError
from megaswift.models import parameters_of
from megaswift.models.parameters import as_stored
from megaswift.store.manifest import read_manifest
from megaswift.weights.hf.block_fp8 import BlockFp8Folder, blocks_of, from_blocks, opened
from megaswift.weights.hf.config import check_source, load_config
from megaswift.weights.hf.read import HFCheckpoint

BLOCK = 8
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
# So that blocks are whole: transformers takes no others.
SIZES = {"kv_lora_rank": 24, "v_head_dim": 16, "vocab_size": 320, "num_nextn_predict_layers": 0}


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values of a matrix, and a scale for each block, cut at the last rows and columns."""
    rows, columns = (-(-side // BLOCK) for side in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scales = padded.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)) / 448
    wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
    return (weight / wide).to(torch.float8_e4m3fn), scales


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek V3 as it is published: linear layers in FP8, router, norms, embedding and output layer in bf16, the bias in fp32."""
    root = tmp_path_factory.mktemp("fp8") / "hf"
    tiny.save_tiny(root, "deepseek_v3", **SIZES)
    tiny.write_tokenizer(root)
    held = {}
    for name, value in load_file(root / "model.safetensors").items():
        if name.endswith(("_proj.weight", "_with_mqa.weight")):
            held[name], held[name + "_scale_inv"] = in_blocks(value)
        else:
            held[name] = value if name.endswith("correction_bias") else value.bfloat16()
    save_file(held, root / "model.safetensors", metadata={"format": "pt"})
    write_config(root, dtype="bfloat16", quantization_config=CONFIG)
    return root


def write_config(root: Path, **values: Any) -> None:
    path = root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_values_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, config = opened(HFCheckpoint.open(folder)), load_config(folder, from_fp8=True)
    check_source(source, config)
    assert isinstance(source, BlockFp8Folder) and len(source.scaled) == 5 * 4 + 3 + 3 * (3 * 8 + 3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # there is no GPU: it leaves FP8 by itself
    wanted = as_stored(parameters_of(config), model.state_dict())
    assert set(source.names) == wanted.keys()
    for name, value in wanted.items():
        found = source.tensor(name)
        assert found.dtype == value.dtype and torch.equal(found, value), name
    assert not any(name.endswith("_scale_inv") for name in source.names)


def test_blocks_are_cut_at_the_last_rows_and_columns() -> None:
    """As DeepSeek V3's kv_a_proj_with_mqa, whose 576 rows are four blocks and a half."""
    weight, scales = in_blocks(torch.randn(20, 13))
    assert scales.shape == (3, 2)
    wanted = torch.stack(
        [torch.stack([w.float() * scales[r // BLOCK, c // BLOCK] for c, w in enumerate(row)]) for r, row in enumerate(weight)]
    )
    assert torch.equal(from_blocks(weight, scales, (BLOCK, BLOCK)), wanted.bfloat16())


def test_what_is_made_of_it_is_bf16(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = to_megatron(folder, tmp_path / "start", verify=True)
    said = capsys.readouterr().out
    assert "104 weights are FP8 with a scale for each block of 8 x 8" in " ".join(said.split())
    assert "read as bf16" in read_manifest(start / "release")["from_fp8"]
    made = to_hf(start, tmp_path / "made")
    assert json.loads((made / "config.json").read_text()).get("quantization_config") is None
    source, back = opened(HFCheckpoint.open(folder)), HFCheckpoint.open(made)
    load_config(made)
    assert set(source.names) == set(back.names)
    assert all(torch.equal(source.tensor(name), back.tensor(name)) for name in back.names)
    assert {back.entry(name).dtype for name in back.names if not name.endswith("correction_bias")} == {"BF16"}


def test_others_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="FP8 in blocks") as caught:
        load_config(folder)
    assert "swift export" in str(caught.value.fix)
    for change in (
        {"quant_method": "gptq"},
        {"weight_block_size": None},
        {"activation_scheme": "static"},
        {"fmt": "e5m2"},
    ):
        assert blocks_of({"quantization_config": CONFIG | change}) is None
    held = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight_scale_inv"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(held | {name: held[name][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="no fp32 scales of blocks"):
        opened(HFCheckpoint.open(tmp_path))
    write_config(tmp_path, quantization_config=CONFIG | {"quant_method": "gptq"})
    with pytest.raises(UserError, match="quantized"):
        opened(HFCheckpoint.open(tmp_path))
