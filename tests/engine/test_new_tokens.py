"""Training with new special tokens from weights without rows for them, at any layout; and no id outside the table is looked up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaswift.commands.data import data_main
from megaswift.commands.export import export_main
from megaswift.commands.parity import parity_main
from megaswift.config.options import ExportArguments, InspectArguments, ParityArguments
from megaswift.data.store import RowWriter, TokenRows
from megaswift.errors import DataError, UserError
from megaswift.run.spec import Run
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.tokenizer import load_tokenizer
from megaswift.weights.torch_dist.reader import Reader
from tests import tiny
from tests.ranks import RankFailed, RankPool
from tests.runs import changed
from tests.training import run_job, train, write_rows

OWN = 277  # tokens of the tiny tokenizer
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bool, Path]]:
    """Rows, and a chat model without rows for new tokens, as Megatron weights: untied and tied."""
    root, made = tmp_path_factory.mktemp("starts"), {}
    for tied in (False, True):
        folder = root / f"hf-{tied}"
        tiny.save_tiny(folder, "llama", vocab_size=OWN, eos_token_id=1, pad_token_id=2, tie_word_embeddings=tied)
        tiny.write_tokenizer(folder)
        words = {
            "model_type": "tiny-chat",
            "to_megatron": True,
            "verify": False,
            "megatron_output_dir": str(root / f"mg-{tied}"),
        }
        made[tied] = export_main(ExportArguments(model_id_or_path=str(folder), **words))
    return write_rows(root / "rows.jsonl", 24), made


def options(rows: Path, start: Path, **more: Any) -> dict[str, Any]:
    given = {"resume_from_checkpoint": str(start)} if (start / "release").exists() else {"model_id_or_path": str(start)}
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 1, "dataset_test_ratio": 0.0, "model_type": "tiny-chat"}
    return {"dataset": [str(rows)], "new_special_tokens": ["<a>", "<b>", "<c>"], **given, **still, **more}


@pytest.mark.parametrize(("tied", "folder", "tp", "pp"), [(False, False, 2, 1), (True, True, 1, 2), (False, False, 1, 2)])
def test_rows_grow_on_every_layout(
    tied: bool, folder: bool, tp: int, pp: int, starts: tuple[Path, dict[bool, Path]], pool: RankPool, tmp_path: Path
) -> None:
    """Without a change by training, every table is the old rows and their mean, also where the vocabulary is padded for tp."""
    rows, made = starts
    start = made[tied].parent / f"hf-{tied}" if folder else made[tied]
    run = train(pool, tmp_path, tp * pp, **options(rows, start, tp=tp, pp=pp))
    assert all(np.isfinite(run.losses))
    old, new = Reader(made[tied] / "release"), Reader(run.directory / "iter_0000001")
    for key in TABLES[: 1 if tied else 2]:
        before, after = old.read(key), new.read(key)
        mean = before.double().mean(dim=0).float()
        assert after.shape[0] == OWN + 3, key  # 280: even, so tp 2 pads nothing
        assert torch.equal(after[:OWN], before) and torch.equal(after[OWN:], mean.expand(3, -1)), key
    assert load_config(run.directory).vocab_size == OWN + 3
    assert load_tokenizer(run.directory).convert_tokens_to_ids(["<a>", "<b>", "<c>"]) == [OWN, OWN + 1, OWN + 2]


def test_a_run_with_new_tokens_goes_on_and_is_exported(
    starts: tuple[Path, dict[bool, Path]], pool: RankPool, tmp_path: Path
) -> None:
    """From the folder of Hugging Face, with an odd table at tp 2; requeued by the same command; then as a model again."""
    rows, made = starts
    folder = made[False].parent / "hf-False"
    words = options(rows, folder, new_special_tokens=["<a>", "<b>"], learning_rate=1e-3, max_steps=2, save_steps=1, resume=True)
    run = train(pool, tmp_path, 2, tp=2, **words)
    assert json.loads((run.directory / "sft_args.json").read_text())["new_special_tokens"] == ["<a>", "<b>"]
    manifest = json.loads((run.directory / "iter_0000002" / "manifest.json").read_text())
    assert manifest["rows_before"] == OWN and manifest["config"]["vocab_size"] == OWN + 2
    on = train(pool, tmp_path, 1, tp=1, **words | {"max_steps": 3, "allow_data_change": True})
    assert on.directory == run.directory and len(on.losses) == 3
    assert json.loads((run.directory / "iter_0000003" / "manifest.json").read_text())["rows_before"] == OWN
    with pytest.raises(UserError, match="began without the special tokens .*<z>"):
        train(pool, tmp_path, 1, tp=1, **words | {"new_special_tokens": ["<z>"]})
    model = export_main(ExportArguments(ckpt_dir=str(run.directory), to_hf=True))
    assert load_config(model).vocab_size == OWN + 2 and len(load_tokenizer(model)) == OWN + 2


def test_ids_beyond_the_table_are_refused_before_any_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the row that uses one; by the tokenizer where none does; and not with the option."""
    folder, rows = tmp_path / "hf", tmp_path / "rows.jsonl"
    tiny.save_tiny(folder, "llama", vocab_size=OWN, eos_token_id=1, pad_token_id=2)
    tiny.write_tokenizer(folder)
    tiny.add_tokens(folder, "<a>", "<b>")
    texts = ["who are you"] * 4 + ["at <b> now"] + ["who"] * 4
    rows.write_text("".join(json.dumps({"query": "q", "response": text}) + "\n" for text in texts))
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"query": "q", "response": "who are you"}) + "\n" for _ in range(4)))
    words: dict[str, Any] = {"model_id_or_path": str(folder), "model_type": "tiny-chat", "dataset_test_ratio": 0.0}

    def look(file: Path, **more: Any) -> None:
        data_main(InspectArguments(dataset=[str(file)], **words, **more))

    for more in (
        {},
        {"packing": True, "max_length": 64},
        {"streaming": True, "max_steps": 1, "gradient_accumulation_steps": 9},
    ):
        with pytest.raises(DataError, match=r"this row has a token without .*'<b>' \(278\)") as error:
            look(rows, **more)
        assert error.value.where.endswith("rows.jsonl:5") or (more.get("streaming") and error.value.where.endswith("row 5"))
    with pytest.raises(DataError, match=r"the tokenizer has 2 tokens without .*'<a>' \(277\)"):
        look(plain)
    with pytest.raises(DataError, match=r"'<b>' \(278\)"):
        train(None, tmp_path / "out", 2, dataset=[str(rows)], tp=2, **words)  # type: ignore[arg-type]
    assert not list((tmp_path / "out").rglob("run.json"))
    look(rows, new_special_tokens=["<a>", "<b>"])
    assert "grows from 277 to 279 rows" in capsys.readouterr().out
    with pytest.raises(UserError, match="without rows for new tokens"):
        parity_main(ParityArguments(dataset=[str(rows)], new_special_tokens=["<a>"], **words))


def test_ranks_refuse_what_reached_them(starts: tuple[Path, dict[bool, Path]], pool: RankPool, tmp_path: Path) -> None:
    """Two gloo ranks at tp 2: each would take the id for the other's, and train on a vector of zeros."""
    rows, made = starts
    run = train(pool, tmp_path, 2, tp=2, **options(rows, made[False], new_special_tokens=[], dataset_test_ratio=0.1))
    writer = RowWriter(tmp_path / "bad")
    for _ in range(16):
        writer.add(np.array([0, 5, OWN, 1], np.int32), np.array([False, True, True, True]), [4])
    writer.finish(np.arange(16), None)
    bad, path = str(tmp_path / "bad"), run.directory / "run.json"
    job = Run.read(path)
    assert TokenRows.open(bad).largest_id == OWN > TokenRows.open(job.data.train).largest_id
    for change in ({"train": bad}, {"val": bad}, {"pad_id": OWN}):
        changed(job, **change).write(path)
        with pytest.raises(RankFailed, match=rf"DataError: the data has the token id {OWN}, and .* embedding has {OWN} rows"):
            pool.run(2, run_job, str(path))
