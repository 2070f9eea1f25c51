"""`swift data`: figures, histogram, examples and the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_chats import tokenizer_of
from transformers import LlamaConfig

from megaswift.commands import data as inspect_data
from megaswift.commands.data import data_main, histogram
from megaswift.errors import UserError


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with nothing but a config and a tokenizer."""
    LlamaConfig(vocab_size=49152, max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    tokenizer_of("smollm2").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(inspect_data, "model_directory", lambda args: tmp_path / "model")


def test_the_whole_verb(
    model: None, jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")  # a cluster sets it in each of its machines; nothing is started here
    rows = [{"query": f"q <b> {k % 40}", "response": "a & b " * (1 + k % 7 % 3)} for k in range(50)]
    path = jsonl([*rows, "broken <row>"])
    words = [
        "--dataset",
        path,
        "--dataset_test_ratio",
        "0",
        "--output",
        str(tmp_path / "page"),
        "--examples",
        "2",
        "--batch_size",
        "4",
    ]
    inspection = data_main(words)
    shown = capsys.readouterr().out
    assert inspection.duplicates == len(rows) - len({(row["query"], row["response"]) for row in rows})
    assert inspection.fill is not None and 0 < inspection.fill <= 1 and 0 < inspection.padding < 1
    assert "rows.jsonl:51" in shown and shown.count("[[") == 4 and "packing to 2,048 tokens fills" in shown
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert page.count("<mark>") == 3 and "q &lt;b&gt;" in page and "<b>" not in page and "a &amp; b" in page
    assert (tmp_path / "page" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_weights_stand_before_their_text(
    model: None, jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text('{"Action:": [2, 0.5]}', encoding="utf-8")
    path = jsonl([{"query": "q", "response": "so Action: go"}])
    data_main(["--dataset", path, "--dataset_test_ratio", "0", "--loss_scale", str(rules), "--output", str(tmp_path / "page")])
    shown = capsys.readouterr().out
    assert "[[so ]](2 x)[[Action:]](0.5 x)[[ go]][[<|im_end|>]]" in shown and "bring weights of their own: " in shown
    assert "<mark><b>2 x </b>Action:</mark>" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")


def test_streamed_data_are_the_rows_that_training_reads(
    model: None, jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl([{"query": f"q{k}", "response": "a"} for k in range(3000)])
    words = ["--dataset", path, "--streaming", "true", "--gradient_accumulation_steps", "4", "--batch_size", "2"]
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    found = data_main([*words, "--max_steps", "3"]).data
    assert len(found.train) == 3 * 4 * 2 * 2 and found.val is None
    assert found.report.datasets[0].rows < 3000
    with pytest.raises(UserError, match="number of steps must be given"):
        data_main(words)


def test_rows_that_training_leaves_out_are_left_out_here_too(
    model: None, jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaConfig(vocab_size=49152, max_position_embeddings=64).save_pretrained(tmp_path / "model")
    path = jsonl([{"query": "q", "response": "a"}, {"query": "q", "response": "word " * 60}])
    for words in (["--max_length", "-1"], []):  # the default of 2048 becomes the model's limit too
        found = data_main(["--dataset", path, "--dataset_test_ratio", "0", *words])
        assert len(found.data.train) == 1
        assert "1 rows longer than 64 tokens, left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="beyond the model's 64 tokens"):
        data_main(["--dataset", path, "--max_length", "65"])


def test_histogram() -> None:
    sizes = np.array([1, 2, 3, 160, 160])
    bars = histogram(sizes)
    assert bars[0] == (1, 10, 3) and bars[-1] == (151, 160, 2) and sum(count for _, _, count in bars) == 5
    assert histogram(np.array([3])) == [(1, 1, 0), (2, 2, 0), (3, 3, 1)]


def test_options_that_cannot_work(model: None, jsonl: Callable[..., str], tmp_path: Path) -> None:
    path = jsonl([{"query": "q", "response": "a"}])
    with pytest.raises(UserError, match="--examples -1 is not 0 or more"):
        data_main(["--dataset", path, "--examples", "-1"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="page cannot be written"):
        data_main(["--dataset", path, "--output", str(tmp_path / "file" / "page")])


def test_where_the_tokenizer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not a directory of Megatron weights"):
        data_main(["--resume_from_checkpoint", "none", "--dataset", "self-cognition"])
    with pytest.raises(UserError, match="no model is named"):
        data_main(["--dataset", "self-cognition"])
