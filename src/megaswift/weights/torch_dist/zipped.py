"""Read what torch.save wrote without running code from it and without copying: tensors are views of the mapped file.

torch.save makes a zip archive of uncompressed records: `data.pkl`, which may here only name the few functions and types
that tensors and plain values are made of, and `data/N`, the raw bytes of storage N.
"""

from __future__ import annotations

import argparse
import io
import math
import mmap
import pickle
import struct
import sys
import threading
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaswift.errors import DataError, first_line
from megaswift.store.files import forget_pages, read_in_background
from megaswift.weights.hf.unpickle import GuardedUnpickler
from megaswift.weights.torch_dtypes import OF_STORAGE

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# Packages whose objects stand in old checkpoints beside the weights (enums, random states): kept as inert placeholders.
_INERT = ("megatron.", "transformer_engine.", "numpy.", "_codecs.", "_io.", "swift.", "torch.distributed.")


class Placeholder:
    """Stands for an object of a class that is not loaded; it takes any arguments and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        return self

    def __hash__(self) -> int:
        return id(self)

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class Mapped:
    """A file mapped into memory, copy on write: it never changes, and pages come back with `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as handle:
            self.size = path.stat().st_size
            if self.size == 0:
                raise DataError("the data file is empty.", where=str(path), fix="use another checkpoint")
            self.map = mmap.mmap(
                handle.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )

    def release(self, start: int, length: int) -> None:
        """Give back the memory of a range; views of it stay valid and are read again when used."""
        forget_pages(self.map, start, start + length)

    def prefetch(self, start: int, length: int) -> None:
        """Ask the system to read a range in the background."""
        read_in_background(self.path, start, length)


def load(mapped: Mapped, start: int, length: int, where: str) -> Any:
    """The object that torch.save wrote at a place of a mapped file; its tensors are views, to be treated as read-only.

    Raises DataError for anything damaged, and for a pickle that names what no checkpoint needs.
    """
    if start < 0 or length <= 0 or start + length > mapped.size:
        raise DataError(
            f"the data file is too short: bytes {start} to {start + length} of {mapped.size}.",
            where=where,
            fix="use another checkpoint",
        )
    try:
        archive = _Archive(mapped, start, length)
        return _Unpickler(archive).load()
    except DataError:
        raise
    except Exception as error:  # a damaged archive or pickle raises almost anything
        reason = first_line(error)
        raise DataError(
            f"an object in the checkpoint is damaged or not safe to read: {reason}", where=where, fix="use another checkpoint"
        ) from error


class _Window(io.RawIOBase):
    """A range of a mapped file as a file of its own."""

    def __init__(self, mapped: Mapped, start: int, length: int) -> None:
        self._map, self._start, self._length, self._position = mapped.map, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        stop = self._length if size is None or size < 0 else min(self._length, self._position + size)
        data = self._map[self._start + self._position : self._start + stop]
        self._position += len(data)
        return data


class _Archive:
    """The records of one archive: where each lies in the file."""

    def __init__(self, mapped: Mapped, start: int, length: int) -> None:
        self.mapped = mapped
        self.places: dict[str, tuple[int, int]] = {}
        for info in zipfile.ZipFile(_Window(mapped, start, length)).infolist():
            name = info.filename.partition("/")[2]
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {name} is compressed")
            header = start + info.header_offset
            if info.header_offset < 0 or header + 30 > start + length:
                raise ValueError(f"record {name} lies outside of the archive")
            names, extra = struct.unpack("<HH", mapped.map[header + 26 : header + 30])
            place = header + 30 + names + extra
            if place + info.file_size > start + length:
                raise ValueError(f"record {name} reaches beyond the archive")
            self.places[name] = (place, info.file_size)
        if self.bytes("byteorder", b"little") != b"little":
            raise ValueError("the archive was written on a big-endian machine")

    def bytes(self, name: str, default: bytes | None = None) -> bytes:
        if name not in self.places and default is not None:
            return default
        start, length = self.places[name]
        return self.mapped.map[start : start + length]

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """All elements of a storage, as a flat view of the file."""
        start, length = self.places[f"data/{key}"]
        if count * dtype.itemsize != length:
            raise ValueError(f"storage {key} has {length} bytes, {count * dtype.itemsize} expected")
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if start % dtype.itemsize:  # torch aligns records within an archive, but an archive may start anywhere
            return torch.frombuffer(self.mapped.map, dtype=torch.uint8, count=length, offset=start).clone().view(dtype)
        return torch.frombuffer(self.mapped.map, dtype=dtype, count=count, offset=start)


class _Unpickler(GuardedUnpickler):
    def __init__(self, archive: _Archive) -> None:
        super().__init__(archive.bytes("data.pkl"))
        self._archive = archive
        self._storages: dict[str, Tensor] = {}

    def known(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module == "torch" and name in OF_STORAGE:
            return OF_STORAGE[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if f"{module}.".startswith(_INERT):
            return Placeholder
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")

    def persistent_load(self, identity: Any) -> Tensor:
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        if key not in self._storages:
            self._storages[key] = self._archive.storage(key, dtype, count)
        return self._storages[key]


def _rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    size, stride = tuple(size), tuple(stride)
    if all(size) and offset + sum((n - 1) * s for n, s in zip(size, stride)) >= storage.numel():
        raise ValueError("a tensor reaches beyond its storage")
    if math.prod(size) > storage.numel():  # a stride of 0 would make any size out of one value
        raise ValueError("a tensor is larger than its storage")
    return torch.as_strided(storage, size, stride, offset)


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("collections", "OrderedDict"): OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): Placeholder,
    ("builtins", "set"): set,
    ("builtins", "complex"): complex,
    ("builtins", "slice"): slice,
}


_plain_lock, _plain_users = threading.Lock(), [0, True]


@contextmanager
def without_checksums() -> Iterator[None]:
    """torch.save without the CRC-32 of its records, which costs as much as writing them; the manifest has SHA-256 sums.

    The setting is the process's, so it is put back when the last thread is done.
    """
    from torch.serialization import get_crc32_options, set_crc32_options

    with _plain_lock:
        if _plain_users[0] == 0:
            _plain_users[1] = get_crc32_options()
            set_crc32_options(False)
        _plain_users[0] += 1
    try:
        yield
    finally:
        with _plain_lock:
            _plain_users[0] -= 1
            if _plain_users[0] == 0:
                set_crc32_options(bool(_plain_users[1]))
