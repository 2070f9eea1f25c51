"""Rows for new special tokens in a conversion: the old ones bit for bit, the new ones their mean, and all of it in the exported model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.convert.test_classic import write_classic

from megaswift.commands.export import export_main
from megaswift.commands.verify import verify_main
from megaswift.config.options import ExportArguments, VerifyArguments
from megaswift.errors import DataError, UserError
from megaswift.inference.loading import load_model, load_tokenizer
from megaswift.weights.convert import Precisions
from megaswift.weights.convert.new_rows import GrownReader, require_old_rows
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader

OWN = 277  # tokens of the tiny tokenizer
FP32 = Precisions(torch.float32)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def chat_model(folder: Path, rows: int = OWN, **changes: Any) -> Any:
    """A tiny chat model whose embedding has a row for each of its tokens."""
    model = tiny.save_tiny(folder, "llama", vocab_size=rows, eos_token_id=1, pad_token_id=2, **changes)
    tiny.write_tokenizer(folder)
    return model


def convert(folder: Path, target: Path, **more: Any) -> Path:
    words = {"model_type": "tiny-chat", "to_megatron": True, "megatron_output_dir": str(target), **more}
    return export_main(ExportArguments(model_id_or_path=str(folder), **words))


@pytest.mark.parametrize(("tied", "dtype"), [(False, "fp32"), (True, "bf16")])
def test_the_way_there_and_back(tied: bool, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(tmp_path / "hf", tie_word_embeddings=tied)
    old = load_file(tmp_path / "hf" / "model.safetensors")
    start = convert(tmp_path / "hf", tmp_path / "start", new_special_tokens=["<a>", "<b>"], dtype=dtype, tp=2, verify=not tied)
    out = capsys.readouterr().out
    assert "grows from 277 to 279 rows" in out
    assert tied or "embedding and output layer: the 277 old rows are those of the source, bit for bit" in out
    manifest = json.loads((start / "release" / "manifest.json").read_text())
    assert manifest["new_tokens"] == {"tokens": {"<a>": OWN, "<b>": OWN + 1}, "rows_before": OWN, "rows": OWN + 2}
    assert tied or manifest["verified"]["old_rows_equal"] == OWN
    assert json.loads((start / "export_args.json").read_text())["new_special_tokens"] == ["<a>", "<b>"]
    back = export_main(ExportArguments(ckpt_dir=str(start), to_hf=True, verify=False))
    verify_main(VerifyArguments(directory=str(back), deep=True))
    new = load_file(back / "model.safetensors")
    assert set(new) == set(old)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for name, value in new.items():
        source = old[name]
        assert torch.equal(value[: len(source)], source.to(precision)), name
        if name in (EMBEDDING, OUTPUT):
            mean = source.double().mean(dim=0).float().to(precision)
            assert value.shape[0] == OWN + 2 and torch.equal(value[OWN:], mean.expand(2, -1)), name
    model, tokenizer = load_model(back, "fp32"), load_tokenizer(back)
    ids = tokenizer("<a>x<b>", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert ids[0, 0] == OWN and ids[0, -1] == OWN + 1 and model.config.vocab_size == OWN + 2
    assert torch.isfinite(model(ids.to(model.device)).logits).all()


def test_tokens_that_only_the_tokenizer_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused in both directions, with what to do; with the option the same folder is converted."""
    chat_model(tmp_path / "hf")
    good = convert(tmp_path / "hf", tmp_path / "good", verify=False)
    tiny.add_tokens(tmp_path / "hf", "<a>", "<b>")
    with pytest.raises(DataError, match=r"'<a>' \(277\), '<b>' \(278\)") as error:
        convert(tmp_path / "hf", tmp_path / "start", verify=False)
    assert "--new_special_tokens" in error.value.fix and not (tmp_path / "start").exists()
    shutil.copy(tmp_path / "hf" / "tokenizer.json", good)
    with pytest.raises(DataError, match=r"'<a>' \(277\)"):
        export_main(ExportArguments(ckpt_dir=str(good), to_hf=True, verify=False))
    start = convert(tmp_path / "hf", tmp_path / "start", verify=False, new_special_tokens=["<a>"])
    assert "get rows too: <b>" in capsys.readouterr().out
    assert load_config(start).vocab_size == OWN + 2 == Reader(start / "release").shape("embedding.word_embeddings.weight")[0]


