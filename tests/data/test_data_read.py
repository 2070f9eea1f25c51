"""Files of every type and state of damage."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaswift.data.conversation import BadRow
from megaswift.data.read import decode, files_of, open_path
from megaswift.errors import DataError

ROWS = [{"query": f"q{k}", "response": f"a{k}\n\u4f60"} for k in range(5)]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def rows_of(path: Path) -> list[dict]:
    source = open_path(path)
    return [decode(source.raw(index)) for index in range(len(source))]


LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
LIST = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
CSV = b"query,response\n" + b"".join(f'q{k},"a{k}\n\u4f60"\n'.encode() for k in range(5))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", LINES.replace(b"}\n", b"}\r\n")),
        ("a.jsonl", b"\n" + LINES.replace(b"}\n", b"}\n  \n\n")),
        ("a.jsonl", LINES.rstrip()),
        ("a.jsonl", LIST),  # a list under the wrong name
        ("a.json", LIST),
        ("a.json", b"\xef\xbb\xbf  " + LIST + b"\n"),
        ("a.json", LINES),  # lines under the wrong name
        ("a.json", b'{"version": 1, "data": ' + LIST + b"}"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.json.gz", gzip.compress(LIST, mtime=0)),
        ("a.csv", CSV),
        ("a.csv", b"\xef\xbb\xbf" + CSV),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)),
        ("a.tsv", CSV.replace(b",", b"\t")),
    ],
)
def test_text_files(tmp_path: Path, name: str, data: bytes) -> None:
    assert rows_of(write(tmp_path / name, data)) == ROWS


def test_csv_values_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"query,response,n\nNA,null,1\n,,2\n")
    assert rows_of(path) == [{"query": "NA", "response": "null", "n": "1"}, {"query": "", "response": "", "n": "2"}]


def test_csv_lines_with_too_many_columns_are_bad_rows(tmp_path: Path) -> None:
    source = open_path(write(tmp_path / "a.csv", b"query,response\nq,a\nq,a,b\nq,a\n"))
    assert len(source) == 3 and source.where(2) == "a.csv: row 2"
    with pytest.raises(BadRow, match="wrong number of columns"):
        decode(source.raw(2))


def test_csv_with_a_long_row(tmp_path: Path) -> None:
    assert len(rows_of(write(tmp_path / "a.csv", b"query,response\nq," + b"a" * 3_000_000 + b"\n"))[0]["response"]) == 3_000_000


def test_parquet_and_arrow(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pa.OSFile(str(tmp_path / "s.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "s.arrow", "f.arrow"):
        assert rows_of(tmp_path / name) == ROWS
        packed = write(tmp_path / f"{name}.gz", gzip.compress((tmp_path / name).read_bytes()))
        assert rows_of(packed) == ROWS
        assert open_path(packed).where(1) == f"{name}.gz: row 2"
    assert decode(open_path(tmp_path / "a.parquet").raw(4)) == ROWS[4]
    assert open_path(tmp_path / "a.parquet").where(4) == "a.parquet: row 5"


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == ROWS
    assert len(open_path(tmp_path / "saved", ("test",))) == 1
    with pytest.raises(DataError, match="belongs to subset"):
        open_path(tmp_path / "saved", ("other",))


def test_a_folder_of_files(tmp_path: Path) -> None:
    write(tmp_path / "d" / "b.jsonl", LINES)
    write(tmp_path / "d" / "a.json", LIST)
    write(tmp_path / "d" / "validation.jsonl", LINES)
    write(tmp_path / "d" / ".hidden.jsonl", LINES)
    write(tmp_path / "d" / "README.md", b"x")
    assert [path.name for path in files_of(tmp_path / "d")] == ["a.json", "b.jsonl"]
    assert rows_of(tmp_path / "d") == ROWS + ROWS
    assert open_path(tmp_path / "d").where(6) == "b.jsonl:2"
    with pytest.raises(DataError, match="holds no data file"):
        open_path(write(tmp_path / "e" / "README.md", b"x").parent)


def test_text_lines(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "a.txt", b"one\r\n\ntwo")) == [{"text": "one"}, {"text": "two"}]


def test_places(tmp_path: Path) -> None:
    assert open_path(write(tmp_path / "a.jsonl", b"\n\n" + LINES)).where(1) == "a.jsonl:4"
    assert open_path(write(tmp_path / "b.json", b'[\n{"a": 1},\n\n{"a":\n2}]')).where(1) == "b.json:4"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"nonsense", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"3", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100000, "not JSON"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, reason: str) -> None:
    source = open_path(write(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n'))
    assert len(source) == 3 and decode(source.raw(2)) == {"a": 2}
    with pytest.raises(BadRow) as caught:
        decode(source.raw(1))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"a": 1},\n{"a": }]', "a.json:2"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', "a.json:2"),
        ("a.json", b'[{"a": 1},\n', "ends too early"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.jsonl", "a".encode("utf-16"), "UTF-16"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "cannot read the file"),
        ("a.jsonl.gz", LINES, "cannot read the file"),
        ("a.parquet", b"PAR1 nonsense", "Parquet"),
        ("a.arrow", b"nonsense", "Arrow"),
        ("a.csv", b"a,b\n\xff\xfe,\xff\n", "CSV"),
        ("a.xlsx", b"", "cannot be read"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(write(tmp_path / name, data))
    assert message in str(caught.value) and name in caught.value.where


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_empty_files_have_no_rows(tmp_path: Path, name: str) -> None:
    assert len(open_path(write(tmp_path / name, b""))) == 0


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such dataset file"):
        open_path(tmp_path / "none.jsonl")
