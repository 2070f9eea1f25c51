"""Each tensor keeps its own precision, there and back and through training; what is rounded is named, and no more is claimed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.convert.test_classic import write_classic
from tests.ranks import RankPool
from tests.training import train, write_rows

from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments
from megaswift.errors import DataError
from megaswift.store.manifest import read_manifest
from megaswift.weights.convert.precision import MasterReader, grouped
from megaswift.weights.torch_dist.reader import Reader

NORM, FIRST = "model.norm.weight", "model.layers.0.input_layernorm.weight"


def is_norm(name: str) -> bool:
    return "norm" in name


def as_they_come(name: str) -> torch.dtype:
    """Precisions of every kind: one layer of a stack, one part of a fused matrix, fp64, the rest bf16."""
    parts = {FIRST: torch.float32, "model.layers.1.self_attn.k_proj.weight": torch.float32, NORM: torch.float64}
    parts |= {"model.layers.2.mlp.up_proj.weight": torch.float16}
    return parts.get(name, torch.bfloat16)


def mixed(folder: Path, target: Path, choose: Callable[[str], torch.dtype]) -> Path:
    """A copy of a folder whose tensors have the precisions of a function of their names, and values that need them."""
    shutil.copytree(folder, target)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: (value.double() * (1 + 1e-3 * torch.rand(value.shape, generator=generator, dtype=torch.float64))).to(choose(name))
        for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def norms_wide(name: str) -> torch.dtype:
    return torch.float32 if is_norm(name) else torch.bfloat16


def there(folder: Path, target: Path, **more: Any) -> Path:
    options = {"model_type": "t", "model_id_or_path": str(folder), "megatron_output_dir": str(target), "verify": False}
    return export_main(ExportArguments(to_megatron=True, **options | more))


def back(root: Path, target: Path, **more: Any) -> dict[str, torch.Tensor]:
    options = {"ckpt_dir": str(root), "hf_output_dir": str(target), "verify": False}
    return load_file(export_main(ExportArguments(to_hf=True, **options | more)) / "model.safetensors")


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, without line breaks."""
    return " ".join(capsys.readouterr().out.split())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether names, precisions and bits are the same."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value.view(torch.uint8), other[name].view(torch.uint8))
        for name, value in one.items()
    )


