"""infer_result/{time}.jsonl: each question and answer, written as soon as the answer is there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from megaswift.errors import UserError


class ResultWriter:
    """Appends rows to a new file; the file appears with the first row.

    Args:
        directory: made when needed. Files are named by the time, `{YYYYmmdd-HHMMSS}.jsonl`.
        go_on: rows may go into the newest file that is there: see `take_up`.
    """

    def __init__(self, directory: Path, *, go_on: bool = False) -> None:
        self._directory, self._go_on = directory, go_on
        self._file: IO[str] | None = None
        self.path: Path | None = None
        self.rows = 0

    def take_up(self, queries: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of the newest results file, where they answer the first of these questions; new rows are then added there.

        A line that was cut by a crash is removed from the file. Returns no rows where there is nothing to go on with.
        """
        files = sorted(self._directory.glob("*.jsonl"), key=lambda path: path.stat().st_mtime) if self._go_on else []
        if not files:
            return []
        data = files[-1].read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
            same = [row["query"] for row in rows] == list(queries[: len(rows)])
        except (ValueError, KeyError, TypeError):
            return []
        if not rows or not same or len(rows) > len(queries):
            return []
        if len(whole) < len(data):
            os.truncate(files[-1], len(whole))
        self.path, self.rows = files[-1], len(rows)
        return rows

    def write(self, row: dict[str, Any]) -> None:
        """Append one row and hand it to the operating system at once; raises UserError where that cannot be."""
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up()
            where = str(self.path or self._directory)
            fix = "name a directory that you can write to with --result_dir, or use --save_result false"
            raise UserError(f"cannot write results: {error}", where=where, fix=fix) from error
        self.rows += 1

    def _give_up(self) -> None:
        """Close a file that takes no more, and what is in its buffer; one without any row goes."""
        if self._file is not None and self.path is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
            if not self.rows:
                self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; harmless when there is none."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[str]:
        self._directory.mkdir(parents=True, exist_ok=True)
        if self.path is not None:
            return self.path.open("a", encoding="utf-8")
        stem = time.strftime("%Y%m%d-%H%M%S")
        for count in range(1000):  # two programs may start within one second
            self.path = self._directory / (f"{stem}.jsonl" if count == 0 else f"{stem}-{count}.jsonl")
            try:
                return self.path.open("x", encoding="utf-8")
            except FileExistsError:
                continue
        raise OSError(f"no free name for {stem}.jsonl")


def check_writable(directory: Path) -> None:
    """Raise UserError now, before a model is loaded, where results could not be written later."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        fix = "name a directory that you can write to with --result_dir, or use --save_result false"
        raise UserError(
            f"results cannot be written: {place} is no directory that you can write to.", where=str(directory), fix=fix
        )
