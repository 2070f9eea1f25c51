"""Files at the speed of the disk: read ahead in the background, written past the page cache, hashed on the way."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

SLOT = 8 * 2**20  # bytes hashed and written at a time
SLOTS = 4  # buffers of one file: some are hashed or on their way to the disk while the next is filled
READ_AHEAD = 256 * 2**20  # bytes that the disk is asked for before they are needed
FIRST_READ = 4 * 2**30  # bytes at most, and an eighth of the memory, that the disk is asked for while libraries are imported
_READ_STEP = 2**19  # bytes asked for in one call; Linux leaves out what is beyond the device's read-ahead or largest transfer
_FIRST_STEP = 32 * 2**20  # bytes read in one call while imports hold Python's lock nearly all the time
_DIRECT = getattr(os, "O_DIRECT", 0)
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

    What is written goes through a few aligned buffers. Each is hashed and handed to the disk by a thread of its own while
    the caller fills the next one, so neither waits for the other. Whole buffers go past the page cache (O_DIRECT): that
    costs a third of the processor time of an ordinary write, and leaves the cache to the files that are read. Where the
    file system does not know O_DIRECT, ordinary writes are used.

    Args:
        path: must not exist.
        cancel: once set, `write` raises Cancelled.
        progress: called with the number of bytes of each piece.
        fresh: False writes over a file that exists.
        expected: about how many bytes will come; the disk is asked for the space in one piece.
    """

    def __init__(
        self,
        path: Path,
        cancel: threading.Event | None = None,
        progress: Callable[[int], None] | None = None,
        *,
        fresh: bool = True,
        expected: int = 0,
    ) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if fresh else os.O_TRUNC)
        self._handle = os.open(path, flags, 0o644)
        if expected >= SLOT:
            _reserve(self._handle, expected)
        self._cancel, self._progress = cancel, progress
        self._whole = hashlib.sha256()
        self._hasher, self._disk = ThreadPoolExecutor(1, "file-hash"), ThreadPoolExecutor(1, "disk")
        self._busy: deque[tuple[mmap.mmap, list[Future[None]]]] = deque()
        self._slot: mmap.mmap | None = None
        self._filled = 0
        self._direct: bool | None = None  # not known before the first whole buffer
        self.position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def write(self, data: Any, also: Any = None) -> int:
        """Append bytes; `also` is a hash object that takes them too. The data may change once this returns."""
        import numpy

        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            if self._cancel is not None and self._cancel.is_set():
                raise Cancelled
            slot = self._slot or self._free_slot()
            piece = view[start : start + SLOT - self._filled]
            target = numpy.frombuffer(slot, numpy.uint8, len(piece), self._filled)
            target[:] = numpy.frombuffer(piece, numpy.uint8)  # numpy lets other threads run meanwhile
            if also is not None:
                also.update(target)
            start += len(piece)
            self._filled += len(piece)
            self.position += len(piece)
            if self._progress is not None:
                self._progress(len(piece))
            if self._filled == SLOT:
                self._send()
        return len(view)

    def _free_slot(self) -> mmap.mmap:
        """A buffer to fill: a new one, or the one that was sent first, once it is hashed and written."""
        if len(self._busy) < SLOTS - 1:
            self._slot = mmap.mmap(-1, SLOT)
        else:
            self._slot, jobs = self._busy.popleft()
            for job in jobs:
                job.result()
        return self._slot

    def _send(self) -> None:
        """Have the filled part of the buffer hashed and written."""
        slot, count = self._slot, self._filled
        assert slot is not None
        view = memoryview(slot)[:count]
        self._busy.append((slot, [self._hasher.submit(self._whole.update, view), self._disk.submit(self._append, view)]))
        self._slot, self._filled = None, 0

    def _append(self, view: memoryview) -> None:
        """Write one buffer; a whole one past the page cache."""
        whole = len(view) == SLOT
        if whole and self._direct is None:
            self._direct = _set_direct(self._handle, True)
        if not whole and self._direct:
            self._direct = not _set_direct(self._handle, False)
        while view:
            try:
                view = view[os.write(self._handle, view) :]
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._direct = not _set_direct(self._handle, False)  # the file system wants another alignment

    def finish(self) -> FileRecord:
        """Wait for the disk; size and SHA-256 of the file."""
        if self._filled:
            self._send()
        while self._busy:
            for job in self._busy.popleft()[1]:
                job.result()
        os.ftruncate(self._handle, self.position)
        os.fsync(self._handle)
        return FileRecord(self.position, self._whole.hexdigest())

    def close(self) -> None:
        if not self.closed:
            self._hasher.shutdown(cancel_futures=True)
            self._disk.shutdown(cancel_futures=True)
            os.close(self._handle)
        super().close()


def _set_direct(handle: int, direct: bool) -> bool:
    """Switch direct writing on or off; whether the file now is as asked."""
    import fcntl

    if not _DIRECT:
        return not direct
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
    except OSError:
        return False
    return True


def _reserve(handle: int, count: int) -> None:
    """Ask for a file's space before it is written; a file system that cannot, or is too full, says so when data comes."""
    allocate = getattr(ctypes.CDLL(None), "fallocate", None)
    if allocate is not None:
        allocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(count))


def forget_pages(mapped: mmap.mmap, start: int, stop: int) -> None:
    """Give back the memory of the whole pages in a range of a mapped file; they are read again when they are used."""
    option = getattr(mmap, "MADV_DONTNEED", None)
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if option is not None and last > first:
        mapped.madvise(option, first, last - first)


_reader: ThreadPoolExecutor | None = None
_reader_lock = threading.Lock()


def read_in_background(path: Path, start: int, count: int) -> None:
    """Ask the system to bring a range of a file into memory. Returns at once; errors are left to those who read."""
    global _reader
    if not hasattr(os, "posix_fadvise"):
        return
    with _reader_lock:
        if _reader is None:
            _reader = ThreadPoolExecutor(1, "read-ahead")
    _reader.submit(_read_ahead, path, start, count)


def start_reading(files: Iterable[Path]) -> None:
    """Have the disk read the front of a conversion's input. Importing torch and transformers takes some seconds."""
    left = min(FIRST_READ, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
    parts = []
    for path in files:
        count = min(path.stat().st_size, left)
        if count:
            parts.append((path, count))
        left -= count

    def read() -> None:
        buffer = mmap.mmap(-1, _FIRST_STEP)  # asking alone would take Python's lock for every half megabyte
        for path, count in parts:
            with suppress(OSError), path.open("rb", buffering=0) as file:  # errors are left to those who read
                for _ in range(0, count, _FIRST_STEP):
                    file.readinto(buffer)

    threading.Thread(target=read, name="first-read", daemon=True).start()


def _read_ahead(path: Path, start: int, count: int) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        for place in range(start, start + count, _READ_STEP):
            os.posix_fadvise(handle, place, min(_READ_STEP, start + count - place), os.POSIX_FADV_WILLNEED)
    finally:
        os.close(handle)


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


def missing(directory: Path) -> list[Path]:
    """A directory and those above it, as far as they are not there yet; the innermost first."""
    return [place for place in (directory, *directory.parents) if not place.exists()]


def remove_empty(made: list[Path]) -> None:
    """Remove directories that were made, the innermost first, up to one in which somebody else has something by now."""
    with suppress(OSError):
        for place in made:
            place.rmdir()
