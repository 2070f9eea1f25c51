"""Benchmark files: every layout gives the same questions, and every fault is told with its place."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from eval_files import ARC, write_all, write_lines

from megaswift.errors import DataError, MegaswiftError, UserError
from megaswift.evaluation.items import Bench, Item, limited
from megaswift.evaluation.readers import read_bench


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
