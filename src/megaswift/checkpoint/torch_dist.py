"""Reading and writing Megatron-Core's torch_dist directories one tensor at a time: no model, no process group, no GPU.

A directory holds `.metadata` (the index), `__0_{k}.distcp` (tensors, each saved by torch.save), `common.pt` (small
values) and `metadata.json` (the format's name). Layers are stacked: the key has no layer number, the global tensor has
a leading layer axis, and every chunk says where it lies in the global tensor.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megaswift.checkpoint.guard import load_index, load_object
from megaswift.errors import DataError

FORMAT_FILE, COMMON_FILE, INDEX_FILE = "metadata.json", "common.pt", ".metadata"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class Chunk:
    """A part of a global tensor, and how to get its values.

    Args:
        key: name in the checkpoint.
        global_shape, offset, shape: where the part lies; all of the global tensor's rank.
        produce: makes the values, reshapeable to `shape`; called once, when they are written.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    produce: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and SHA-256 of a written file."""

    size: int
    sha256: str


class HashingFile(io.RawIOBase):
    """A file that computes its SHA-256 while it is written."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.digest = hashlib.sha256()
        self.position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.file.write(view)
        self.position += len(view)
        return len(view)

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()

    def close(self) -> None:
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        super().close()


def write(directory: Path, chunks: list[Chunk], objects: list[str], common: dict[str, Any], threads: int = 2) -> dict[str, FileDigest]:
    """Write a torch_dist directory; memory holds one chunk for each thread.

    Args:
        directory: exists and is empty.
        objects: names of empty byte items (Megatron-Core keeps one beside each linear layer).
        common: small values for common.pt.

    Returns:
        Size and SHA-256 of every file written.
    """
    queues: list[list[Chunk]] = [[] for _ in range(threads)]
    load = [0] * threads
    for chunk in sorted(chunks, key=lambda item: -item.nbytes):
        lightest = load.index(min(load))
        queues[lightest].append(chunk)
        load[lightest] += chunk.nbytes
    queues = [queue for queue in queues if queue]
    empty = dict.fromkeys(objects)
    with ThreadPoolExecutor(len(queues)) as pool:
        jobs = [pool.submit(write_file, directory, f"__0_{k}.distcp", queue, {} if k else empty) for k, queue in enumerate(queues)]
        written = [job.result() for job in jobs]
    digests = {name: digest for name, digest, _ in written}
    tables = [tensor_table(chunks), object_table(empty)]
    return digests | write_index(directory, tables, [storage for _, _, storage in written], common)


def write_index(directory: Path, tables: list[dict[str, Any]], storage: list[dict[Any, Any]], common: dict[str, Any]) -> dict[str, FileDigest]:
    """Write common.pt, metadata.json and last the index, from the parts of all writers.

    Raises DataError unless the chunks of every tensor cover it exactly.
    """
    index = Metadata(state_dict_metadata=_merged(tables), storage_data={})
    for part in storage:
        index.storage_data.update(part)
    digests = {}
    for name, data in (
        (COMMON_FILE, _saved(common)),
        (FORMAT_FILE, json.dumps(FORMAT).encode()),
        (INDEX_FILE, pickle.dumps(index)),
    ):
        digests[name] = write_bytes(directory / name, data)
    return digests


def write_bytes(path: Path, data: bytes) -> FileDigest:
    """Write and fsync a small file."""
    with HashingFile(path) as file:
        file.write(data)
    return FileDigest(len(data), file.digest.hexdigest())


def tensor_table(chunks: list[Chunk]) -> dict[str, Any]:
    """Index entries of tensors: size, dtype and chunks."""
    table: dict[str, Any] = {}
    for chunk in chunks:
        if chunk.key not in table:
            table[chunk.key] = TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(chunk.global_shape), [])
        table[chunk.key].chunks.append(ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)))
    return table


def object_table(objects: dict[str, Any]) -> dict[str, Any]:
    """Index entries of byte items."""
    return {name: BytesStorageMetadata() for name in objects}


