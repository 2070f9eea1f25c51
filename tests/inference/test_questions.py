"""Files of questions: every shape, bad rows, labels, and answers in order whatever the batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaswift.config.options import InferArguments
from megaswift.data.conversation import BadRow
from megaswift.errors import DataError
from megaswift.inference.options import GenerationOptions
from megaswift.inference.questions import answer_questions, question_of, read_questions
from megaswift.inference.results import ResultWriter

SHORT = GenerationOptions(max_new_tokens=6, temperature=0)


@pytest.mark.parametrize(
    ("row", "query", "label", "system", "history"),
    [
        ({"query": "q"}, "q", None, None, []),
        ({"query": "q", "response": ""}, "q", None, None, []),
        ({"query": "q", "response": "r", "system": "s", "history": [["a", "b"]]}, "q", "r", "s", [["a", "b"]]),
        ({"query": "q", "system": ""}, "q", None, "", []),
        ({"instruction": "i", "input": "x"}, "i\nx", None, None, []),
        ({"instruction": "i", "input": "", "output": "o"}, "i", "o", None, []),
        ({"question": "q", "answer": "r"}, "q", "r", None, []),
        ({"prompt": "q"}, "q", None, None, []),
        ({"messages": [{"role": "user", "content": "q"}]}, "q", None, None, []),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "q"},
                ]
            },
            "q",
            None,
            "s",
            [["a", "b"]],
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, "q", "r", None, []),
        ({"conversation": [{"human": "a", "assistant": "b"}, {"human": "q", "assistant": "r"}]}, "q", "r", None, [["a", "b"]]),
        ({"text": "a line of a text file"}, "a line of a text file", None, None, []),
    ],
)
def test_shapes(row: dict, query: str, label: str | None, system: str | None, history: list) -> None:
    question = question_of(row)
    assert (question.query, question.label, question.system, question.history) == (query, label, system, history)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"query": "q", "images": ["a.png"]}, "images"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]}, "image_url"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]}]},
            "image",
        ),
    ],
)
def test_pictures_are_refused_by_name(row: dict, named: str) -> None:
    with pytest.raises(BadRow, match=f"{named} is not supported; the model reads text only"):
        question_of(row)


def test_a_row_without_system_prompt_takes_the_given_one() -> None:
    assert question_of({"query": "q"}, system="given").system == "given"
    assert question_of({"query": "q", "system": "own"}, system="given").system == "own"
    assert question_of({"query": "q", "system": ""}, system="given").system == ""


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"response": "alone"},
        {"query": ""},
        {"query": 3},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "robot", "content": "x"}]},
    ],
)
def test_rows_that_ask_nothing(row: dict) -> None:
    with pytest.raises(BadRow):
        question_of(row)


def write_rows(path: Path, rows: list) -> str:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    return str(path)


def test_bad_rows_are_shown_with_their_line_and_left_out(tmp_path, capsys) -> None:
    file = write_rows(tmp_path / "q.jsonl", [{"query": "a"}, "not json", {"query": "你好"}])
    assert [question.query for question in read_questions(InferArguments(val_dataset=[file]))] == ["a", "你好"]
    assert "q.jsonl:2: not JSON" in capsys.readouterr().err
    with pytest.raises(DataError, match="not JSON") as error:
        read_questions(InferArguments(val_dataset=[file], strict=True))
    assert error.value.where == "q.jsonl:2"


def test_no_question_at_all(tmp_path) -> None:
    for rows in ([], ["x"]):
        with pytest.raises(DataError):
            read_questions(InferArguments(val_dataset=[write_rows(tmp_path / "q.jsonl", rows)]))
    with pytest.raises(DataError):
        read_questions(InferArguments(val_dataset=[str(tmp_path / "missing.jsonl")]))


def test_show_dataset_sample(tmp_path, capsys) -> None:
    file = write_rows(tmp_path / "q.jsonl", [{"query": f"q{number}"} for number in range(25)])
    assert len(read_questions(InferArguments(val_dataset=[file]))) == 10
    assert "10 of 25 questions" in capsys.readouterr().err
    assert len(read_questions(InferArguments(val_dataset=[file], show_dataset_sample=-1))) == 25
    assert capsys.readouterr().err == ""
    drawn = read_questions(InferArguments(val_dataset=[f"{file}#3", file], show_dataset_sample=-1))
    assert [question.query for question in drawn[3:]] == [f"q{number}" for number in range(25)]
    assert len(drawn) == 28


def test_validation_rows_are_those_that_training_held_out(tmp_path) -> None:
    from megaswift.data.sampling import split_and_sample

    file = write_rows(
        tmp_path / "d.jsonl", [{"query": f"q{number}", "response": "r"} if number % 5 else "bad" for number in range(50)]
    )
    questions = read_questions(InferArguments(dataset=[file], dataset_test_ratio=0.2, dataset_seed=7, show_dataset_sample=-1))
    usable = [number for number in range(50) if number % 5]
    assert [question.query for question in questions] == [
        f"q{usable[place]}" for place in split_and_sample(40, None, 0.2, 7)[1]
    ]
    assert len(questions) == 8
    with pytest.raises(DataError, match="no question"):
        read_questions(InferArguments(dataset=[file], dataset_test_ratio=0))


def test_columns_and_names(tmp_path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"ask": "q", "reply": ""}, {"ask": "q", "reply": "r"}])
    columns = json.dumps({"ask": "query", "reply": "response"})
    assert [question.label for question in read_questions(InferArguments(val_dataset=[file], columns=columns))] == [None, "r"]
    names = {"model_name": ["小黄", "Xiao Huang"], "model_author": ["魔搭", "ModelScope"]}
    questions = read_questions(InferArguments(val_dataset=["self-cognition"], show_dataset_sample=-1, **names))
    assert any("小黄" in (question.label or "") for question in questions)
    assert not any("{{" in (question.label or "") + question.query for question in questions)


def test_csv_and_text_files(tmp_path) -> None:
    (tmp_path / "q.csv").write_text("query,response\n你好,hi\nNA,\n", encoding="utf-8")
    (tmp_path / "q.txt").write_text("first\n\nsecond\n", encoding="utf-8")
    questions = read_questions(InferArguments(val_dataset=[str(tmp_path / "q.csv"), str(tmp_path / "q.txt")]))
    assert [(question.query, question.label) for question in questions] == [
        ("你好", "hi"),
        ("NA", None),
        ("first", None),
        ("second", None),
    ]


def test_output_and_rows(backend, tmp_path, capsys) -> None:
    questions = [
        question_of({"query": "你好", "response": "标签", "system": "S"}),
        question_of({"query": "q", "history": [["a", "b"]]}),
    ]
    writer = ResultWriter(tmp_path)
    rows = answer_questions(backend, questions, SHORT, results=writer)
    writer.close()
    output = capsys.readouterr().out
    assert output.startswith("[SYSTEM]S\n[QUERY]你好\n[RESPONSE]")
    assert "\n[LABELS]标签\n" + "-" * 50 + "\n[SYSTEM]You are helpful.\n[QUERY]a\n[RESPONSE]b\n[QUERY]q\n[RESPONSE]" in output
    assert writer.path is not None
    assert [json.loads(line) for line in writer.path.read_text(encoding="utf-8").splitlines()] == rows
    assert list(rows[0]) == ["system", "query", "response", "history", "label"]
    assert (rows[0]["system"], rows[0]["label"], rows[1]["history"], rows[1]["label"]) == ("S", "标签", [["a", "b"]], None)


def test_streamed_single_and_batched_answers_are_the_same(backend) -> None:
    questions = [question_of({"query": "x" * (37 * number % 23 + 1)}) for number in range(9)]
    streamed = answer_questions(backend, questions, SHORT)
    assert streamed == answer_questions(backend, questions, SHORT, stream=False)
    assert streamed == answer_questions(backend, questions, SHORT, batch_size=4)


def test_a_hundred_questions_are_quiet(backend, tmp_path, capsys) -> None:
    writer = ResultWriter(tmp_path)
    questions = [question_of({"query": f"question {number}"}) for number in range(100)]
    rows = answer_questions(
        backend, questions, GenerationOptions(max_new_tokens=2, temperature=0), batch_size=25, results=writer
    )
    writer.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "100 questions, " in captured.err and "tokens/s" in captured.err
    assert [row["query"] for row in rows] == [question.query for question in questions]


def test_questions_that_are_too_long_are_left_out_and_counted(backend, capsys) -> None:
    questions = [question_of({"query": "x" * 600}, "q.jsonl:1"), question_of({"query": "q"})]
    assert len(answer_questions(backend, questions, SHORT)) == 1
    assert "q.jsonl:1: the prompt has" in capsys.readouterr().err
    with pytest.raises(DataError, match="at most 511"):
        answer_questions(backend, questions[:1], SHORT)


def test_control_c_keeps_what_is_done(backend, tmp_path, monkeypatch, capsys) -> None:
    writer = ResultWriter(tmp_path)
    original, calls = backend._generate_batch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(backend, "_generate_batch", interrupted)
    questions = [question_of({"query": "same"}) for _ in range(8)]
    with pytest.raises(KeyboardInterrupt):
        answer_questions(backend, questions, SHORT, batch_size=2, results=writer)
    writer.close()
    assert writer.path is not None and len(writer.path.read_text().splitlines()) == 4
    assert "4 of 8 questions" in capsys.readouterr().err
