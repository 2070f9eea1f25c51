"""Files and folders as numbered raw rows: jsonl, json, csv, tsv, txt, parquet, arrow, and gz of these.

A source answers `len`, `raw(i)` and `where(i)` without holding parsed rows, so a file of a million rows costs its size
in the page cache and 16 bytes a row. `decode` turns a raw row into a dict; it is separate so that another process can
do it.
"""

from __future__ import annotations

import gzip
import json
import mmap
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from megaswift.data import tables
from megaswift.data.conversation import BadRow
from megaswift.data.encoding import not_utf8, refuse_utf16, wrong_bytes
from megaswift.data.tables import DictRows, Joined, Raw, Source
from megaswift.errors import DataError

BOM = b"\xef\xbb\xbf"
_FRONT = 16  # lines that tell JSON Lines from text
_OBJECTS = re.compile(rb"\[\s*\{\s*\"")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")


def decode(raw: Raw) -> dict[str, Any]:
    """A raw row as a dict. Raises BadRow when it is no JSON object."""
    if isinstance(raw, BadRow):
        raise raw
    if isinstance(raw, dict):
        return raw
    try:
        row = json.loads(raw)
    except UnicodeDecodeError as error:
        raise not_utf8(bytes(raw) if isinstance(raw, bytes) else b"", error) from None
    except RecursionError:
        raise BadRow("not JSON", "nested too deeply") from None
    except ValueError as error:
        raise BadRow("not JSON", str(error)) from None
    if not isinstance(row, dict):
        raise BadRow("not a JSON object", f"the row is {_kind(row)}")
    return row


def open_path(path: Path, subsets: tuple[str, ...] = ()) -> Source:
    """The rows of a local file, or of the data files of a folder (of these subsets). Raises DataError when there are none."""
    if path.is_dir():
        files = files_of(path, subsets)
        return Joined([open_path(item) for item in files]) if len(files) > 1 else open_path(files[0])
    if not path.is_file():
        raise DataError("no such dataset file.", where=str(path))
    suffix, packed = _suffix(path)
    if suffix in (".parquet", ".arrow"):
        return _open_table(path, tables.ParquetRows if suffix == ".parquet" else tables.arrow_rows, packed)
    data = _bytes_of(path, packed)
    start = 3 if data[:3] == BOM else 0
    refuse_utf16(path, data[:4])
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _open_json(path, data, start)
    found = _json_by_content(path, data, start)
    if found is not None:
        found.notes = (f"{path.name} holds JSON, whatever its name says: read as that",)
        return found
    if suffix not in SUFFIXES:
        raise DataError(
            f"files of type {suffix or 'none'!r} cannot be read.",
            where=str(path),
            fix=f"use one of {' '.join(SUFFIXES)}, or .gz of one",
        )
    if suffix in (".csv", ".tsv"):
        return tables.csv_rows(path, data, "," if suffix == ".csv" else "\t")
    return TextLines(path, data, start)


HELD_OUT = frozenset(("test", "validation", "valid", "val", "dev", "eval"))


def files_of(path: Path, subsets: tuple[str, ...] = ()) -> list[Path]:
    """The data files behind a path: itself, or those of a folder in sorted order.

    With `subsets`, the files that carry one of these words in their folder or name; without, all but those that are
    named as held out (test, validation, ...), unless nothing else is there.
    """
    if path.is_file():
        return [path]
    files = sorted(
        _told(item)
        for item in path.rglob("*")
        if item.is_file() and _suffix(item)[0] in SUFFIXES and not _is_metadata(item.relative_to(path))
    )
    if not files:
        raise DataError(
            "the folder holds no data file.", where=str(path), fix=f"put files of these types in it: {' '.join(SUFFIXES)}"
        )
    words = {item: set(re.split(r"[/\\.-]", str(item.relative_to(path)))) for item in files}
    if subsets:
        chosen = [item for item in files if words[item] & set(subsets)]
        if not chosen:
            raise DataError(
                f"no data file of the folder belongs to subset {'/'.join(subsets)}.",
                where=str(path),
                fix=f"its files: {', '.join(item.name for item in files[:8])}",
            )
        return chosen
    return [item for item in files if not words[item] & HELD_OUT] or files


