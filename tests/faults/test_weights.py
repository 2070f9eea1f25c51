"""Weights that must not pass silently: NaN and infinity by name, and pickles, of which nothing but tensors is ever read."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments, InferArguments, SftArguments
from megaswift.errors import DataError, MegaswiftError, UserError
from megaswift.inference.model_ref import choose
from megaswift.run.source import resolve_source
from megaswift.weights.hf.pickled import read_pickle
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader
from tests import tiny
from tests.checkpoint.test_guard import Dotted, Payload

BAD = [
    ("model.embed_tokens.weight", math.nan),
    ("model.layers.1.self_attn.k_proj.weight", math.inf),
    ("model.layers.3.mlp.up_proj.weight", -math.inf),
    ("model.layers.0.input_layernorm.weight", math.nan),
    ("lm_head.weight", math.nan),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "hf"
    tiny.save_tiny(folder, "llama", vocab_size=300, eos_token_id=1, pad_token_id=2, tie_word_embeddings=False)
    tiny.write_tokenizer(folder)
    return folder


def there(folder: Path, target: Path, **more: Any) -> Path:
    return export_main(
        ExportArguments(
            to_megatron=True,
            model_type="t",
            model_id_or_path=str(folder),
            megatron_output_dir=str(target),
            verify=False,
            **more,
        )
    )


def with_value(good: Path, target: Path, name: str, value: float) -> Path:
    """A copy of the folder with one value of one tensor replaced."""
    shutil.copytree(good, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_source_that_is_not_finite_is_refused_by_name(name: str, value: float, good: Path, tmp_path: Path) -> None:
    folder = with_value(good, tmp_path / "hf", name, value)
    with pytest.raises(DataError, match=f"tensor {name} has NaN or infinite values") as caught:
        there(folder, tmp_path / "out")
    assert "--allow_nonfinite true" in caught.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(("name", "value"), BAD[1:3])
def test_a_checkpoint_that_is_not_finite_is_refused_and_may_be_forced(
    name: str, value: float, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There and back with --allow_nonfinite true every bit is kept, and the tensors are named; without it nothing is made."""
    folder = with_value(good, tmp_path / "hf", name, value)
    export_main(
        ExportArguments(
            to_megatron=True, model_type="t", model_id_or_path=str(folder), megatron_output_dir=str(tmp_path / "m"), allow_nonfinite=True
        )
    )  # fmt: skip
    assert name in capsys.readouterr().out.replace("\n", "")
    back = {"to_hf": True, "ckpt_dir": str(tmp_path / "m"), "hf_output_dir": str(tmp_path / "back")}
    with pytest.raises(DataError, match=f"tensor {name} has NaN or infinite values"):
        export_main(ExportArguments(**back))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m"]
    export_main(ExportArguments(**back, allow_nonfinite=True))
    assert name in capsys.readouterr().out.replace("\n", "")
    first, last = HFCheckpoint.open(folder), HFCheckpoint.open(tmp_path / "back")
    for tensor in first.names:
        assert torch.equal(first.tensor(tensor).view(torch.int32), last.tensor(tensor).view(torch.int32)), tensor
    manifest = json.loads((tmp_path / "back" / "manifest.json").read_text())
    assert manifest["verified"] == {"round_trip_tensors": len(first.names)}


def test_values_that_half_precision_cannot_hold(good: Path, tmp_path: Path) -> None:
    folder = with_value(good, tmp_path / "hf", BAD[1][0], 1e6)
    there(folder, tmp_path / "bf16", dtype="bf16")
    with pytest.raises(DataError, match=BAD[1][0]):
        there(folder, tmp_path / "fp16", dtype="fp16")


def test_what_is_kept_unread_cannot_be_judged() -> None:
    with pytest.raises(UserError, match="--allow_nonfinite"):
        export_main(ExportArguments(to_megatron=True, allow_nonfinite=True, resume=True))


def pickled(good: Path, target: Path, content: Any = None, **save: Any) -> Path:
    """The folder with pytorch_model.bin in place of safetensors."""
    shutil.copytree(good, target)
    (target / "model.safetensors").unlink()
    torch.save(load_file(good / "model.safetensors") if content is None else content, target / "pytorch_model.bin", **save)
    return target


