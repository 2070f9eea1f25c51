"""`swift infer` and `swift eval` on what is broken: typed errors or bounded answers, and what was answered is never lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megaswift.cli import main
from megaswift.commands.eval import eval_main
from megaswift.commands.infer import infer_main
from megaswift.inference.options import Answer
from megaswift.inference.transformers_backend import TransformersBackend
from tests.faults import table
from tests.inference.conftest import make_model_dir

QUESTIONS = [{"query": f"question {number}"} for number in range(80)]
CHOICES = [{"query": f"Question: is {k} even?", "choices": ["yes", "no"], "gold": k % 2} for k in range(80)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("answers") / "tiny-chat", context=256)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, rows in (("questions.jsonl", QUESTIONS), ("arc_challenge.jsonl", CHOICES)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def infer(model: Path, files: Path, name: str = "questions.jsonl") -> list[str]:
    return [
        "infer", "--ckpt_dir", str(model), "--val_dataset", str(files / name), "--show_dataset_sample", "-1", "--max_new_tokens", "8",
        "--temperature", "0", "--result_dir", str(files / "results"), "--resume_result", "true",
    ]  # fmt: skip


def evaluate(model: Path, files: Path) -> list[str]:
    return [
        "eval", "--ckpt_dir", str(model), "--eval_data_dir", str(files), "--eval_dataset", "arc", "--eval_output_dir", str(files / "out"),
        "--max_new_tokens", "8", "--eval_batch_size", "1", "--eval_use_cache", "true",
    ]  # fmt: skip


def kill_after(rows: int, words: list[str], place: Path, pattern: str) -> int:
    """Run a command in its own process and end it by SIGKILL once it has written some rows; how many it had."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megaswift", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):  # renamed while it was looked at
            if sum(file.read_bytes().count(b"\n") for file in place.rglob(pattern)) >= rows:
                break
        assert process.poll() is None, "it ended too early"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return sum(file.read_bytes().count(b"\n") for file in place.rglob(pattern))


def test_a_killed_infer_keeps_its_answers_and_goes_on(model: Path, files: Path) -> None:
    done = kill_after(5, infer(model, files), files / "results", "*.jsonl")
    assert 5 <= done < len(QUESTIONS)
    rows = infer_main(infer(model, files)[1:])
    [file] = (files / "results").glob("*.jsonl")
    assert [row["query"] for row in rows] == [row["query"] for row in QUESTIONS]
    assert [json.loads(line)["query"] for line in file.read_text(encoding="utf-8").splitlines()] == [
        row["query"] for row in QUESTIONS
    ]
    table.add("SIGKILL of swift infer", f"{done} of {len(QUESTIONS)} answers were on the disk", "--resume_result true answered the rest")  # fmt: skip


def test_a_killed_eval_keeps_its_answers_and_goes_on(model: Path, files: Path) -> None:
    done = kill_after(5, evaluate(model, files), files / "out", "answers.jsonl")
    [row] = eval_main(evaluate(model, files)[1:])
    details = row["details"]["arc"]
    assert len(CHOICES) - done - 1 <= details["asked_now"] <= len(CHOICES) - done + 1
    assert details["questions"] == len(CHOICES)
    for value in (row["weights_sha256"], details["questions_sha256"]):
        assert len(value) == 64
    assert row["seed"] == 42
    assert details["task_version"] is not None
    table.add("SIGKILL of swift eval", f"{done} of {len(CHOICES)} answers were on the disk", "--eval_use_cache true asked the rest")  # fmt: skip


def test_a_model_that_says_nothing(model: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty answers are answers: they are written, counted as unreadable, and the result is a number."""

    def nothing(self: Any, prompts: Any, options: Any, *, batch_size: int = 1) -> Iterator[tuple[int, Answer]]:
        for number, _ in enumerate(prompts):
            yield number, Answer("", 3, 0, "stop")

    monkeypatch.setattr(TransformersBackend, "answer_all", nothing)
    [row] = eval_main(evaluate(model, files)[1:])
    assert row["details"]["arc"]["unreadable"] == len(CHOICES)
    assert row["result"]["arc"] == 0


BROKEN = {
    "no json": "{", "empty": "", "a number": "3", "an empty list": "[]", "an entry that is no object": "[1]", "no name": '[{"pattern": "ceval", "dataset": "x"}]',
    "a name that is a number": '[{"name": 1, "pattern": "ceval", "dataset": "x"}]', "an unknown pattern": '[{"name": "a", "pattern": "z", "dataset": "x"}]',
    "no directory": '[{"name": "a", "pattern": "ceval", "dataset": "absent"}]', "subsets as text": '[{"name": "a", "pattern": "ceval", "dataset": ".", "subset_list": "x"}]',
    "a subset elsewhere": '[{"name": "a", "pattern": "general_qa", "dataset": ".", "subset_list": ["../secret"]}]', "deep": "[" * 100_000,
    "a name for a built-in": '[{"name": "mmlu", "pattern": "ceval", "dataset": "."}]', "NUL in a path": '[{"name": "a", "pattern": "ceval", "dataset": "a\\u0000b"}]',
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_own_benchmarks_that_are_broken(kind: str, model: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files.parent / "secret.jsonl").write_text('{"query": "q", "response": "the secret"}\n')
    (files / "own.json").write_text(BROKEN[kind], encoding="utf-8")
    words = ["eval", "--ckpt_dir", str(model), "--custom_eval_config", str(files / "own.json"), "--eval_dataset", "a", "--eval_output_dir", str(files / "out")]  # fmt: skip
    assert main(words) in (2, 3)
    said = capsys.readouterr().err
    assert said.count("error:") == 1, said
    assert "Traceback" not in said
    assert "the secret" not in said
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"{", b'{"query": ""}', b'{"messages": []}', b'{"query": {"a": 1}}', b"[1, 2]", b'{"query": "\\ud800"}', b"\0\0\0"],
    ids=repr,
)  # fmt: skip
def test_question_files_that_are_broken(content: bytes, model: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "bad.jsonl").write_bytes(content)
    assert main(infer(model, files, "bad.jsonl")) in (2, 3)
    said = capsys.readouterr().err
    assert said.count("error:") == 1, said
    assert "Traceback" not in said
    assert "bad.jsonl" in said
    assert not (files / "results").exists()


def test_prompts_beyond_the_context_and_answers_without_end(
    model: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The long one is left out and counted; the others end at the context, whatever --max_new_tokens asks for."""
    (files / "long.jsonl").write_text(json.dumps({"query": "x" * 4000}) + "\n" + json.dumps({"query": "hi"}) + "\n")
    words = infer(model, files, "long.jsonl")
    words[words.index("--max_new_tokens") + 1] = "100000"
    rows = infer_main(words[1:])
    assert [row["query"] for row in rows] == ["hi"]
    assert "1" in capsys.readouterr().err
