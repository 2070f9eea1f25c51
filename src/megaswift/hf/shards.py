"""Plan safetensors shards and write one of them: header first, then tensor by tensor, hashed while it streams.

A shard's bytes depend on its plan alone, so an interrupted conversion can keep the shards that are complete.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megaswift.hf.folder import WEIGHTS

if TYPE_CHECKING:
    import torch

CHUNK = 4 * 2**20  # bytes hashed and written at a time: large for the disk, small enough to stay in the processor's cache


class Cancelled(Exception):
    """Another shard failed; this one stopped early."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written, known by size before its data exists.

    Args:
        name: Hugging Face name.
        dtype: dtype in the file.
        shape: shape in the file.
        produce: makes the tensor when its turn comes; must return this dtype and shape, on any device.
        prepare: called one tensor ahead, for example to start reading the source.
        release: called once the tensor is written, for example to give back mapped pages.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    produce: Callable[[], torch.Tensor]
    prepare: Callable[[], None] | None = None
    release: Callable[[], None] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One weight file: its name, its tensors in file order, and its ready header."""

    file: str
    tensors: tuple[PlannedTensor, ...]
    header: bytes = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class ShardResult:
    """What was written: the file, and the SHA-256 of each tensor's bytes by name."""

    record: FileRecord
    tensors: dict[str, str]


def plan_shards(tensors: Iterable[PlannedTensor], max_shard_size: int) -> list[Shard]:
    """Cut the tensors, in the order given, into files of at most `max_shard_size` bytes of data.

    A tensor that is larger has a file of its own. File names follow the hub's habit: model.safetensors, or
    model-00001-of-0000N.safetensors. Raises ValueError for a name that comes twice and for no tensors.
    """
    groups: list[list[PlannedTensor]] = []
    seen: set[str] = set()
    filled = 0
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"tensor {tensor.name!r} is planned twice")
        seen.add(tensor.name)
        if not groups or filled + tensor.nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if not groups:
        raise ValueError("no tensors to write")
    count = len(groups)
    files = [WEIGHTS] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [_shard(file, group) for file, group in zip(files, groups)]


def _shard(file: str, group: Sequence[PlannedTensor]) -> Shard:
    """Order the tensors so that each is aligned to its item size, and make the header."""
    ordered = sorted(group, key=lambda tensor: -tensor.dtype.itemsize)  # stable: the order given is kept within a dtype
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        offsets = [position, position + tensor.nbytes]
        entries[tensor.name] = {"dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return Shard(file, tuple(ordered), len(text).to_bytes(8, "little") + text)


def _dtype_name(dtype: torch.dtype) -> str:
    from megaswift.hf.header import ITEM_SIZE
    from megaswift.hf.read import torch_dtype

    return next(name for name in ITEM_SIZE if torch_dtype(name) == dtype)


def write_shard(
    shard: Shard, path: Path, *, cancel: threading.Event | None = None, progress: Callable[[int], None] | None = None
) -> ShardResult:
    """Write one shard to `path`, which must not exist, and fsync it.

    Holds one tensor at a time. Args: `cancel` stops it between chunks (raises Cancelled); `progress` is called with the
    number of bytes after each chunk. Raises OSError from the disk, ValueError where `produce` breaks its promise.
    """
    hashes: dict[str, str] = {}
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    whole = _BackgroundHash()
    try:
        whole.update(memoryview(shard.header))
        _write_all(handle, memoryview(shard.header))
        for number, tensor in enumerate(shard.tensors):
            following = shard.tensors[number + 1] if number + 1 < len(shard.tensors) else None
            if following is not None and following.prepare is not None:
                following.prepare()
            hashes[tensor.name] = _write_tensor(tensor, handle, whole, cancel, progress)
            whole.wait()  # no data of this tensor may be in use when the next one is produced
            if tensor.release is not None:
                tensor.release()
        os.fsync(handle)
        return ShardResult(FileRecord(shard.nbytes, whole.result()), hashes)
    finally:
        whole.stop()
        os.close(handle)


def _write_tensor(
    tensor: PlannedTensor,
    handle: int,
    whole: _BackgroundHash,
    cancel: threading.Event | None,
    progress: Callable[[int], None] | None,
) -> str:
    """Produce, hash and write one tensor; its SHA-256."""
    data = _bytes(tensor, tensor.produce())
    own = hashlib.sha256()
    for start in range(0, len(data), CHUNK):
        if cancel is not None and cancel.is_set():
            raise Cancelled
        chunk = data[start : start + CHUNK]
        whole.update(chunk)
        own.update(chunk)
        _write_all(handle, chunk)
        if progress is not None:
            progress(len(chunk))
    _start_writeback(handle)
    return own.hexdigest()


def _bytes(planned: PlannedTensor, tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, without a copy where it is contiguous on the CPU."""
    import torch

    if tensor.dtype != planned.dtype or tuple(tensor.shape) != tuple(planned.shape):
        raise ValueError(
            f"tensor {planned.name!r} was planned as {planned.dtype} {list(planned.shape)}, "
            f"but came as {tensor.dtype} {list(tensor.shape)}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _start_writeback(handle: int) -> None:
    """Let the disk begin with what is written so far, so that the fsync at the end does not wait for all of it (Linux)."""
    start = getattr(_libc(), "sync_file_range", None)
    if start is not None:
        start(handle, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(2))  # whole file, SYNC_FILE_RANGE_WRITE


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class _BackgroundHash:
    """SHA-256 of a stream in a thread of its own, so that the file's hash does not wait for the tensors' hashes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._queue: queue.Queue[memoryview | None] = queue.Queue(maxsize=4)
        self._thread = threading.Thread(target=self._run, name="file-hash", daemon=True)
        self._thread.start()

    def update(self, data: memoryview) -> None:
        """Add bytes; they must not change until `wait` returns."""
        self._queue.put(data)

    def wait(self) -> None:
        """Return when all bytes so far are hashed."""
        self._queue.join()

    def result(self) -> str:
        """The digest of all bytes."""
        self._queue.join()
        return self._hash.hexdigest()

    def stop(self) -> None:
        """End the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            data = self._queue.get()
            if data is not None:
                self._hash.update(data)
            self._queue.task_done()
            if data is None:
                return
