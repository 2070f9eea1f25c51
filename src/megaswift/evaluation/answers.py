"""answers.jsonl: every question with its answer and verdict, written at once, and found again by a later evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from megaswift.errors import UserError

ANSWERS = "answers.jsonl"


def answer_key(*parts: Any) -> str:
    """Hash of everything that an answer depends on: weights, prompt, decoding, backend."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str).encode()).hexdigest()[:32]


class AnswerStore:
    """Appends answers to answers.jsonl of an evaluation and knows those of earlier ones.

    Args:
        directory: of this evaluation; must exist.
        earlier: directories whose answers may be taken (--eval_use_cache).
    """

    def __init__(self, directory: Path, earlier: Iterable[Path] = ()) -> None:
        self.path = directory / ANSWERS
        self._known: dict[str, dict[str, Any]] = {}
        for place in earlier:
            for row in read_answers(place / ANSWERS):
                if isinstance(row.get("key"), str):
                    self._known[row["key"]] = row
        self._file: IO[str] | None = None
        self.reused = 0

    def known(self, key: str) -> dict[str, Any] | None:
        """An answer that an earlier evaluation has, or None."""
        return self._known.get(key)

    def write(self, row: dict[str, Any]) -> None:
        """Append one answer and hand it to the operating system. Raises UserError where that cannot be."""
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"answers cannot be written: {error}", where=str(self.path), fix="free space, or name another --eval_output_dir"
            ) from error

    def close(self) -> None:
        """Close the file; harmless when there is none."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of an answers file; torn lines, which a crash leaves, are left out."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
