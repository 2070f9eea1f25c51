"""Data that is read from its front only as far as a run needs it: large files and hub datasets (`--streaming true`)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from megaswift.data import hubs
from megaswift.data.encoding import refuse_utf16
from megaswift.data.read import BOM, files_of, is_lines, is_text, open_path, text_row
from megaswift.data.resolve import Dataset, find
from megaswift.data.spec import DatasetSpec
from megaswift.data.tables import Raw, table_row
from megaswift.errors import DataError


class Stream:
    """Rows one after the other, without a length.

    Args:
        name: for messages.
        parts: files, or iterables of rows that a hub sends.
    """

    def __init__(self, name: str, parts: list[Any]) -> None:
        self.name, self.parts = name, parts
        self.notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 0

    def rows(self, count: int | None) -> Iterator[Raw]:
        """The raw rows from the start, at most `count`."""
        return islice((row for part in self.parts for row in self._of(part)), count)

    def _of(self, part: Any) -> Iterator[Raw]:
        """The rows of a file, or of what a hub sends: its libraries make every row one of a table."""
        if not isinstance(part, Path):
            yield from map(table_row, part)
            return
        if not _is_whole(part):
            yield from _file_rows(part)
            return
        source = open_path(part)
        self.notes += source.notes
        yield from (source.raw(index) for index in range(len(source)))

    def raw(self, index: int) -> Raw:
        """A stream cannot be asked for one row."""
        raise TypeError(f"{self.name} is a stream")

    def where(self, index: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.name}: row {index + 1}"


def resolve_stream(spec: DatasetSpec, custom_dataset_info: str | None = None) -> Dataset:
    """Find one `--dataset` item, to be read as a stream. Raises UserError or DataError as `resolve` does."""
    found = find(spec, custom_dataset_info)
    if found.path is not None:
        files = files_of(found.path, found.subsets)
        marks = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        stream, digest = Stream(found.path.name, files), "\n".join(marks)
    else:
        parts, digest = hubs.stream(found.places, found.subsets, found.splits, spec.text)
        stream = Stream(spec.name, parts)
    return found.dataset(stream, digest)


def _file_rows(path: Path) -> Iterator[Raw]:
    """Rows of a file of lines, read one after the other."""
    plain = is_text(path)
    with _lines(path) as lines:
        for number, line in enumerate(lines):
            line = line.removeprefix(BOM) if number == 0 else line
            if line.strip():
                yield text_row(line) if plain else line


def _is_whole(path: Path) -> bool:
    """Whether a file must be opened as a whole: no file of lines, one JSON list, or text that may be JSON."""
    if not is_lines(path):
        return True
    with _lines(path) as lines:
        first = next(lines, b"")
        refuse_utf16(path, first[:4])
        first = first.removeprefix(BOM)
        while first and not first.strip():
            first = next(lines, b"")
    return first.lstrip()[:1] in ((b"[", b"{") if is_text(path) else (b"[",))


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[bytes]]:
    """The lines of a file, packed or not. Raises DataError where it cannot be read."""
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as handle:
            yield iter(handle)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the file: {error}.", where=str(path)) from error