def test_spare_rows_are_used_and_stay(tmp_path: Path) -> None:
    chat_model(tmp_path / "hf", rows=300)
    plain = convert(tmp_path / "hf", tmp_path / "plain", verify=False)
    start = convert(tmp_path / "hf", tmp_path / "start", verify=False, new_special_tokens=["<a>"])
    one, other = (Reader(place / "release").read("embedding.word_embeddings.weight") for place in (plain, start))
    assert torch.equal(one, other) and load_config(start).vocab_size == 300
    assert load_tokenizer(start).convert_tokens_to_ids("<a>") == OWN
    assert (plain / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


def test_a_classic_checkpoint_grows_too(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "hf", rows=278, tie_word_embeddings=False)
    tiny.add_tokens(tmp_path / "hf", "<x>")
    old = write_classic(tmp_path / "old", model, 2, 1)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tmp_path / "hf" / name, old)
    words = {"to_megatron": True, "model_type": "t", "megatron_output_dir": str(tmp_path / "start")}
    start = export_main(ExportArguments(ckpt_dir=str(old), new_special_tokens=["<a>", "<b>"], **words))
    for key, value in (("embedding.word_embeddings.weight", model.model.embed_tokens.weight), ("output_layer.weight", model.lm_head.weight)):  # fmt: skip
        found, source = Reader(start / "release").read(key), value.detach()
        assert found.shape[0] == 280 and torch.equal(found[:278], source)
        assert torch.equal(found[278:], source.double().mean(dim=0).float().expand(2, -1))


def test_old_rows_that_changed_are_seen(tmp_path: Path) -> None:
    """The check itself: a row of the source that the checkpoint does not have, in a folder and in Megatron weights."""
    chat_model(tmp_path / "hf", tie_word_embeddings=False)
    start = convert(tmp_path / "hf", tmp_path / "start", verify=False, new_special_tokens=["<a>"])
    written, config, source = Reader(start / "release"), load_config(start), HFCheckpoint.open(tmp_path / "hf")
    require_old_rows(written, source, config, FP32, OWN)
    require_old_rows(GrownReader(written, config, OWN, OWN + 5), written, config, FP32, OWN)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for name in (EMBEDDING, OUTPUT):
        wrong = HFCheckpoint.open(tmp_path / "hf")
        changed = tensors[name].clone()
        changed[-1, -1] += 1
        wrong.tensor = lambda asked, name=name, changed=changed: changed if asked == name else tensors[asked]  # type: ignore[method-assign]
        with pytest.raises(DataError, match="a row of an old token") as error:
            require_old_rows(written, wrong, config, FP32, OWN)
        assert error.value.where == name


def test_where_the_option_has_no_meaning(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="on the way to Megatron weights"):
        export_main(ExportArguments(ckpt_dir=str(tmp_path), to_hf=True, new_special_tokens=["<a>"]))


@pytest.mark.parametrize("left", ["tokenizer_config.json", ""])
def test_a_tokenizer_that_did_not_arrive(left: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of it is an error, in both directions; none at all may come later, and is told."""
    chat_model(tmp_path / "hf")
    start = convert(tmp_path / "hf", tmp_path / "start", verify=False)
    for place in (tmp_path / "hf", start):
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if file != left:
                (place / file).unlink()
    capsys.readouterr()
    ways = (
        lambda: convert(tmp_path / "hf", tmp_path / "other", verify=False),
        lambda: export_main(ExportArguments(ckpt_dir=str(start), to_hf=True, verify=False)),
    )
    for way in ways:
        if left:
            with pytest.raises(DataError, match="tokenizer.json is not there"):
                way()
        else:
            way()
            assert "no tokenizer in" in capsys.readouterr().out