def _told(path: Path) -> Path:
    """A file of a folder. Raises DataError where its name is not UTF-8, so that nothing could be said of its rows."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        name = os.fsencode(path.name).decode("utf-8", "backslashreplace")
        raise DataError("the name of a file is not UTF-8.", where=f"{path.parent}/{name}", fix="rename it") from None
    return path


def is_lines(path: Path) -> bool:
    """Whether a file is read line by line: .jsonl, .ndjson and .txt, packed or not."""
    return _suffix(path)[0] in (".jsonl", ".ndjson", ".txt")


def is_text(path: Path) -> bool:
    """Whether the lines of a file are plain text: .txt, packed or not."""
    return _suffix(path)[0] == ".txt"


def _is_metadata(relative: Path) -> bool:
    return any(part.startswith((".", "_")) for part in relative.parts) or relative.name in (
        "dataset_info.json",
        "state.json",
        "dataset_dict.json",
        "dataset_infos.json",
    )


def _suffix(path: Path) -> tuple[str, bool]:
    name = path.name.lower()
    packed = name.endswith(".gz")
    return Path(name[:-3] if packed else name).suffix, packed


def _bytes_of(path: Path, packed: bool) -> Any:
    """The content as a read-only buffer that slices to bytes; memory-mapped, after unpacking where needed."""
    try:
        if not packed:
            with open(path, "rb") as handle:
                return _mapped(handle)
        with tempfile.TemporaryFile() as unpacked, gzip.open(path, "rb") as source:
            shutil.copyfileobj(source, unpacked, 1 << 20)
            unpacked.flush()
            return _mapped(unpacked)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the file: {error}.", where=str(path)) from error


def _open_table(path: Path, kind: Callable[[Path, Path], Source], packed: bool) -> Source:
    """A table file; a packed one is unpacked into a file that lives as long as its map."""
    if not packed:
        return kind(path, path)
    try:
        with tempfile.NamedTemporaryFile() as unpacked, gzip.open(path, "rb") as source:
            shutil.copyfileobj(source, unpacked, 1 << 20)
            unpacked.flush()
            return kind(Path(unpacked.name), path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the file: {error}.", where=str(path)) from error


def _mapped(handle: IO[bytes]) -> Any:
    """The whole file as a read-only map, which outlives the handle."""
    handle.seek(0, 2)
    return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if handle.tell() else b""


def _open_json(path: Path, data: Any, start: int) -> Source:
    """JSON Lines or one JSON list, told apart by content: both suffixes are used for both."""
    first = _first_byte(data, start)
    if first == b"[":
        return JsonList(path, data, start)
    if first == b"{" and path.name.lower().removesuffix(".gz").endswith(".json"):
        wrapped = _wrapped_list(data, start)
        if wrapped is not None:
            return DictRows(path, wrapped)
    return JsonLines(path, data, start)


def _json_by_content(path: Path, data: Any, start: int) -> JsonLines | JsonList | DictRows | None:
    """The rows of a file that parses as JSON although it is not named so: a list, one object, or lines of objects."""
    first = _first_byte(data, start)
    if first == b"[":
        try:
            return JsonList(path, data, start)
        except DataError:
            if _OBJECTS.match(data[start : start + 4096]):  # it was meant as one, so it must not pass for text
                raise
    if first == b"{":
        lines = JsonLines(path, data, start)
        if all(_is_object(lines.raw(index)) for index in range(min(len(lines), _FRONT))):
            return lines
        wrapped = _wrapped_list(data, start)
        return DictRows(path, wrapped) if wrapped is not None else None
    return None


def _is_object(line: bytes) -> bool:
    try:
        decode(line)
    except BadRow:
        return False
    return True


def _first_byte(data: Any, start: int) -> bytes:
    position = start
    while position < len(data) and data[position : position + 1] in b" \t\r\n":
        position += 1
    return data[position : position + 1]


def _wrapped_list(data: Any, start: int) -> list[Any] | None:
    """The rows of a file like {"data": [...]}; None when the file is JSON Lines or one row."""
    newline = data.find(b"\n", start)
    try:
        json.loads(data[start : newline if newline > 0 else len(data)])
        if newline > 0 and data[newline:].strip():
            return None
    except (ValueError, RecursionError):
        pass
    try:
        value = json.loads(data[start:])
    except (ValueError, RecursionError):
        return None
    lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(lists) == 1 and not {"messages", "conversations", "conversation"} & set(value):
        return lists[0]
    return [value]


class JsonLines:
    """A file with one JSON object a line; blank lines are no rows."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, data: Any, start: int) -> None:
        self.path, self.data = path, data
        self.starts, self.ends, self.lines = _line_table(data, start)

    def __len__(self) -> int:
        return len(self.starts)

    def raw(self, index: int) -> bytes:
        return self.data[self.starts[index] : self.ends[index]]

    def where(self, index: int) -> str:
        return f"{self.path.name}:{self.lines[index]}"


