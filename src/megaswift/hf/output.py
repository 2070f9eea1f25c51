"""One output file: hashed while it is written, and handed to the disk early, so that the end does not wait for all of it."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

CHUNK = 4 * 2**20  # bytes hashed and written at a time: large for the disk, small enough to stay in the processor's cache
WRITEBACK = 64 * 2**20  # bytes after which the disk is asked to begin


READ_AHEAD = 256 * 2**20  # bytes that the disk is asked for before they are needed
T = TypeVar("T", bound="Readable")


class Readable(Protocol):
    """Data of known size that can be read in the background."""

    @property
    def nbytes(self) -> int: ...

    @property
    def prepare(self) -> Callable[[], None] | None: ...


class Cancelled(Exception):
    """Another file failed; this one stopped early."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


class HashedFile(io.RawIOBase):
    """A new file that knows its SHA-256 when it is closed.

    The file's hash and the requests to the disk run in threads of their own: they wait neither for each other nor for
    what the writing thread computes. Data is never copied; `write` returns when nobody uses it any more.

    Args:
        path: must not exist.
        cancel: once set, `write` raises Cancelled.
        progress: called with the number of bytes of each chunk.
        fresh: False writes over a file that exists.
    """

    def __init__(
        self,
        path: Path,
        cancel: threading.Event | None = None,
        progress: Callable[[int], None] | None = None,
        *,
        fresh: bool = True,
    ) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if fresh else os.O_TRUNC)
        self._handle = os.open(path, flags, 0o644)
        self._cancel, self._progress = cancel, progress
        self._whole = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, "file-hash")
        self._disk = ThreadPoolExecutor(1, "disk")
        self.position = 0
        self._requested = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def write(self, data: Any, also: Any = None) -> int:
        """Append bytes; `also` is a hash object that takes them too."""
        view = memoryview(data).cast("B")
        if len(view) <= 4096:  # headers: a copy costs less than waiting
            view = memoryview(bytes(view))
        futures = []
        for start in range(0, len(view), CHUNK):
            if self._cancel is not None and self._cancel.is_set():
                raise Cancelled
            chunk = view[start : start + CHUNK]
            futures.append(self._hasher.submit(self._whole.update, chunk))
            if also is not None:
                also.update(chunk)
            self._append(chunk)
        if futures and len(view) > 4096:  # they run in order
            futures[-1].result()
        return len(view)

    def _append(self, chunk: memoryview) -> None:
        count = len(chunk)
        while chunk:
            chunk = chunk[os.write(self._handle, chunk) :]
        self.position += count
        if self._progress is not None:
            self._progress(count)
        if self.position - self._requested >= WRITEBACK:
            self._disk.submit(_start_writeback, self._handle, self._requested, self.position - self._requested)
            self._requested = self.position

    def finish(self) -> FileRecord:
        """Wait for the disk; size and SHA-256 of the file."""
        self._disk.shutdown()
        os.fsync(self._handle)
        self._hasher.shutdown()
        return FileRecord(self.position, self._whole.hexdigest())

    def close(self) -> None:
        if not self.closed:
            self._hasher.shutdown(cancel_futures=True)
            self._disk.shutdown(cancel_futures=True)
            os.close(self._handle)
        super().close()


def _start_writeback(handle: int, start: int, count: int) -> None:
    """Let the disk begin with a range of a file, so that the fsync at the end does not wait for all of it (Linux only)."""
    request = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if request is not None:
        request(handle, ctypes.c_int64(start), ctypes.c_int64(count), ctypes.c_uint(2))  # 2: SYNC_FILE_RANGE_WRITE


def reading_ahead(items: Sequence[T]) -> Iterator[T]:
    """The items in order; those that make up the next READ_AHEAD bytes are prepared (read in the background) before their turn.

    An item has `nbytes` and `prepare`, which may be None.
    """
    ahead, waiting = 1, 0  # the first is needed at once
    for number, item in enumerate(items):
        waiting -= item.nbytes if 0 < number < ahead else 0
        while ahead < len(items) and (ahead <= number + 1 or waiting < READ_AHEAD):
            following = items[ahead]
            if following.prepare is not None:
                following.prepare()
            waiting += following.nbytes
            ahead += 1
        yield item


def write_small(path: Path, data: bytes) -> FileRecord:
    """Write and fsync a small file, which must not exist."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
