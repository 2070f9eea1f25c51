"""What is given in the place of a model is told as what it is, and a printed command can be pasted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megaswift.commands.data import data_main
from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments, InferArguments, InspectArguments, SftArguments, parse
from megaswift.errors import DataError, MegaswiftError, UserError
from megaswift.inference.model_ref import choose
from megaswift.models import parameters_of
from megaswift.run.source import resolve_source
from megaswift.terminal import typed
from megaswift.train.hf_copies import copy_now
from megaswift.weights.convert import check_megatron
from megaswift.weights.hf.config import load_config
from megaswift.weights.torch_dist.reader import Reader
from tests import tiny

WAYS: dict[str, Callable[[str], Any]] = {
    "export": lambda path: export_main(ExportArguments(model_id_or_path=path, to_megatron=True)),
    "export back": lambda path: export_main(ExportArguments(ckpt_dir=path, to_hf=True)),
    "sft from a model": lambda path: resolve_source(SftArguments(model_id_or_path=path)),
    "sft from weights": lambda path: resolve_source(SftArguments(resume_from_checkpoint=path, model_type="t")),
    "data": lambda path: data_main(InspectArguments(resume_from_checkpoint=path, dataset=["x"])),
    "infer": lambda path: choose(InferArguments(ckpt_dir=path)).locate(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["file", "folder", "folder with config"])
def test_a_gguf_is_told_as_that(way: str, form: str, tmp_path: Path) -> None:
    place = tmp_path / "llama-q4"
    place.mkdir()
    (place / "llama.Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(64))
    if form == "folder with config":
        (place / "config.json").write_text(json.dumps({"model_type": "llama"}))
    given = place / "llama.Q4_K_M.gguf" if form == "file" else place
    with pytest.raises(MegaswiftError) as error:
        WAYS[way](str(given))
    assert "gguf_file='llama.Q4_K_M.gguf'" in error.value.fix and "the model that it was made from" in error.value.fix


def test_an_output_layer_that_is_not_there(tiny_folders: Any, tmp_path: Path) -> None:
    """A tied model whose config.json lost the field, and the other way round, on both sides."""
    tied, tied_megatron = tiny_folders("llama", tie_word_embeddings=True)
    plain, plain_megatron = tiny_folders("llama", tie_word_embeddings=False)
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((tied / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(tied / "model.safetensors")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(DataError, match=r"lm_head.weight \[") as error:
        resolve_source(SftArguments(model_id_or_path=str(model), model_type="t"))
    assert "tie_word_embeddings" in error.value.fix
    tensors.pop("model.norm.weight")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(DataError, match="lm_head") as error:
        resolve_source(SftArguments(model_id_or_path=str(model), model_type="t"))
    assert "tie_word_embeddings" not in error.value.fix, "more is missing than that"
    for weights, other, words in ((tied_megatron, plain, "must be true"), (plain_megatron, tied, "must be false")):
        with pytest.raises(DataError, match="output_layer") as error:
            check_megatron(Reader(weights), parameters_of(load_config(other)))
        assert "tie_word_embeddings" in error.value.fix and words in error.value.fix


def test_a_path_as_a_word_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "two words", "it's", "$HOME", "a;b", "小黄", "[bold]x", "--verify"):
        assert shlex.split(typed(tmp_path / name)) in ([name], [f"./{name}"]), name
    assert typed(tmp_path / "plain") == "plain" and typed(tmp_path / "--verify") == "./--verify"


def test_the_next_command_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each export prints the next one, and from the one to the other goes what a shell makes of the line."""
    tiny.save_tiny(tmp_path / "hf", "llama")
    target = tmp_path / "it's a start"
    words = {"model_type": "t", "to_megatron": True, "verify": False, "megatron_output_dir": str(target)}
    export_main(ExportArguments(model_id_or_path=str(tmp_path / "hf"), **words))
    printed = capsys.readouterr().out.rpartition("Next: swift sft ")[2]
    assert parse(SftArguments, shlex.split(printed)).resume_from_checkpoint == str(target)
    back = export_main(ExportArguments(ckpt_dir=str(target), to_hf=True, verify=False))
    printed = capsys.readouterr().out.rpartition("Next: swift infer ")[2]
    assert parse(InferArguments, shlex.split(printed)).model_id_or_path == str(back)


def test_commands_in_errors_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "my run"
    (run / "v0" / "iter_0000001").mkdir(parents=True)
    (run / "v0" / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(UserError) as error:
        choose(InferArguments(ckpt_dir=str(run)))
    assert shlex.split(error.value.fix) == ["--ckpt_dir", str(run / "v0")]
    monkeypatch.setattr("megaswift.train.hf_copies.copy_command", lambda *_, **__: ["false"])
    with pytest.raises(DataError) as failed:
        copy_now(run, 3)
    assert parse(ExportArguments, shlex.split(failed.value.fix.rpartition("swift export ")[2])).ckpt_dir == str(run)
