"""Files of every type and state of damage."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaswift.data.conversation import BadRow
from megaswift.data.encoding import OtherEncoding
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


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.csv", "a.tsv", "a.log", "a", "a.txt.gz"])
@pytest.mark.parametrize(
    "data",
    [LIST, LINES, b"\xef\xbb\xbf\n" + LIST, b'{"version": 1, "data": ' + LIST + b"}"],
    ids=["list", "lines", "bom", "wrapped"],
)
def test_json_is_read_as_json_whatever_its_name(tmp_path: Path, name: str, data: bytes) -> None:
    path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    assert rows_of(path) == ROWS
    assert open_path(path).notes == (f"{name} holds JSON, whatever its name says: read as that",)


@pytest.mark.parametrize(
    "data", [b"[1] Smith et al.\nmore", b"{\\rtf1 text}\nmore", b'{"a": 1} and\n{"b": 2}\n', b"{}}\nx", b"[Music]\n"], ids=repr
)
def test_text_that_only_begins_like_json_is_text(tmp_path: Path, data: bytes) -> None:
    source = open_path(write(tmp_path / "a.txt", data))
    assert decode(source.raw(0)) == {"text": data.decode().splitlines()[0]} and source.notes == ()


def test_notes_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.txt", LIST)
    write(tmp_path / "d" / "b.jsonl", LINES)
    assert len(open_path(tmp_path / "d").notes) == 1


CHINESE = [{"query": "你好，你是谁", "response": "我是一个助手"}]
GBK_LINES = b'{"query": "q", "response": "a"}\n' + json.dumps(CHINESE[0], ensure_ascii=False).encode("gbk") + b"\n"
GBK_LIST = b'[{"query": "q", "response": "a"},\n' + json.dumps(CHINESE[0], ensure_ascii=False).encode("gbk") + b"]\n"


@pytest.mark.parametrize(
    ("name", "data", "line", "encoding"),
    [
        ("a.json", GBK_LIST, 2, "GB18030"),
        ("a.csv", "query,response\n你好,你是谁\n".encode("gbk"), 2, "GB18030"),
        ("a.jsonl", GBK_LINES.decode("gbk").encode("utf-16"), 1, "UTF-16"),
        ("a.jsonl", GBK_LINES.decode("gbk").encode("utf-16-le"), 1, "UTF-16"),
        ("a.csv", "query,response\n".encode("utf-16-be"), 1, "UTF-16"),
        ("a.txt", "你好".encode("utf-16"), 1, "UTF-16"),
        ("a.json", "[]".encode("utf-16-le"), 1, "UTF-16"),
    ],
)
def test_other_encodings_are_told_with_the_line_and_the_cure(
    tmp_path: Path, name: str, data: bytes, line: int, encoding: str
) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(write(tmp_path / name, data))
    assert caught.value.where.endswith(f"{name}:{line}") and f"iconv -f {encoding} -t UTF-8" in caught.value.fix


def test_a_row_in_gbk_is_no_row_with_a_wrong_byte(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", GBK_LINES), ("a.txt", "q\n你好，你是谁\n".encode("gbk"))):
        source = open_path(write(tmp_path / name, data))
        with pytest.raises(OtherEncoding, match="as GBK it is Chinese"):
            decode(source.raw(1))
    source = open_path(write(tmp_path / "b.txt", b"fine\ncaf\xe9 au lait\n"))
    with pytest.raises(BadRow, match="not UTF-8") as caught:
        decode(source.raw(1))
    assert not isinstance(caught.value, OtherEncoding)


def test_a_file_of_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path / "d" / "好.jsonl".encode("gbk").decode("utf-8", "surrogateescape"), LINES)
    with pytest.raises(DataError, match="the name of a file is not UTF-8") as caught:
        open_path(tmp_path / "d")
    assert caught.value.where.endswith("d/\\xba\\xc3.jsonl")


def test_members_that_a_table_made_null_are_left_out(tmp_path: Path) -> None:
    def call(name: str, arguments: dict) -> dict:
        called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
        tool = {"name": name, "parameters": {"properties": {key: {"enum": ["x", None]} for key in arguments}}}
        return {"messages": [{"role": "user", "content": "q"}, called], "tools": [tool]}

    rows = [call("weather", {"city": "Oslo"}), call("calc", {"expr": {"a": 1, "list": [{"b": 1}, {"c": None}]}})]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        source = open_path(tmp_path / name)
        first, second = (source.raw(index) for index in range(2))
        assert first["messages"] == rows[0]["messages"] and first["tools"] == rows[0]["tools"]
        assert second["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"expr": {"a": 1, "list": [{"b": 1}, {}]}}
        assert second["tools"] == rows[1]["tools"]
        assert first.nulls == ("messages.tool_calls.function.arguments.expr", "tools.parameters.properties.expr")
    write(tmp_path / "a.json", json.dumps({"data": [{"messages": [{"a": {"b": None}}]}]}).encode())
    write(tmp_path / "a.jsonl", json.dumps({"messages": [{"a": {"b": None}}]}).encode())
    for name in ("a.json", "a.jsonl"):  # what JSON text says is meant
        assert rows_of(tmp_path / name) == [{"messages": [{"a": {"b": None}}]}]


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
        ("a.csv", b"a,b\n\xff\xfe,\xff\n", "not UTF-8"),
        ("a.json", b'[{"a": 1}]\n[{"a": 2}]', "something follows its end"),
        ("a.txt", b'[{"a": 1},\n{"a": }]', "a.txt:2"),  # meant as JSON: it must not pass for text
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
