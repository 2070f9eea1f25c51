"""Read and check the header of one safetensors file, trusting nothing that it says.

A file is: 8 bytes (header length, little endian), the header (JSON: name -> dtype, shape, data_offsets), then the data,
which the tensors must cover without gap, overlap or remainder. Every error names the file and its size.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.errors import DataError
from megaswift.weights.dtypes import ITEM_SIZE

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_ELEMENTS = 2**50  # of one tensor; keeps products of absurd shapes out of every later computation


_FETCH_AGAIN = "fetch this file again"
_FOREIGN = (  # how files begin that are often found in the place of weights, what they are, and how to mend it
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` in this directory"),
    (b"<!doctype", "an HTML page, not the weights", _FETCH_AGAIN),
    (b"<html", "an HTML page, not the weights", _FETCH_AGAIN),
    (b"<?xml", "an XML page, not the weights", _FETCH_AGAIN),
    (b"pk\x03\x04", "a zip or PyTorch pickle file, which is not read", "save the model as safetensors"),
    (b"\x80\x02", "a pickle file, which is not read", "save the model as safetensors"),
    (b"\x80\x04", "a pickle file, which is not read", "save the model as safetensors"),
    (b"gguf", "a GGUF file", "give the folder of the model that it was made from, with safetensors files"),
    (b"\x1f\x8b", "a gzip file", "unpack it"),
)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` and `stop` are byte positions in `file`."""

    name: str
    dtype: str  # as in the header, for example "BF16"
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.stop - self.start


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file, in the order of their data. Raises DataError for any fault."""
    size = _size(path)
    with path.open("rb") as file:
        head = file.read(64)
        if head[8:9] != b"{":  # otherwise the length bytes of a sound file could look like the start of a pickle
            _refuse_foreign(path, size, head)
        length = int.from_bytes(head[:8], "little")
        if length > MAX_HEADER or length > size - 8:
            raise _error(
                path,
                size,
                f"its header claims {length:,} bytes, more than {'is allowed' if length > MAX_HEADER else 'there are'}",
            )
        file.seek(8)
        raw = file.read(length)
    entries = [
        _entry(path, size, 8 + length, name, value) for name, value in _parse(path, size, raw).items() if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_cover(path, size, 8 + length, entries)
    return entries


def _size(path: Path) -> int:
    """Size of a regular, readable, non-empty file."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"weight file {path.name} is missing or not readable: {error.strerror}.", where=str(path), fix=_FETCH_AGAIN
        ) from error
    if not path.is_file():
        raise DataError(f"weight file {path.name} is not a regular file.", where=str(path))
    if size == 0:
        raise DataError(f"weight file {path.name} is empty (0 bytes).", where=str(path), fix=_FETCH_AGAIN)
    if not os.access(path, os.R_OK):
        raise DataError(f"weight file {path.name} may not be read by this user.", where=str(path), fix="change its permissions")
    return size


def _refuse_foreign(path: Path, size: int, head: bytes) -> None:
    """Raise DataError, naming the usual things that are found in the place of safetensors."""
    low = head.lstrip().lower()
    for start, what, fix in _FOREIGN:
        if low.startswith(start):
            raise DataError(f"weight file {path.name} ({size:,} bytes) is {what}.", where=str(path), fix=fix)
    raise _error(path, size, "it does not start with a safetensors header")


def _parse(path: Path, size: int, raw: bytes) -> dict[str, Any]:
    """The header as a dict; a name that occurs twice is an error, which json.loads alone would not see."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _error(path, size, f"its header names {twice!r} twice")
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _error(path, size, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _error(path, size, "its header is not a JSON object")
    return header


def _entry(path: Path, size: int, base: int, name: str, value: Any) -> TensorEntry:
    """One checked header entry, with offsets counted from the start of the file."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _error(path, size, f"the header entry of {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise DataError(
            f"tensor {name!r} has dtype {dtype!r}, which is not supported (known: {', '.join(ITEM_SIZE)}).",
            where=str(path),
            fix="quantised weights cannot be trained; take the bf16, fp16 or fp32 version of the model",
        )
    if not isinstance(shape, list) or not all(_natural(part) for part in shape):
        raise _error(path, size, f"tensor {name!r} has the shape {shape!r}")
    elements = math.prod(shape)
    if elements > MAX_ELEMENTS:
        raise _error(path, size, f"tensor {name!r} claims {elements:,} elements")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_natural(part) for part in offsets)
        or offsets[0] > offsets[1]
    ):
        raise _error(path, size, f"tensor {name!r} has the data_offsets {offsets!r}")
    start, stop = offsets
    expected = elements * ITEM_SIZE[dtype]
    if stop - start != expected:
        raise _error(
            path, size, f"tensor {name!r} ({dtype} {shape}) needs {expected:,} bytes, its data_offsets span {stop - start:,}"
        )
    return TensorEntry(name, dtype, tuple(shape), path, base + start, base + stop)


def _check_cover(path: Path, size: int, base: int, entries: list[TensorEntry]) -> None:
    """The data of all tensors must follow one another from the end of the header to the end of the file."""
    position, before = base, "the header"
    for entry in entries:
        if entry.start != position:
            kind = "overlaps with" if entry.start < position else "leaves a gap after"
            raise _error(path, size, f"tensor {entry.name!r} {kind} {before}")
        position, before = entry.stop, repr(entry.name)
    if position != size:
        kind = "is truncated" if size < position else "has bytes behind its last tensor"
        raise DataError(
            f"weight file {path.name} {kind}: expected {position:,} bytes, found {size:,}.", where=str(path), fix=_FETCH_AGAIN
        )


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _error(path: Path, size: int, what: str) -> DataError:
    return DataError(f"weight file {path.name} ({size:,} bytes) is damaged: {what}.", where=str(path), fix=_FETCH_AGAIN)
