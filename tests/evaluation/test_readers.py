"""Benchmark files: every layout gives the same questions, and every fault is told with its place."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from eval_files import ARC, write_all, write_lines

from megaswift.errors import DataError, MegaswiftError, UserError
from megaswift.evaluation.custom import read_custom
from megaswift.evaluation.items import Bench, Item, limited
from megaswift.evaluation.readers import _hub_item, read_bench


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_all(tmp_path / "data")


def test_the_four_benchmarks(data: Path) -> None:
    arc, mmlu, ceval, gsm8k = (read_bench(name, str(data)) for name in ("arc", "mmlu", "ceval", "gsm8k"))
    assert [(item.question, item.answer) for item in arc.items][1] == ("Which of these is a liquid?", "B")
    assert [item.subset for item in mmlu.items] == ["anatomy", "anatomy", "virology"]
    assert mmlu.items[0].question == "Which, of these,\nis a bone?"
    assert mmlu.shots["virology"][0].answer == "B"
    assert (ceval.split, ceval.items[0].choices, ceval.items[0].gold) == ("val", ("10", "11", "12", "13"), 2)
    assert ceval.shots["law"][0].explanation == "数一数。"
    assert [item.answer for item in gsm8k.items] == ["5", "2,000"]
    assert len(gsm8k.shots["main"]) == 2


def test_zip_and_directory_give_the_same_questions(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with zipfile.ZipFile(data / "mmlu.zip") as archive:
        archive.extractall(other / "mmlu")
    assert read_bench("mmlu", str(other)).sha256 == read_bench("mmlu", str(data)).sha256


def test_three_shapes_of_arc_are_one(tmp_path: Path) -> None:
    labels = "ABCD"
    hub = [
        {"id": str(k), "question": row["query"][10:], "choices": {"text": row["choices"], "label": list(labels[: len(row["choices"])])},
         "answerKey": labels[row["gold"]]} for k, row in enumerate(ARC)
    ]  # fmt: skip
    own = [
        {"id": row["id"], "question": {"stem": row["question"], "choices": [{"text": text, "label": str(k + 1)} for k, text in enumerate(row["choices"]["text"])]},
         "answerKey": str(labels.index(row["answerKey"]) + 1)} for row in hub
    ]  # fmt: skip
    found = []
    for number, (name, rows) in enumerate(
        (("arc_challenge.jsonl", ARC), ("ARC-Challenge/test.jsonl", hub), ("ARC-Challenge-Test.jsonl", own))
    ):
        write_lines(tmp_path / str(number) / name, rows)
        found.append(read_bench("arc", str(tmp_path / str(number))).sha256)
    pandas = pytest.importorskip("pandas")
    (tmp_path / "p" / "ARC-Challenge").mkdir(parents=True)
    pandas.DataFrame(hub).to_parquet(tmp_path / "p" / "ARC-Challenge" / "test-00000-of-00001.parquet")
    found.append(read_bench("arc", str(tmp_path / "p")).sha256)
    assert len(set(found)) == 1


def test_a_text_may_hold_any_character(tmp_path: Path) -> None:
    """U+0085 stands in MMLU's own files; it ends no line of JSON."""
    odd = "which\x85of\u2028these"
    write_lines(tmp_path / "arc_challenge.jsonl", [{"query": odd, "choices": ["a", "b"], "gold": 1}])
    assert [item.question for item in read_bench("arc", str(tmp_path)).items] == [odd]
    row = {"question": odd, "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "law"}
    assert _hub_item("mmlu", "all", row, 7) == Item("law", "7", odd, ("a", "b", "c", "d"), "C")


def test_no_question_is_read_twice(data: Path, tmp_path: Path) -> None:
    """The hub's snapshots hold questions under two names, a zip lies beside what was unpacked from it, and others' names begin alike."""
    pandas = pytest.importorskip("pandas")
    solved = {"question": "1 + 1?", "answer": "two #### 2"}
    law = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0, "subject": "law"}
    for name, row in (
        ("gsm8k/main", solved),
        ("gsm8k/socratic", solved),
        ("mmlu/all", law),
        ("mmlu/law", law),
        ("mmlu_pro/all", law),
    ):
        (tmp_path / name).mkdir(parents=True)
        pandas.DataFrame([row]).to_parquet(tmp_path / name / "test-00000-of-00001.parquet")
    (tmp_path / "gsm8k" / "test_socratic.jsonl").write_text(json.dumps(solved) + "\n")
    shutil.copy(data / "mmlu.zip", tmp_path)
    for name in ("gsm8k", "mmlu"):
        found = read_bench(name, str(tmp_path))
        assert (len(found.items), found.source) == (1, str(tmp_path / name))
    assert [item.subset for item in read_bench("mmlu", str(tmp_path)).items] == ["law"]
    shutil.copy(data / "arc_challenge.jsonl", tmp_path)
    shutil.copy(data / "arc_challenge.jsonl", tmp_path / "ARC-Challenge-Test.jsonl")
    with pytest.raises(UserError, match="twice: ARC-Challenge-Test.jsonl and arc_challenge.jsonl"):
        read_bench("arc", str(tmp_path))