class TextLines(JsonLines):
    """A text file: each line that is not blank is a row for pre-training."""

    def raw(self, index: int) -> dict[str, Any] | BadRow:  # type: ignore[override]
        return text_row(super().raw(index))


def text_row(line: bytes) -> dict[str, Any] | BadRow:
    """A line of a text file as a row; bytes that are no UTF-8 make it a bad one."""
    try:
        return {"text": line.decode("utf-8").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return not_utf8(line, error)


def _line_table(data: Any, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, end and 1-based line number of every line that is not blank."""
    ends = []
    for offset in range(0, len(data), 1 << 24):
        block = np.frombuffer(data[offset : offset + (1 << 24)], dtype=np.uint8)
        ends.append(np.flatnonzero(block == 10) + offset)
    stop = np.concatenate([*ends, [len(data)]]).astype(np.int64) if len(data) else np.zeros(0, np.int64)
    begin = np.concatenate([[start], stop[:-1] + 1]).astype(np.int64) if len(data) else stop
    number = np.arange(1, len(stop) + 1)
    short = np.flatnonzero(stop - begin <= 64)  # only a short line can be blank, short of 64 spaces
    blank = [i for i in short if not data[begin[i] : stop[i]].strip()]
    keep = np.ones(len(stop), bool)
    keep[blank] = False
    return begin[keep], stop[keep], number[keep]


class JsonList:
    """A file that is one JSON list. The text stays in memory; rows are cut from it when asked for."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, data: Any, start: int) -> None:
        self.path = path
        try:
            self.text = data[start:].decode("utf-8")
        except UnicodeDecodeError as error:
            before = data[start : start + error.start]
            begin, end = before.rfind(b"\n") + 1, data.find(b"\n", start + error.start)
            raise wrong_bytes(path, before.count(b"\n") + 1, data[start + begin : end if end > 0 else len(data)]) from error
        spans = list(self._spans())
        self.starts = np.array([first for first, _ in spans], np.int64)
        self.ends = np.array([last for _, last in spans], np.int64)

    def _spans(self) -> Iterator[tuple[int, int]]:
        decoder, text = json.JSONDecoder(), self.text
        position = self._skip(text.index("[") + 1)
        try:
            while text[position] != "]":
                _, end = decoder.raw_decode(text, position)
                yield position, end
                position = self._skip(end)
                if text[position] == ",":
                    position = self._skip(position + 1)
                elif text[position] != "]":
                    raise json.JSONDecodeError("expected , or ]", text, position)
            rest = self._skip(position + 1)
            if rest < len(text):  # a second list, or lines of lists: rows that would be lost in silence
                raise json.JSONDecodeError("something follows its end", text, rest)
        except (ValueError, IndexError, RecursionError) as error:
            at = getattr(error, "pos", len(text))
            where = f"{self.path}:{text.count(chr(10), 0, at) + 1}"
            raise DataError(
                f"the JSON list is broken: {getattr(error, 'msg', 'it ends too early')}.",
                where=where,
                fix="mend the file, or write one row a line as .jsonl",
            ) from None

    def _skip(self, position: int) -> int:
        text = self.text
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    def __len__(self) -> int:
        return len(self.starts)

    def raw(self, index: int) -> str:
        return self.text[self.starts[index] : self.ends[index]]

    def where(self, index: int) -> str:
        return f"{self.path.name}:{self.text.count(chr(10), 0, int(self.starts[index])) + 1}"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}.get(
        type(value), type(value).__name__
    )
