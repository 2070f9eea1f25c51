"""pytorch_model.bin without running code from it: where each tensor's bytes lie in the file, found by a restricted unpickler.

torch.save makes a zip archive of uncompressed records: `data.pkl`, which may here only name the few functions and types
that a table of tensors is made of, and `data/N`, the raw bytes of storage N. Like a safetensors header it gives entries;
the values are then read from the mapped file.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megaswift.errors import DataError, first_line
from megaswift.weights.dtypes import HEADER_OF_STORAGE, ITEM_SIZE
from megaswift.weights.hf.header import MAX_ELEMENTS, TensorEntry
from megaswift.weights.hf.json_files import inside, read_json
from megaswift.weights.hf.unpickle import GuardedUnpickler

SINGLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
MAX_TABLE = 256 * 2**20  # bytes of data.pkl
_SAVE_AGAIN = "load the model with transformers where you trust it, and save it again as safetensors"


def pickled_files(path: Path) -> list[Path]:
    """The pickle files that make up a model: those of pytorch_model.bin.index.json, else pytorch_model.bin; [] for none.

    Raises DataError for an index that names anything but .bin files of this directory.
    """
    index = path / PICKLE_INDEX
    if not index.exists():
        return [path / SINGLE] if (path / SINGLE).exists() else []
    named = read_json(inside(path, index)).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise DataError(f"{PICKLE_INDEX} has no weight_map.", where=str(index), fix="fetch this file again")
    for tensor, file in named.items():
        plain = isinstance(file, str) and file.isprintable() and not any(mark in file for mark in "/\\:")
        if not plain or not file.endswith(".bin") or file.startswith("."):
            raise DataError(
                f"{PICKLE_INDEX} places tensor {tensor!r} in {file!r}; only .bin files of this directory are read.",
                where=str(index),
                fix="fetch the model again from a source that you trust",
            )
    return sorted({path / file for file in named.values()})


def read_pickle(path: Path) -> list[TensorEntry]:
    """The tensors of a file that torch.save wrote, in the order of their data.

    Raises DataError for anything but a flat table of plain tensors, naming what stands in the way; nothing in the file runs.
    """
    try:
        return _read(path)
    except DataError:
        raise
    except Exception as error:  # a damaged archive or pickle raises almost anything
        raise _refused(path, first_line(error)) from error


def _read(path: Path) -> list[TensorEntry]:
    with zipfile.ZipFile(path) as archive:
        records = _records(path, archive, path.stat().st_size)
        table = _Unpickler(archive.read(_named(archive, "data.pkl", MAX_TABLE))).load()
    if not isinstance(table, dict):
        raise _refused(path, f"it holds {type(table).__name__}, not a table of tensors")
    entries = []
    for name, part in table.items():
        if not isinstance(name, str) or not isinstance(part, _Part):
            raise _refused(path, f"entry {str(name)[:80]!r} is not a plain tensor")
        entries.append(_entry(path, name, part, records))
    return sorted(entries, key=lambda entry: (entry.start, entry.stop))


def _refused(path: Path, reason: str) -> DataError:
    return DataError(f"{path.name} is damaged or not safe to read: {reason}.", where=str(path), fix=_SAVE_AGAIN)


def _named(archive: zipfile.ZipFile, name: str, limit: int) -> zipfile.ZipInfo:
    found = [info for info in archive.infolist() if info.filename.partition("/")[2] == name]
    if len(found) != 1 or found[0].file_size > limit:
        raise ValueError(f"{len(found)} records are named {name}, or it is too large")
    return found[0]


def _records(path: Path, archive: zipfile.ZipFile, size: int) -> dict[str, tuple[int, int]]:
    """Record name -> first byte and length of its data in the file."""
    places = {}
    with path.open("rb") as file:
        for info in archive.infolist():
            name = info.filename.partition("/")[2]
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {name} is compressed")
            file.seek(info.header_offset + 26)
            names, extra = struct.unpack("<HH", file.read(4))
            start = info.header_offset + 30 + names + extra
            if start + info.file_size > size:
                raise ValueError(f"record {name} reaches beyond the file")
            places[name] = (start, info.file_size)
    if "byteorder" in places and archive.read(_named(archive, "byteorder", 16)) != b"little":
        raise ValueError("it was written on a big-endian machine")
    return places


@dataclass(frozen=True)
class _Part:
    """A tensor as the pickle describes it: a view of a storage."""

    dtype: str
    key: str
    count: int  # elements of the storage
    offset: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


def _entry(path: Path, name: str, part: _Part, records: dict[str, tuple[int, int]]) -> TensorEntry:
    """Where a tensor's bytes lie. Raises DataError for a view that is not one piece of its storage, row by row."""
    width = ITEM_SIZE[part.dtype]
    start, length = records.get(f"data/{part.key}", (0, -1))
    numbers = (part.offset, part.count, *part.shape, *part.stride)
    if len(part.shape) != len(part.stride) or not all(type(number) is int and number >= 0 for number in numbers):
        raise _refused(path, f"the shape of tensor {name!r} is not one")
    elements = math.prod(part.shape)
    if length != part.count * width or elements > MAX_ELEMENTS or part.offset + elements > part.count:
        raise _refused(path, f"tensor {name!r} reaches beyond its storage")
    expected, step = [], 1
    for extent in reversed(part.shape):
        expected.append(step)
        step *= extent
    if elements and any(n > 1 and have != want for n, have, want in zip(part.shape, part.stride, reversed(expected))):
        raise _refused(path, f"tensor {name!r} is not stored row by row")
    first = start + part.offset * width
    return TensorEntry(name, part.dtype, part.shape, path, first, first + elements * width)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Part:
    if not isinstance(storage, _Part):
        raise pickle.UnpicklingError("a tensor without a storage")
    return replace(storage, offset=offset, shape=tuple(size), stride=tuple(stride))


def _parameter(data: Any, *_: Any) -> Any:
    return data


class _Unpickler(GuardedUnpickler):
    """Knows OrderedDict, torch's two ways to put a tensor together, and the names of storages; nothing else has a name."""

    def known(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in HEADER_OF_STORAGE:
            return HEADER_OF_STORAGE[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of tensors needs")

    def persistent_load(self, identity: Any) -> _Part:
        kind, dtype, key, _, count = identity
        if kind != "storage" or dtype not in ITEM_SIZE or not isinstance(key, str):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        return _Part(dtype, key, count)
