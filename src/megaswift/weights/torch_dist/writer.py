"""Writing Megatron-Core's torch_dist directories one tensor at a time: no model, no process group, no GPU (reader.py reads).

A directory holds `.metadata` (the index), `__0_{k}.distcp` (tensors, each saved by torch.save), `common.pt` (small
values) and `metadata.json` (the format's name). Layers are stacked: the key has no layer number, the global tensor has
a leading layer axis, and every chunk says where it lies in the global tensor.
"""

from __future__ import annotations

import io
import json
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

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

from megaswift.errors import DataError
from megaswift.store.files import Cancelled, FileRecord, HashedFile, reading_ahead, write_small
from megaswift.store.publish import Workspace
from megaswift.weights.torch_dist import zipped

FORMAT_FILE, COMMON_FILE, INDEX_FILE = "metadata.json", "common.pt", ".metadata"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
FILE_BYTES = 1 << 30  # size at which a new data file begins: what is complete of an interrupted conversion is kept by files
_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Chunk:
    """A part of a global tensor, and how to get its values.

    Args:
        key: name in the checkpoint.
        global_shape, offset, shape: where the part lies; all of the global tensor's rank.
        produce: makes the values, reshapeable to `shape`; called once, when they are written.
        names: what the values stand for; chunks with the same names are written to one file, in their order.
        prepare, release: called some chunks ahead, and once the chunk is written.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    produce: Callable[[], Tensor]
    names: tuple[str, ...] = ()
    prepare: Callable[[], None] | None = None
    release: Callable[[], None] | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


FileDigest = FileRecord


def write(
    directory: Path, chunks: list[Chunk], objects: list[str], common: dict[str, Any], threads: int = 2, *,
    work: Workspace | None = None, notes: dict[str, str] | None = None, progress: Callable[[int], None] | None = None,
) -> dict[str, FileDigest]:  # fmt: skip
    """Write a torch_dist directory; memory holds one chunk for each thread.

    Args:
        directory: exists and holds no data files but those that `work` knows as complete.
        chunks: in the order in which they are best read; chunks that share names stay together.
        objects: names of empty byte items (Megatron-Core keeps one beside each linear layer).
        common: small values for common.pt.
        work: keeps the files that an interrupted conversion completed.
        notes: filled by `produce`, for each name in Chunk.names; kept and restored with the file.
        progress: called with the number of bytes written, from any thread.

    Returns:
        Size and SHA-256 of every file written.
    """
    notes = {} if notes is None else notes
    cancel, turn = threading.Event(), threading.Semaphore(threads)
    empty = dict.fromkeys(objects)

    def one(number: int, queue: list[Chunk]) -> tuple[str, FileDigest, dict[Any, Any]]:
        if cancel.is_set():
            raise Cancelled
        name = f"__0_{number}.distcp"
        try:
            done = work.finished(directory, name) if work is not None else None
            if done is not None:
                notes.update(done["notes"])
                return name, FileDigest(done["size"], done["sha256"]), _storage_of(name, done["places"])
            result = write_file(directory, name, queue, {} if number else empty, cancel=cancel, progress=progress, turn=turn)
            if work is not None:
                kept = {item: notes[item] for chunk in queue for item in chunk.names}
                work.record(name, result[1], notes=kept, places=_places_of(result[2]))
            return result
        except BaseException:
            cancel.set()
            raise

    queues = _files(chunks, threads)
    with ThreadPoolExecutor(2 * threads) as pool:  # half of them may wait for the disk
        jobs = [pool.submit(one, number, queue) for number, queue in enumerate(queues)]
        try:
            failures = [error for job in jobs if (error := job.exception()) is not None]
        except BaseException:  # interrupted while waiting: the pool waits for its threads, so they must hear of it
            cancel.set()
            raise
    for error in failures:
        if not isinstance(error, Cancelled):
            raise error
    written = [job.result() for job in jobs]
    digests = {name: digest for name, digest, _ in written}
    tables = [tensor_table(chunks), object_table(empty)]
    return digests | write_index(directory, tables, [storage for _, _, storage in written], common)


def _files(chunks: list[Chunk], threads: int) -> list[list[Chunk]]:
    """Cut the chunks, in the order given, into files; chunks that share names stay in one file."""
    total = sum(chunk.nbytes for chunk in chunks)
    limit = min(FILE_BYTES, -(-total // threads))
    queues: list[list[Chunk]] = [[]]
    filled, last = 0, None
    for chunk in chunks:
        if filled >= limit and not (chunk.names and chunk.names == last):
            queues.append([])
            filled = 0
        queues[-1].append(chunk)
        filled, last = filled + chunk.nbytes, chunk.names
    return queues


def _places_of(storage: dict[Any, Any]) -> list[list[Any]]:
    """Where the items of a file lie, as JSON-ready rows."""
    return [
        [index.fqn, None if index.offset is None else list(index.offset), info.offset, info.length]
        for index, info in storage.items()
    ]


def _storage_of(name: str, places: list[list[Any]]) -> dict[Any, Any]:
    return {
        (MetadataIndex(key) if offset is None else MetadataIndex(key, torch.Size(offset))): _StorageInfo(name, start, length)
        for key, offset, start, length in places
    }


def write_index(
    directory: Path,
    tables: list[dict[str, Any]],
    storage: list[dict[Any, Any]],
    common: dict[str, Any],
    some_layers: str | None = None,
) -> dict[str, FileDigest]:
    """Write common.pt, metadata.json and last the index, from the parts of all writers.

    Args:
        some_layers: tensors whose names begin so may lack whole layers, those that are not trained.

    Raises DataError unless the chunks of every tensor cover it exactly.
    """
    index = Metadata(state_dict_metadata=_merged(tables, some_layers), storage_data={})
    for part in storage:
        index.storage_data.update(part)
    digests = {}
    for name, data in (
        (COMMON_FILE, _saved(common)),
        (FORMAT_FILE, json.dumps(FORMAT).encode()),
        (INDEX_FILE, pickle.dumps(index)),
    ):
        (directory / name).unlink(missing_ok=True)  # an interrupted conversion may have left it
        digests[name] = write_small(directory / name, data)
    return digests


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


def _merged(tables: list[dict[str, Any]], some_layers: str | None = None) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for table in tables:
        for key, entry in table.items():
            if key in merged and hasattr(entry, "chunks"):
                merged[key].chunks.extend(entry.chunks)
            else:
                merged[key] = entry
    for key, entry in merged.items():
        if not hasattr(entry, "chunks"):
            continue
        held, whole = sum(chunk.sizes.numel() for chunk in entry.chunks), entry.size.numel()
        may_lack = some_layers is not None and key.startswith(some_layers) and 0 < held < whole
        if held != whole and not (may_lack and held % (whole // entry.size[0]) == 0):
            raise DataError(
                "the parts of a tensor do not cover it exactly once.", where=key, fix="nothing was saved; report it"
            )
    return merged


def write_file(
    directory: Path, name: str, queue: list[Chunk], objects: dict[str, Any], *,
    cancel: threading.Event | None = None, progress: Callable[[int], None] | None = None,
    turn: AbstractContextManager[Any] | None = None,
) -> tuple[str, FileDigest, dict[Any, Any]]:  # fmt: skip
    """Write one data file and sync it: its name, digest and where each item lies in it.

    `turn` is held while data is made and written, not while the disk is waited for: another file can go on meanwhile.
    """
    storage: dict[Any, Any] = {}
    with HashedFile(directory / name, cancel, progress, expected=sum(chunk.nbytes for chunk in queue)) as file:
        with turn or nullcontext(), zipped.without_checksums():
            _fill(file, name, queue, objects, storage)
        return name, file.finish(), storage


def _fill(file: HashedFile, name: str, queue: list[Chunk], objects: dict[str, Any], storage: dict[Any, Any]) -> None:
    """Write chunks and byte items one after the other, and note their places."""
    for chunk in reading_ahead(queue):
        value = own_storage(chunk.produce().to(chunk.dtype).reshape(chunk.shape).contiguous())
        file.write(bytes(-file.position % _ALIGNMENT))  # so that a mapped chunk can be used in place
        start = file.position
        try:
            torch.save(value, cast(IO[bytes], file))
        except RuntimeError as error:  # torch.save hides what the file raised, a full disk say, behind an error of its own
            raise (error.__context__ if isinstance(error.__context__, (OSError, Cancelled)) else error) from None
        storage[MetadataIndex(chunk.key, torch.Size(chunk.offset))] = _StorageInfo(name, start, file.position - start)
        del value
        if chunk.release is not None:
            chunk.release()
    for item, content in objects.items():
        start = file.position
        file.write(_saved([content]))  # Megatron-Core keeps a list of one
        storage[MetadataIndex(item)] = _StorageInfo(name, start, file.position - start)


def own_storage(value: Tensor) -> Tensor:
    """The same contiguous values with a storage that holds nothing else, without a copy: torch.save writes whole storages."""
    if value.numel() == 0 or value.untyped_storage().nbytes() == value.nbytes:
        return value.clone() if value.numel() == 0 else value
    return torch.from_numpy(value.detach().reshape(-1).view(torch.uint8).numpy()).view(value.dtype).reshape(value.shape)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
