"""Documents as tokens, end to end in one file, each stored once whatever rows are cut of it later.

A directory holds tokens.bin (unsigned 16-bit ids where the vocabulary allows, else int32), offsets.bin (int64: the first token of each
document, and the end) and index.json. Of Megatron's indexed files whose documents end as they must it holds the offsets alone, and names the .bin file.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.errors import DataError

BLOCK = 1 << 24  # tokens that are looked at at a time


class DocumentWriter:
    """Appends documents to an empty directory; it holds none of them.

    Args:
        small: ids fit into 16 bits.
    """

    def __init__(self, path: Path, small: bool) -> None:
        self.path, self.dtype = path, "<u2" if small else "<i4"
        self._tokens, self._offsets = ((path / name).open("wb") for name in ("tokens.bin", "offsets.bin"))
        self._hash, self._borders = hashlib.sha256(), hashlib.sha256()
        self.tokens, self.documents, self.largest_id = 0, 0, -1
        self._put_offsets(np.zeros(1, "<i8"))

    def add(self, ids: np.ndarray, sizes: list[int]) -> None:
        """Append documents given end to end: their ids, and the tokens of each."""
        if not sizes:
            return
        data = ids.astype(self.dtype).tobytes()
        self._tokens.write(data)
        self._hash.update(data)
        self._put_offsets(self.tokens + np.cumsum(sizes, dtype="<i8"))
        self.tokens, self.documents = self.tokens + len(ids), self.documents + len(sizes)
        self.largest_id = max(self.largest_id, int(ids.max()))

    def _put_offsets(self, offsets: np.ndarray) -> None:
        data = offsets.astype("<i8").tobytes()
        self._offsets.write(data)
        self._borders.update(data)

    def abandon(self) -> None:
        """Close the files of a directory that is given up."""
        for file in (self._tokens, self._offsets):
            with suppress(OSError):
                file.close()

    def finish(self, more: dict[str, Any]) -> None:
        """Write the index, with these further entries."""
        self._tokens.close()
        self._offsets.close()
        index = {"tokens": "tokens.bin", "dtype": self.dtype, "count": self.tokens, "documents": self.documents}
        fingerprint = hashlib.sha256(self._hash.digest() + self._borders.digest()).hexdigest()[:32]
        _write_index(self.path, index | {"largest_id": self.largest_id, "fingerprint": fingerprint} | more)


def write_in_place(path: Path, tokens: Path, dtype: str, offsets: np.ndarray, more: dict[str, Any]) -> None:
    """Fill an empty directory for tokens that stay where they are: one pass over them finds the fingerprint and the largest id."""
    whole, borders, largest = hashlib.sha256(), offsets.astype("<i8").tobytes(), -1
    ids = np.memmap(tokens, dtype, "r")
    for first in range(0, len(ids), BLOCK):
        block = np.asarray(ids[first : first + BLOCK])
        whole.update(block.tobytes())
        largest = max(largest, int(block.max()))
        if int(block.min()) < 0:
            raise DataError(
                "the file has a token id below 0.", where=str(tokens), fix="make the files again with the model's tokenizer"
            )
    (path / "offsets.bin").write_bytes(borders)
    fingerprint = hashlib.sha256(whole.digest() + hashlib.sha256(borders).digest()).hexdigest()[:32]
    index = {"tokens": str(tokens.absolute()), "dtype": dtype, "count": len(ids), "documents": len(offsets) - 1}
    _write_index(path, index | {"largest_id": largest, "fingerprint": fingerprint} | more)


def _write_index(path: Path, index: dict[str, Any]) -> None:
    (path / "index.json").write_text(json.dumps({"format": 1} | index, ensure_ascii=False), encoding="utf-8")


class Documents:
    """Documents of a directory, read through memory maps.

    Attributes:
        tokens: ids of all documents, end to end.
        offsets: int64 [documents + 1], the first token of each, and the end.
        fingerprint: the same exactly where tokens and borders are.
        largest_id: of all tokens.
        index: what index.json says.
    """

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path, self.index = path, index
        self.fingerprint, self.largest_id = str(index["fingerprint"]), int(index["largest_id"])
        tokens, dtype = path / str(index["tokens"]), np.dtype(str(index["dtype"]))  # an absolute path stays as it is
        count, documents = int(index["count"]), int(index["documents"])
        for file, size in ((tokens, count * dtype.itemsize), (path / "offsets.bin", 8 * (documents + 1))):
            if file.stat().st_size != size:
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes, expected {size}")
        self.tokens = np.memmap(tokens, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)
        self.offsets = np.memmap(path / "offsets.bin", "<i8", "r", shape=(documents + 1,))
        if int(self.offsets[-1]) != count:
            raise ValueError(f"offsets.bin ends at {int(self.offsets[-1])}, expected {count}")

    @classmethod
    def open(cls, path: Path | str) -> Documents:
        """Open a directory. Raises DataError where it is not whole."""
        path = Path(path)
        try:
            return cls(path, json.loads((path / "index.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"the tokenized text cannot be read: {error}.", where=str(path), fix="delete this directory; it is made again"
            ) from error

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def starts(self, first: int, last: int) -> np.ndarray:
        """Tokens from `first` to `last`, the last one not included, at which a document begins (int64)."""
        one, other = np.searchsorted(self.offsets[:-1], [first, last])
        return np.asarray(self.offsets[one:other])
