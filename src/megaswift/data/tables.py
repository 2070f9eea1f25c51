"""Numbered raw rows, and those of tables: CSV, Parquet and Arrow."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megaswift.data.conversation import BadRow
from megaswift.data.encoding import wrong_bytes
from megaswift.errors import DataError

Raw = bytes | str | dict[str, Any] | BadRow  # JSON text, a row, or why it is none
BLOCK_BYTES = 1 << 24


NULLS = "null members left out: tables give every struct the members of all (JSON text keeps its own nulls)"


class TableRow(dict[str, Any]):
    """A row of a table, without the null members of its structs.

    A struct of a table has the members of all rows, so that those of other rows' tools come back as null. They were never
    written, and must not be learnt. `nulls` names those that were left out, but for columns and for members of a message
    (role, content, ...), for which null means absent in every kind of file.
    """

    nulls: tuple[str, ...] = ()


def table_row(row: dict[str, Any]) -> TableRow:
    """A row as a library made it from a table."""
    found: dict[str, None] = {}
    result = TableRow((name, _pruned(value, name, 1, found)) for name, value in row.items())
    result.nulls = tuple(found)
    return result


def _pruned(value: Any, path: str, depth: int, found: dict[str, None]) -> Any:
    """A value without null members of structs; `depth`: how many structs, the row included, it stands in."""
    if isinstance(value, list):
        return [_pruned(item, path, depth, found) for item in value]
    if not isinstance(value, dict):
        return value
    for name, part in value.items():
        if part is None and (depth > 1 or path == "tools"):
            found[f"{path}.{name}"] = None
    return {name: _pruned(part, f"{path}.{name}", depth + 1, found) for name, part in value.items() if part is not None}


class Source(Protocol):
    """Numbered raw rows; `notes` tells what about their file is not as its name says."""

    @property
    def notes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def raw(self, index: int) -> Raw:
        """The row, undecoded."""

    def where(self, index: int) -> str:
        """Where the row stands, for messages: `file:line`."""


class DictRows:
    """Rows that are in memory already."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, rows: list[Any], numbers: list[int] | None = None) -> None:
        self.path, self.rows, self.numbers = path, rows, numbers

    def __len__(self) -> int:
        return len(self.rows)

    def raw(self, index: int) -> Raw:
        row = self.rows[index]
        return row if isinstance(row, (dict, BadRow)) else json.dumps(row)

    def where(self, index: int) -> str:
        return f"{self.path.name}: row {self.numbers[index] if self.numbers else index + 1}"


class Joined:
    """Several sources one after the other."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        self.bounds = np.cumsum([0, *(len(source) for source in sources)])

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(note for source in self.sources for note in source.notes)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def _locate(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self.bounds, index, side="right")) - 1
        return self.sources[part], index - int(self.bounds[part])

    def raw(self, index: int) -> Raw:
        source, local = self._locate(index)
        return source.raw(local)

    def where(self, index: int) -> str:
        source, local = self._locate(index)
        return source.where(local)


class TableRows:
    """Rows of an Arrow table, turned into dicts a block at a time (rows are read in rising order)."""

    BLOCK = 1024
    notes: tuple[str, ...] = ()

    def __init__(self, name: str, table: Any) -> None:
        self.name, self.table = name, table
        self.first = -1
        self.block: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self.table.num_rows

    def raw(self, index: int) -> TableRow:
        first = index - index % self.BLOCK
        if first != self.first:
            self.first, self.block = first, self.table.slice(first, self.BLOCK).to_pylist()
        return table_row(self.block[index - first])

    def where(self, index: int) -> str:
        return f"{self.name}: row {index + 1}"


def arrow_rows(path: Path, shown: Path) -> TableRows:
    """An Arrow file as `datasets` writes it (stream form) or the file form; memory-mapped. Messages name `shown`."""
    import pyarrow as pa

    try:
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"not a readable Arrow file: {error}.", where=str(shown)) from error
    return TableRows(shown.name, table)


class ParquetRows:
    """A Parquet file; one row group is in memory at a time. Messages name `shown`."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, shown: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = shown
        try:
            self.file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"not a readable Parquet file: {error}.", where=str(shown)) from error
        meta = self.file.metadata
        self.bounds = np.cumsum([0] + [meta.row_group(k).num_rows for k in range(meta.num_row_groups)])
        self.group, self.rows = -1, TableRows("", None)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def raw(self, index: int) -> TableRow:
        group = int(np.searchsorted(self.bounds, index, side="right")) - 1
        if group != self.group:
            try:
                self.group, self.rows = group, TableRows(self.path.name, self.file.read_row_group(group))
            except (OSError, ValueError) as error:
                raise DataError(f"the Parquet file is damaged: {error}.", where=f"{self.path}: row group {group}") from error
        return self.rows.raw(index - int(self.bounds[group]))

    def where(self, index: int) -> str:
        return f"{self.path.name}: row {index + 1}"


def csv_rows(path: Path, data: Any, delimiter: str) -> Source:
    """A CSV file with a header; every value is text, also `NA` and the empty one. Short or long lines are bad rows."""
    import pyarrow as pa
    from pyarrow import csv

    if not data:
        return DictRows(path, [])
    _require_utf8(path, data)
    wrong: list[BadRow] = []
    numbers: list[int] = []
    header = bytes(data[: data.find(b"\n") if data.find(b"\n") > 0 else len(data)])

    def remember(row: Any) -> str:
        wrong.append(BadRow("wrong number of columns", f"{row.actual_columns} found, {row.expected_columns} expected"))
        numbers.append(row.number - 1)  # counted with the header as 1
        return "skip"

    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=remember)
    try:
        names = csv.read_csv(pa.BufferReader(header + b"\n"), parse_options=csv.ParseOptions(delimiter=delimiter)).column_names
        convert = csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
        table = csv.read_csv(
            pa.BufferReader(pa.py_buffer(data)),
            parse_options=parse,
            convert_options=convert,
            read_options=csv.ReadOptions(use_threads=False, block_size=4 * BLOCK_BYTES),  # a row must fit into a block
        )
    except (pa.ArrowException, ValueError) as error:
        raise DataError(
            f"not a readable CSV file: {error}.", where=str(path), fix="save it as UTF-8 with one header line"
        ) from error
    rows = TableRows(path.name, table)
    return Joined([rows, DictRows(path, wrong, numbers)]) if wrong else rows


def _require_utf8(path: Path, data: Any) -> None:
    decoder, lines = codecs.getincrementaldecoder("utf-8")(), 1
    for first in range(0, len(data), BLOCK_BYTES):
        block = data[first : first + BLOCK_BYTES]
        try:
            decoder.decode(block, final=first + BLOCK_BYTES >= len(data))
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(10)
            raise wrong_bytes(path, lines + line, bytes(error.object).split(b"\n")[line]) from error
        lines += block.count(b"\n")
