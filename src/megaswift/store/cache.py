"""Where megaswift keeps what it can make again, and how a directory appears there all at once."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megaswift.errors import UserError, is_full

DAY = 24 * 3600.0
ELSEWHERE = "free space there, or set MEGASWIFT_CACHE to a directory on another disk"


def cache_root() -> Path:
    """The cache directory: $MEGASWIFT_CACHE, else ~/.cache/megaswift. It is not created here."""
    chosen = os.environ.get("MEGASWIFT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "megaswift"


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A new directory to fill, which becomes `target` when the block ends without an error.

    Readers never see a half-written `target`. When another process published the same one meanwhile, theirs is kept.
    """
    temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        _remove_debris(target.parent)
    except OSError as error:
        raise _unwritable(error, target.parent) from error
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        if not is_full(error):
            raise
        raise _unwritable(error, target.parent) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def alone(directory: Path, waiting: str = "") -> Iterator[None]:
    """Hold a lock file beside a directory of the cache: processes that come at the same time wait for the first.

    A file system without locks is no reason to stop: directories appear by one rename anyway.

    Args:
        waiting: said on stderr where another process holds the lock.

    Raises UserError where the cache cannot be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = (directory.parent / f".{directory.name}.lock").open("w")
    except OSError as error:
        raise _unwritable(error, directory.parent) from error
    with file:
        with suppress(OSError):
            _lock(file, waiting)
        yield


def _unwritable(error: OSError, directory: Path) -> UserError:
    if is_full(error):
        return UserError(
            f"the disk of the cache is full: {error.strerror}.",
            where=str(directory),
            fix=ELSEWHERE,
        )
    return UserError(
        f"cannot write to the cache: {error.strerror}.",
        where=str(directory),
        fix="set MEGASWIFT_CACHE to a directory that can be written",
    )


def _lock(file: IO[str], waiting: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting:
            print(waiting, file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)


def _remove_debris(parent: Path) -> None:
    """Delete what killed processes left half-written more than a day ago."""
    for path in parent.glob("*.tmp-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path, ignore_errors=True)
