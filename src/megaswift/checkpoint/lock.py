"""One live run in a directory: a lock that the system gives back when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megaswift.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory. Raises UserError while another process holds it, or where it cannot be made.

    A file that a dead process left behind holds nothing and is taken over.
    """
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the run's directory cannot be written: {error.strerror}.", where=str(directory), fix="choose another --output_dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(directory) from error
        except OSError:
            pass  # a file system without locks: run without one
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield


def refuse_if_in_use(directory: Path) -> None:
    """Raise UserError while a live process holds the lock."""
    if in_use(directory):
        raise _taken(directory)


def _taken(directory: Path) -> UserError:
    return UserError(
        f"this run is in use by {_owner(directory / LOCK)}.",
        where=str(directory),
        fix="wait for it or stop it; or choose another --output_dir",
    )


def in_use(directory: Path) -> bool:
    """Whether a live process holds the lock."""
    try:
        with (directory / LOCK).open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _owner(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
