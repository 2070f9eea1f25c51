"""Locks, which the system gives back when their process ends; one live run in a directory, and what is written before its first step."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megaswift.errors import MegaswiftError, UserError
from megaswift.store.files import missing, remove_empty

LOCK = ".lock"


def hold(handle: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file or directory until it is closed or this process ends.

    Args:
        shared: others may hold it too, if they share it as well.
        wait: until nobody else holds it.

    Returns:
        Whether it is held now: False where another process has it, None where the file system has no locks.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory. Raises UserError while another process holds it, or where it cannot be made.

    A file that a dead process left behind holds nothing and is taken over. A directory that is made here goes again after an
    error that leaves nothing in it.
    """
    with contextlib.ExitStack() as stack:
        with filling(directory):
            made = missing(directory)
            directory.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((directory / LOCK).open("ab", buffering=0))
        if hold(file.fileno()) is False:  # a file system without locks is no reason to stop
            raise _taken(directory)
        try:
            with filling(directory):
                file.truncate(0)
                file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            yield
        except BaseException:
            if made:
                _remove_empty(directory, made)
            raise


def _remove_empty(directory: Path, made: list[Path]) -> None:
    """Remove the directories that were made, from the innermost out, if the lock is all that is in them."""
    with contextlib.suppress(OSError):
        if not [path for path in directory.iterdir() if path.name != LOCK]:
            (directory / LOCK).unlink(missing_ok=True)
            remove_empty(made)


@contextlib.contextmanager
def filling(directory: Path, new: bool = False) -> Iterator[None]:
    """Write what stands in a run's directory before its first step: UserError where it cannot be written.

    Args:
        new: a run that begins: what is there is of this process alone, and goes again after an error.
    """
    try:
        yield
    except (OSError, MegaswiftError) as error:
        for path in directory.iterdir() if new else ():
            if path.name != LOCK:
                path.unlink()
        if isinstance(error, MegaswiftError):
            raise
        raise UserError(
            f"the run's directory cannot be written: {error.strerror}.", where=str(directory), fix="choose another --output_dir"
        ) from error


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
        with (directory / LOCK).open("rb") as file:
            return hold(file.fileno(), shared=True) is False
    except OSError:
        return False


def _owner(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
