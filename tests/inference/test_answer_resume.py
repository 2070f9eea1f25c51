"""A half-done results file goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaswift.commands.infer import infer_main

QUESTIONS = [f"question {number}" for number in range(5)]


@pytest.fixture
def words(model_dir: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": text}) + "\n" for text in QUESTIONS))
    return ["--ckpt_dir", str(model_dir), "--val_dataset", str(tmp_path / "q.jsonl"), "--result_dir", str(tmp_path / "results"),
            "--max_new_tokens", "4", "--temperature", "1"]  # fmt: skip


@pytest.mark.parametrize("batch", [["--infer_batch_size", "2", "--stream", "false"], []], ids=["batches", "stream"])
def test_the_rest_is_answered_as_it_would_have_been(words: list[str], batch: list[str], tmp_path: Path, capsys) -> None:
    whole = infer_main([*words, *batch])
    [file] = (tmp_path / "results").glob("*.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:7], encoding="utf-8")
    capsys.readouterr()
    rows = infer_main([*words, *batch, "--resume_result", "true"])
    assert "2 of 5 questions are answered already" in capsys.readouterr().err
    assert [row["query"] for row in rows] == QUESTIONS
    assert [row["response"] for row in rows] == [row["response"] for row in whole]
    assert file.read_text(encoding="utf-8").splitlines(keepends=True) == lines
    assert infer_main([*words, *batch, "--resume_result", "true"]) == rows


def test_other_questions_begin_a_new_file(words: list[str], tmp_path: Path) -> None:
    infer_main(words)
    (tmp_path / "q.jsonl").write_text('{"query": "another"}\n')
    infer_main([*words, "--resume_result", "true"])
    assert len(list((tmp_path / "results").glob("*.jsonl"))) == 2
