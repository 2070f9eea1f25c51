"""The files of a benchmark, in a directory or a zip, read as rows with the place of each for messages."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.errors import DataError

_MAX_BYTES = 2**30  # of one file inside a zip: a bomb must not fill the memory


@dataclass(frozen=True)
class Member:
    """A file that is read when needed.

    Attributes:
        name: path with forward slashes, relative to where the search began.
        where: full place, for messages.
    """

    name: str
    where: str
    read: Callable[[], bytes]

    @property
    def base(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


def members(place: Path) -> list[Member]:
    """All files under a directory or in a zip, sorted by name, without hidden ones. Raises DataError for a damaged zip."""
    if place.is_dir():
        found = [(path.relative_to(place).as_posix(), path) for path in sorted(place.rglob("*")) if path.is_file()]
        return [Member(name, str(path), path.read_bytes) for name, path in found if not _is_hidden(name)]
    if place.suffix != ".zip":
        return [Member(place.name, str(place), place.read_bytes)]
    try:
        with zipfile.ZipFile(place) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir() and not _is_hidden(info.filename)]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"the zip cannot be read: {error}.", where=str(place), fix="fetch it again") from error
    return [Member(info.filename, f"{place}:{info.filename}", _reader(place, info)) for info in infos]


def _is_hidden(name: str) -> bool:
    """Whether a path leads through what a file manager or a hub's client put there."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _reader(place: Path, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        if info.file_size > _MAX_BYTES:
            raise DataError(f"{info.filename} is larger than {_MAX_BYTES >> 20} MiB.", where=str(place))
        try:
            with zipfile.ZipFile(place) as archive:
                return archive.read(info)
        except (OSError, zipfile.BadZipFile, RuntimeError) as error:
            raise DataError(f"the zip is damaged: {error}.", where=f"{place}:{info.filename}", fix="fetch it again") from error

    return read


def text_of(member: Member) -> str:
    """A file as text. Raises DataError where it is not UTF-8."""
    try:
        return member.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"the file is not UTF-8: {error.reason} at byte {error.start}.", where=member.where) from error


def csv_rows(member: Member) -> Iterator[tuple[str, list[str]]]:
    """(file:line, fields) of each row of a CSV; quoted fields may hold commas and newlines."""
    reader = csv.reader(io.StringIO(text_of(member), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"the CSV is malformed: {error}.", where=f"{member.where}:{line}", fix="mend the row") from error
        if row:
            yield f"{member.where}:{line}", row


def json_rows(member: Member) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, row) of a jsonl or parquet file."""
    if member.name.endswith(".parquet"):
        yield from _parquet_rows(member)
        return
    for number, line in enumerate(text_of(member).split("\n"), 1):  # splitlines() also cuts at U+0085 and U+2028 inside a text
        if not line.strip():
            continue
        where = f"{member.where}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the line is not JSON: {error}.", where=where, fix="mend the line") from error
        if not isinstance(row, dict):
            raise DataError("the line is no JSON object.", where=where, fix="mend the line")
        yield where, row


def _parquet_rows(member: Member) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(member.read()))
    except Exception as error:  # pyarrow's own classes, OSError and ValueError
        raise DataError(f"the Parquet file cannot be read: {error}", where=member.where, fix="fetch it again") from error
    for number, row in enumerate(table.to_pylist()):
        yield f"{member.where}, row {number}", row