@pytest.mark.parametrize("choose", [norms_wide, as_they_come])
def test_every_tensor_comes_back_in_its_own_precision(
    choose: Any, tiny_folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mixed(tiny_folders("llama", tie_word_embeddings=False)[0], tmp_path / "hf", choose)
    start = there(folder, tmp_path / "m", verify=choose is as_they_come)
    source = load_file(folder / "model.safetensors")
    assert same(back(start, tmp_path / "back", verify=choose is as_they_come), source)
    assert (tmp_path / "back" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    wide = {name: {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16"}[value.dtype] for name, value in source.items() if value.dtype != torch.bfloat16}  # fmt: skip
    for manifest in (read_manifest(start / "release"), read_manifest(tmp_path / "back")):
        assert (manifest["dtype"], manifest["other_dtypes"]) == ("bf16", wide)
        assert "rounded" not in manifest
    said = told(capsys)
    assert "rounded" not in said and "all 39 tensors have the SHA-256" in said
    if choose is as_they_come:
        assert said.count("39 tensors equal, bit for bit") == 2
        assert f"fp64: {NORM}" in (start / "conversion.html").read_text()


def test_what_dtype_rounds_is_named_and_not_called_equal(
    tiny_folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both directions, and from a mixture as well as from one precision."""
    folder = mixed(tiny_folders("llama", tie_word_embeddings=False)[0], tmp_path / "hf", norms_wide)
    start = there(folder, tmp_path / "m", dtype="bf16", verify=True)
    said = told(capsys)
    assert "9 of 39 tensors are rounded, fp32 to bf16: " in said
    assert sorted(re.findall(r"model\.[\w.-]*norm\.weight", said)) == [
        "model.layers.0-3.input_layernorm.weight", "model.layers.0-3.post_attention_layernorm.weight", NORM
    ]  # fmt: skip
    assert "39 tensors: 30 equal, bit for bit, 9 equal to the source's once these are rounded" in said
    manifest = read_manifest(start / "release")
    assert set(manifest["rounded"]) == {name for name in load_file(folder / "model.safetensors") if is_norm(name)}
    page = (start / "conversion.html").read_text()
    assert all(f"<td>{name}</td><td>fp32 to bf16</td>" in page for name in manifest["rounded"])
    assert {value.dtype for value in back(start, tmp_path / "b1").values()} == {torch.bfloat16}

    kept = there(folder, tmp_path / "kept")
    capsys.readouterr()
    assert {value.dtype for value in back(kept, tmp_path / "b2", dtype="bf16", verify=True).values()} == {torch.bfloat16}
    said = told(capsys)
    assert "9 of 39 tensors are rounded, fp32 to bf16" in said and "39 tensors equal, bit for bit" not in said
    assert "9 tensors have other bytes than in bf16, as they must" in said
    assert back(start, tmp_path / "b3", dtype="fp16")[NORM].dtype == torch.float16
    assert "39 of 39 tensors are rounded, bf16 to fp16: all" in told(capsys)


def test_halves_of_two_kinds_are_proven(tiny_folders: Any, tmp_path: Path) -> None:
    """fp16 and bf16 have one size, and neither holds the other's values."""
    start = there(tiny_folders("llama", tie_word_embeddings=False)[0], tmp_path / "m", dtype="fp16")
    assert back(start, tmp_path / "b", dtype="bf16", verify=True)[NORM].dtype == torch.bfloat16


def test_a_tensor_that_is_not_as_converted_is_still_found(tiny_folders: Any, tmp_path: Path) -> None:
    """Also in the bits that a wider stack has beyond the tensor's own precision."""
    from megaswift.weights.convert import Precisions, verify_round_trip
    from megaswift.weights.hf.config import load_config

    one = {FIRST: torch.float32}
    folder = mixed(
        tiny_folders("llama", tie_word_embeddings=False)[0], tmp_path / "hf", lambda name: one.get(name, torch.bfloat16)
    )
    release = there(folder, tmp_path / "m") / "release"
    expected, config = read_manifest(release)["hf_tensors"], load_config(folder)

    class Other(Reader):
        def read(self, key: str, place: tuple[int, ...] = (), rows: Any = None) -> torch.Tensor:
            value = super().read(key, place, rows)
            return value * (1 + 2**-20) if value.dtype == torch.float32 and place == (1,) else value

    assert verify_round_trip(Reader(release), config, expected, Precisions(torch.bfloat16, one)) == 39
    with pytest.raises(DataError, match="is not the one in the source") as caught:
        verify_round_trip(Other(release), config, expected, Precisions(torch.bfloat16, one))
    assert caught.value.where == FIRST.replace(".0.", ".1.")


def test_old_checkpoints_keep_their_precisions(tmp_path: Path) -> None:
    model = tiny.save_tiny(tmp_path / "plain", "llama", vocab_size=132, tie_word_embeddings=False)
    folder = mixed(tmp_path / "plain", tmp_path / "hf", lambda name: torch.float32 if name in (FIRST, NORM) else torch.bfloat16)
    source = load_file(folder / "model.safetensors")
    state = model.state_dict()
    state.update(source)
    model.state_dict = lambda: state
    old = write_classic(tmp_path / "old", model, 2, 2)
    shutil.copy(folder / "config.json", old)
    assert same(back(old, tmp_path / "b1", model_type="t", verify=True), source)
    start = export_main(
        ExportArguments(to_megatron=True, ckpt_dir=str(old), model_type="t", megatron_output_dir=str(tmp_path / "m"))
    )
    assert same(back(start, tmp_path / "b2"), source)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/: a chat model with fp32 norms beside bf16 matrices; start/: its Megatron form; rows.jsonl."""
    root = tmp_path_factory.mktemp("mixed")
    tiny.save_tiny(root / "plain", "qwen2", vocab_size=300, eos_token_id=1, pad_token_id=2)
    tiny.write_tokenizer(root / "plain")
    mixed(root / "plain", root / "hf", norms_wide)
    there(root / "hf", root / "start")
    write_rows(root / "rows.jsonl")
    return root


def test_a_run_exports_what_was_learnt_in_the_precision_of_the_source(
    chat: Path, pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bf16 training of a folder itself on two ranks, gone on with from its own checkpoint: norms from the fp32 master weights."""
    words: dict[str, Any] = {"dataset": [str(chat / "rows.jsonl")], "dtype": "bf16", "save_steps": 1}
    run = train(
        pool, tmp_path / "o", 2, model_id_or_path=str(chat / "hf"), model_type="t", tp=2, max_steps=1, **words
    ).directory
    assert "rounded to bf16 for training, though the source has more precision (9 tensors)" in told(capsys)
    train(pool, tmp_path / "o", 2, resume_from_checkpoint=str(run), max_steps=2, **words)
    made = back(run, tmp_path / "hf", verify=True)
    assert "rounded" not in told(capsys).split("Hugging Face model")[-1]
    source, reader = load_file(chat / "hf" / "model.safetensors"), Reader(run / "iter_0000002")
    assert {name: value.dtype for name, value in made.items()} == {name: value.dtype for name, value in source.items()}
    master = reader.read("optimizer.state.param.decoder.final_layernorm.weight")
    assert torch.equal(made[NORM], master) and not torch.equal(master, master.bfloat16().float())
    assert torch.equal(made[FIRST].bfloat16(), reader.read("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (0,)))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"  # as the source's says


def test_a_run_without_master_weights_names_what_is_rounded(
    chat: Path, pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: dict[str, Any] = {"dataset": [str(chat / "rows.jsonl")], "dtype": "bf16", "save_only_model": True, "max_steps": 1}
    run = train(pool, tmp_path / "o", 1, resume_from_checkpoint=str(chat / "start"), **words).directory
    capsys.readouterr()
    made = back(run, tmp_path / "hf", verify=True)
    assert {value.dtype for value in made.values()} == {torch.bfloat16}
    said = told(capsys)
    assert "9 of 50 tensors are rounded, fp32 to bf16: model." in said and "50 tensors equal, bit for bit" not in said
    assert len(read_manifest(tmp_path / "hf")["rounded"]) == 9


def test_names_in_short() -> None:
    names = [f"model.layers.{layer}.a.weight" for layer in (0, 1, 2, 5, 7, 8)]
    assert (
        grouped([*names, NORM, "model.layers.3.b.weight"])
        == f"model.layers.0-2,5,7-8.a.weight, {NORM}, model.layers.3.b.weight"
    )


def test_a_master_copy_that_is_not_the_weight_is_an_error() -> None:
    """What is exported is what was trained, in more precision: rounded, it is the weight."""
    weight = torch.tensor([1.0, -2.5]).bfloat16()

    class Stored:
        directory = Path("run/iter_0000002")

        def __init__(self, master: torch.Tensor) -> None:
            self.master = master

        def read(self, key: str, place: tuple[int, ...] = (), rows: Any = None) -> torch.Tensor:
            return self.master if key.startswith("optimizer.") else weight

    near = weight.float() * (1 + 2**-12)
    reader = MasterReader(Stored(near), {("norm", ())})
    assert reader.read("norm") is near and reader.read("norm", (1,)) is weight and reader.read("other") is weight
    with pytest.raises(DataError, match="rounded, is not the weight") as caught:
        MasterReader(Stored(weight.float() * 1.01), {("norm", ())}).read("norm")
    assert caught.value.where == "run/iter_0000002: norm" and "--dtype bf16" in caught.value.fix


def test_a_folder_in_another_precision_is_not_the_written_one(tiny_folders: Any, tmp_path: Path) -> None:
    """The same values, in more bytes than the manifest says."""
    from megaswift.weights.convert import Precisions, verify_written
    from megaswift.weights.hf.config import load_config
    from megaswift.weights.hf.read import HFCheckpoint

    folder = tiny_folders("llama", tie_word_embeddings=False)[0]
    narrow = mixed(folder, tmp_path / "bf16", lambda _: torch.bfloat16)
    reader, config = Reader(there(narrow, tmp_path / "m") / "release"), load_config(folder)
    precisions = Precisions(torch.bfloat16)
    assert verify_written(HFCheckpoint.open(narrow), reader, config, precisions) == 39
    tensors = load_file(narrow / "model.safetensors")
    save_file(tensors | {NORM: tensors[NORM].float()}, narrow / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="is not the one in the Megatron checkpoint") as caught:
        verify_written(HFCheckpoint.open(narrow), reader, config, precisions)
    assert caught.value.where == NORM