def _merged(tables: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for table in tables:
        for key, entry in table.items():
            if key in merged and hasattr(entry, "chunks"):
                merged[key].chunks.extend(entry.chunks)
            else:
                merged[key] = entry
    for key, entry in merged.items():
        if hasattr(entry, "chunks") and sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise DataError("the parts of a tensor do not cover it exactly once.", where=key, fix="nothing was saved; report it")
    return merged


def write_file(directory: Path, name: str, queue: list[Chunk], objects: dict[str, Any]) -> tuple[str, FileDigest, dict[Any, Any]]:
    """Write one data file and sync it: its name, digest and where each item lies in it."""
    storage: dict[Any, Any] = {}
    with HashingFile(directory / name) as file:
        for chunk in queue:
            value = chunk.produce().to(chunk.dtype).reshape(chunk.shape).contiguous()
            if value.untyped_storage().nbytes() != chunk.nbytes:  # torch.save writes the whole storage behind a view
                value = value.clone()
            start = file.position
            _save_tensor(value, file)
            storage[MetadataIndex(chunk.key, torch.Size(chunk.offset))] = _StorageInfo(name, start, file.position - start)
        for item, value in objects.items():
            start = file.position
            file.write(_saved([value]))  # Megatron-Core keeps a list of one
            storage[MetadataIndex(item)] = _StorageInfo(name, start, file.position - start)
    return name, FileDigest(file.position, file.digest.hexdigest()), storage


def _save_tensor(value: Tensor, file: HashingFile) -> None:
    torch.save(value, file)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


class Reader:
    """A torch_dist directory, read key by key. Raises DataError for what is missing or damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            found = json.loads((directory / FORMAT_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError("this is no torch_dist checkpoint: metadata.json is missing.", where=str(directory)) from error
        except ValueError as error:
            raise DataError("metadata.json is not JSON.", where=str(directory / FORMAT_FILE)) from error
        if found.get("sharded_backend") != "torch_dist":
            raise DataError(f"checkpoint format {found.get('sharded_backend')!r} is not torch_dist.", where=str(directory / FORMAT_FILE))
        index = load_index(directory / INDEX_FILE)
        self._tensors = {key: value for key, value in index.state_dict_metadata.items() if hasattr(value, "chunks")}
        self._storage = index.storage_data

    @property
    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).properties.dtype

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """A whole global tensor, or with `layer` the slice of the leading axis."""
        entry = self._entry(key)
        lead = () if layer is None else (layer,)
        result: Tensor | None = None
        shape = tuple(entry.size)[len(lead) :]
        covered = 0
        for chunk in entry.chunks:
            if lead and not chunk.offsets[0] <= lead[0] < chunk.offsets[0] + chunk.sizes[0]:
                continue
            part = self._read_chunk(key, chunk)
            if lead:
                part = part[lead[0] - chunk.offsets[0]]
            if tuple(part.shape) == shape:
                return part
            if result is None:
                result = torch.empty(shape, dtype=part.dtype)
            result[tuple(slice(start, start + size) for start, size in zip(chunk.offsets[len(lead) :], part.shape))] = part
            covered += part.numel()
        if result is None or covered != result.numel():
            raise DataError("chunks do not cover the tensor.", where=f"{self.directory}: {key}", fix="the checkpoint is incomplete")
        return result

    def _entry(self, key: str) -> Any:
        if key not in self._tensors:
            raise DataError(f"the checkpoint has no tensor {key}.", where=str(self.directory), fix="it was made for another model, or it is incomplete")
        return self._tensors[key]

    def _read_chunk(self, key: str, chunk: Any) -> Tensor:
        info = self._storage.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise DataError("a chunk of the tensor is not stored.", where=f"{self.directory}: {key} at {tuple(chunk.offsets)}")
        path = inside(self.directory, info.relative_path)
        try:
            with path.open("rb") as file:
                file.seek(info.offset)
                data = file.read(info.length)
        except OSError as error:
            raise DataError(f"cannot read a data file: {error.strerror}.", where=str(path)) from error
        if len(data) != info.length:
            raise DataError(f"the data file is too short: {info.length} bytes expected at {info.offset}, {len(data)} found.", where=str(path))
        value = load_object(data, f"{path}: {key}")
        if not isinstance(value, Tensor) or tuple(value.shape) != tuple(chunk.sizes):
            raise DataError("a stored chunk has another shape than the index says.", where=f"{path}: {key}")
        return value


def inside(directory: Path, name: str) -> Path:
    """The path of a file that an index names. Raises DataError for a name that leads out of the directory."""
    if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise DataError(f"the index names the file {name!r}, which is not inside the checkpoint.", where=str(directory))
    return directory / name