def test_a_split_is_not_taken_from_directories_above(data: Path, tmp_path: Path) -> None:
    """Nor is anything read that a Mac puts into its zips."""
    place = data.rename(tmp_path / "dev")
    with zipfile.ZipFile(place / "mmlu.zip", "a") as archive:
        archive.writestr("__MACOSX/test/._anatomy_test.csv", b"\x00\x05\x16\x07")
    assert [len(read_bench(name, str(place)).items) for name in ("arc", "mmlu", "gsm8k")] == [4, 3, 2]


def test_an_empty_choice_does_not_move_the_others(tmp_path: Path) -> None:
    rows = "question,A,B,C,answer\nq,one,two,,B\n"
    (tmp_path / "x_val.csv").write_text(rows)
    entry = {"name": "x", "pattern": "ceval", "dataset": str(tmp_path)}
    assert read_custom(entry, "c.json").items[0].choices == ("one", "two")
    (tmp_path / "x_val.csv").write_text(rows + "q,one,,three,C\n")
    with pytest.raises(DataError, match="before the last one is empty"):
        read_custom(entry, "c.json")


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


@pytest.mark.parametrize(
    ("bench", "file", "content", "message"),
    [
        ("mmlu", "mmlu/test/law_test.csv", "q,1,2,3,4,A\nq,1,2,3,A\n", "law_test.csv:2"),
        ("mmlu", "mmlu/test/law_test.csv", 'q,1,2,3,4,A\n"open,1,2,3,4,A\n', "malformed"),
        ("mmlu", "mmlu/test/law_test.csv", "q,1,2,3,4,E\n", "expected one of A, B, C, D"),
        ("mmlu", "mmlu/dev/law_dev.csv", "q,1,2,3,4,A\n", "no test split here (found: dev)"),
        ("mmlu", "mmlu/test/law_test.csv", b"\xff\xfe,1,2,3,4,A\n", "not UTF-8"),
        ("mmlu", "mmlu.zip", b"PK\x03\x04 not a zip", "zip cannot be read"),
        ("ceval", "ceval/test/law_test.csv", "id,question,A,B,C,D\n", "no val split here (found: test)"),
        ("ceval", "ceval/val/law_val.csv", "id,question,A,B,C,D\n", "lacks: answer"),
        ("ceval", "ceval/val/law_val.csv", "id,question,A,B,C,D,answer\n0,q,1,2\n", "7 fields expected"),
        ("gsm8k", "gsm8k_test.jsonl", '{"question": "q", "answer": "no number"}\n', "#### and the number"),
        ("gsm8k", "gsm8k_test.jsonl", '{"question": "q"\n', "gsm8k_test.jsonl:1"),
        ("arc", "arc_challenge.jsonl", '{"query": "q", "choices": ["a", "b"], "gold": 2}\n', "expected one of A, B"),
        ("arc", "arc_challenge.jsonl", '{"query": "q", "choices": ["a"], "gold": 0}\n', "2 to 10 choices"),
        ("arc", "arc_challenge.jsonl", "[1]\n", "no JSON object"),
        ("arc", "readme.txt", "", "arc is not in"),
    ],
)
def test_faults_are_told_with_their_place(tmp_path: Path, bench: str, file: str, content: str | bytes, message: str) -> None:
    _write(file, content)(tmp_path)
    with pytest.raises(MegaswiftError) as caught:
        read_bench(bench, str(tmp_path))
    assert isinstance(caught.value, UserError | DataError)
    assert message in caught.value.text()
    assert caught.value.fix or "UTF-8" in message


def test_a_limit_asks_every_subject(data: Path) -> None:
    mmlu = read_bench("mmlu", str(data))
    assert [item.subset for item in limited(mmlu, 2).items] == ["anatomy", "virology"]
    assert (limited(mmlu, 2).total, len(limited(mmlu, 99).items)) == (3, 3)
    many = Bench("x", "mmlu", "test", tuple(Item(f"s{k}", "0", "q", ("a", "b"), "A") for k in range(10)))
    assert [item.subset for item in limited(many, 3).items] == ["s0", "s3", "s6"]


def test_too_few_examples_are_told(data: Path) -> None:
    bench = read_bench("mmlu", str(data))
    assert [shot.answer for shot in bench.examples(bench.items[0], 1)] == ["A"]
    with pytest.raises(UserError, match="has 1 solved examples"):
        bench.examples(bench.items[0], 2)


SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real benchmark files are not here")
def test_the_real_files_have_the_published_sizes() -> None:
    sizes = {name: len(read_bench(name, str(SHARED)).items) for name in ("mmlu", "ceval", "gsm8k", "arc")}
    assert sizes == {"mmlu": 14042, "ceval": 1346, "gsm8k": 1319, "arc": 1172}
