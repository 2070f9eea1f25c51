"""Megatron-LM's indexed files: PREFIX.bin holds token ids end to end, PREFIX.idx where sequences and documents begin."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaswift.errors import DataError

_HEADER = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")  # header, version, kind of numbers, sequences, entries of the document table
# Of Megatron's codes those that token ids may have.
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True)
class Indexed:
    """A pair of files.

    Attributes:
        tokens: the .bin file.
        dtype: of its numbers, in numpy's words.
        offsets: int64 [documents + 1], the first token of each document, and the end.
    """

    tokens: Path
    dtype: str
    offsets: np.ndarray


def prefix_of(path: Path) -> Path | None:
    """The common beginning of the pair of files that a path means: itself, or either file of the pair; else None."""
    for prefix in (path, path.with_suffix("") if path.suffix in (".bin", ".idx") else path):
        if Path(f"{prefix}.idx").is_file() and Path(f"{prefix}.bin").is_file():
            return prefix
    return None


def open_indexed(prefix: Path) -> Indexed:
    """The document table of a pair. Raises DataError for what is not one, or not of token ids."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        with index.open("rb") as file:
            header, version, code, sequences, documents = _HEAD.unpack(file.read(_HEAD.size))
    except (OSError, struct.error) as error:
        raise _damaged(index, str(error)) from error
    if header != _HEADER or version != 1:
        raise _damaged(index, "it does not begin as one of version 1")
    if code not in _DTYPES:
        raise DataError("the files hold no token ids.", where=str(index), fix="make them with preprocess_data.py")
    needed = _HEAD.size + sequences * 12 + documents * 8
    if index.stat().st_size < needed or documents < 1:
        raise _damaged(index, f"it has {index.stat().st_size:,} bytes, {needed:,} are needed")
    lengths = np.memmap(index, "<i4", "r", _HEAD.size, (sequences,)) if sequences else np.zeros(0, "<i4")
    begins = np.memmap(index, "<i8", "r", _HEAD.size + 4 * sequences, (sequences,)) if sequences else np.zeros(0, "<i8")
    borders = np.memmap(index, "<i8", "r", _HEAD.size + 12 * sequences, (documents,))
    dtype = np.dtype(_DTYPES[code])
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if not np.array_equal(begins, ends[:-1] * dtype.itemsize):
        raise _damaged(index, "its sequences do not lie end to end")
    if borders[0] != 0 or borders[-1] != sequences or (np.diff(borders) < 0).any():
        raise _damaged(index, "its documents are not all of its sequences, in their order")
    if tokens.stat().st_size != int(ends[-1]) * dtype.itemsize:
        raise DataError(
            f"the file has {tokens.stat().st_size:,} bytes, its index counts {int(ends[-1]) * dtype.itemsize:,}.",
            where=str(tokens),
            fix="copy both files again",
        )
    offsets = ends[borders]
    return Indexed(tokens, dtype.str, offsets[np.concatenate([[True], np.diff(offsets) > 0])])


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"not a readable index of Megatron-LM: {why}.", where=str(path), fix="make or copy the pair of files again"
    )
