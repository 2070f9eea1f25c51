"""`swift data --rlhf_type` shows both sides of pairs, labels of answers, and the one token that a reward model scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaswift.commands.data import data_main
from megaswift.errors import UserError
from tests import tiny
from tests.rlhf.pairs import write_labelled, write_pairs
from tests.rlhf.scored import write_classes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    tiny.save_tiny(folder, "qwen2", vocab_size=300, eos_token_id=1, pad_token_id=2)
    tiny.write_tokenizer(folder)
    return ["--model_id_or_path", str(folder), "--model_type", "tiny-chat", "--dataset_test_ratio", "0"]


def test_pairs_are_shown_side_by_side(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", 12)
    with rows.open("a") as file:
        file.write(json.dumps({"query": "a", "response": "b", "rejected_response": "b"}) + "\n")
        file.write(json.dumps({"query": "a", "response": "b"}) + "\n")
    found = data_main(
        [*model, "--dataset", str(rows), "--rlhf_type", "dpo", "--examples", "2", "--output", str(tmp_path / "page")]
    )
    shown = capsys.readouterr().out
    assert found.titles == ["Pair 1, chosen", "Pair 1, rejected", "Pair 2, chosen", "Pair 2, rejected"]
    assert all(f"{title}; loss is on" in shown for title in found.titles)
    (chosen, rejected) = found.shown[:2]
    assert chosen[0] == rejected[0] and chosen[1] != rejected[1] and chosen[1][1] == rejected[1][1] == 1.0
    assert (
        "dropped 1: chosen equal to rejected" in shown and "dropped 1: no rejected answer" in shown and "rows.jsonl:13" in shown
    )
    assert "pairs: 12; the chosen answer is the longer one in" in shown and "2 rows were dropped" in shown
    assert found.beside is not None and found.beside.shape == (12, 2)
    assert "Pair 2, rejected" in (tmp_path / "page" / "index.html").read_text()


def test_a_reward_model_scores_one_token(model: list[str], tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", 6)
    found = data_main([*model, "--dataset", str(rows), "--rlhf_type", "rm", "--examples", "1"])
    assert [[weight for _, weight in sample] for sample in found.shown] == [[0.0, 1.0]] * 2
    assert found.data.report.supervised == 12
    assert {sample[-1][0] for sample in found.shown} == {"<|im_end|>"}


def test_labels_are_shown(model: list[str], tmp_path: Path) -> None:
    found = data_main(
        [*model, "--dataset", str(write_labelled(tmp_path / "rows.jsonl", 6)), "--rlhf_type", "kto", "--examples", "6"]
    )
    assert [title.split(", ")[1] for title in found.titles] == [
        "desirable",
        "undesirable",
        "desirable",
    ] * 2 and found.beside is None
    rows = write_classes(tmp_path / "classes.jsonl", lambda k: k % 3, 8)
    found = data_main([*model, "--dataset", str(rows), "--task_type", "seq_cls", "--num_labels", "3", "--examples", "1"])
    assert found.data.report.supervised == 8
    with pytest.raises(UserError, match="needs the number of classes"):
        data_main([*model, "--dataset", str(rows), "--task_type", "seq_cls"])