def test_pickles_are_refused_everywhere_and_read_only_when_asked_for(good: Path, tmp_path: Path) -> None:
    folder = pickled(good, tmp_path / "hf")
    for attempt in (
        lambda: there(folder, tmp_path / "no"),
        lambda: resolve_source(SftArguments(model_type="t", model_id_or_path=str(folder))),
        lambda: choose(InferArguments(model_type="t", model_id_or_path=str(folder))).locate(),
    ):
        with pytest.raises(DataError, match=r"the weights are pickles \(pytorch_model.bin\)") as caught:
            attempt()
        assert "--allow_pickle true" in caught.value.fix
    export_main(
        ExportArguments(
            to_megatron=True, model_type="t", model_id_or_path=str(folder), megatron_output_dir=str(tmp_path / "m"), allow_pickle=True
        )
    )  # fmt: skip
    plain = there(good, tmp_path / "plain")
    ours, theirs = Reader(tmp_path / "m" / "release"), Reader(plain / "release")
    assert set(ours.keys) == set(theirs.keys)
    assert all(torch.equal(ours.read(key), theirs.read(key)) for key in ours.keys)
    assert not list((tmp_path / "m").rglob("*.bin")), "the pickle does not travel on"


def test_shards_halves_and_shared_storages(good: Path, tmp_path: Path) -> None:
    """An index with several files; parameters, as a module has them; a tied tensor that is stored once; bf16."""
    tensors: dict[str, Any] = {name: value.bfloat16() for name, value in load_file(good / "model.safetensors").items()}
    tensors["model.norm.weight"] = torch.nn.Parameter(tensors["model.norm.weight"])
    names = sorted(tensors)
    folder = shutil.copytree(good, tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    source = HFCheckpoint.open(folder, allow_pickle=True)
    assert sorted(source.names) == names
    assert all(torch.equal(source.tensor(name), tensors[name]) for name in names)
    there(folder, tmp_path / "m", allow_pickle=True)
    shared = torch.arange(12.0)
    torch.save({"a": shared.view(3, 4), "b": shared[4:8], "c": torch.zeros(0)}, tmp_path / "x.bin")
    found = {entry.name: entry for entry in read_pickle(tmp_path / "x.bin")}
    assert (found["a"].shape, found["b"].start - found["a"].start, found["c"].nbytes) == ((3, 4), 16, 0)


def test_a_pickled_tensor_stays_within_its_storage(tmp_path: Path) -> None:
    short = torch.arange(8.0)
    short.untyped_storage().resize_(16)  # four of its eight numbers
    torch.save({"first": torch.arange(8.0), "second": short, "third": torch.arange(8.0)}, tmp_path / "x.bin")
    with pytest.raises(DataError, match="tensor 'second' reaches beyond its storage"):
        read_pickle(tmp_path / "x.bin")


class Plain:
    """An object of a class of ours."""


@pytest.mark.parametrize("kind", ["payload", "payload in a tensor's place", "eval", "object", "nested", "transposed", "number", "old format", "raw pickle", "cut", "page", "empty"])  # fmt: skip
def test_a_pickle_with_anything_else_in_it_is_refused_and_runs_nothing(kind: str, good: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    tensors: dict[str, Any] = load_file(good / "model.safetensors")
    name = "model.norm.weight"
    content: Any = {
        "payload": Payload(marker),
        "payload in a tensor's place": tensors | {name: Payload(marker)},
        "eval": [Dotted(marker)],
        "object": tensors | {name: Plain()},
        "nested": {"state_dict": tensors},
        "transposed": tensors | {"lm_head.weight": tensors["lm_head.weight"].T},
        "number": tensors | {"step": 3},
    }.get(kind, tensors)
    folder = pickled(good, tmp_path / "hf", content, _use_new_zipfile_serialization=kind != "old format")
    file = folder / "pytorch_model.bin"
    if kind == "raw pickle":
        file.write_bytes(pickle.dumps(Payload(marker)))
    elif kind == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif kind in ("page", "empty"):
        file.write_text("<html></html>" if kind == "page" else "")
    with pytest.raises(DataError, match="pytorch_model.bin is damaged or not safe to read") as caught:
        there(folder, tmp_path / "out", allow_pickle=True)
    assert caught.value.exit_code == 3
    assert str(file) in caught.value.where
    assert not marker.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd.bin", "a\\b.bin", "x\0.bin", ".x.bin", "x.safetensors", 3])
def test_the_index_of_pickles_stays_in_its_folder(name: Any, good: Path, tmp_path: Path) -> None:
    folder = pickled(good, tmp_path / "hf")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(DataError, match="only .bin files of this directory are read"):
        HFCheckpoint.open(folder, allow_pickle=True)
    (folder / "pytorch_model.bin.index.json").unlink()
    shutil.move(folder / "pytorch_model.bin", tmp_path / "outside.bin")
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(MegaswiftError, match="is a link out of the model directory"):
        HFCheckpoint.open(folder, allow_pickle=True)
