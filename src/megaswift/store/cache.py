"""Where megaswift keeps what it can make again, and how a directory appears there all at once."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaswift.errors import UserError, is_full
from megaswift.store.lock import hold
from megaswift.store.publish import publish, remove_abandoned, temporary_beside

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
    temporary = temporary_beside(target, hidden=False)
    try:
        temporary.mkdir(parents=True)
        remove_abandoned(target.parent.glob("*.tmp-*"), DAY, by_age=True)  # what killed processes left
    except OSError as error:
        raise _unwritable(error, target.parent) from error
    try:
        yield temporary
        publish(temporary, target, taken="keep")
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
        if hold(file.fileno()) is False:
            if waiting:
                print(waiting, file=sys.stderr, flush=True)
            hold(file.fileno(), wait=True)
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
