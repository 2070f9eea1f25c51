"""Directories that appear whole or not at all: a hidden locked directory beside the target, renamed when it is complete.

A process that dies leaves the hidden directory, which nothing reads. The next one removes it, or, asked to resume, takes
over the files in it that were complete: each such file has a record with its SHA-256, and is hashed again.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.errors import UserError, is_full
from megaswift.store.files import FileRecord, sha256_of, sync, write_small

_TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{8}")
_RECORDS = ".done"
_PLAN = "plan"
_LEFTOVER_AGE = 10.0  # seconds; a younger temporary directory may not have its lock yet


@dataclass(frozen=True)
class Workspace:
    """A temporary directory that will become the target.

    Args:
        path: the directory.
        resumed: names of files that an earlier process completed, as far as `finished` confirmed them.
    """

    path: Path
    keeps_records: bool
    resumed: list[str]

    def finished(self, directory: Path, name: str) -> dict[str, Any] | None:
        """The record of a file that an earlier process completed and that is still what it wrote; None: write it."""
        place = self.path / _RECORDS / f"{name}.json"
        try:
            record = json.loads(place.read_text(encoding="utf-8"))
            file = directory / name
            whole = file.stat().st_size == record["size"] and sha256_of(file) == record["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            self.resumed.append(name)
            return record
        (directory / name).unlink(missing_ok=True)
        return None

    def record(self, name: str, file: FileRecord, **more: Any) -> None:
        """Note that a file is complete and on the disk, with what else the next process must know about it."""
        if self.keeps_records:
            text = json.dumps({"size": file.size, "sha256": file.sha256, **more})
            temporary = self.path / _RECORDS / f".{name}.{secrets.token_hex(4)}"
            write_small(temporary, text.encode())
            os.replace(temporary, self.path / _RECORDS / f"{name}.json")
            sync(self.path / _RECORDS)

    def drop_records(self) -> None:
        """Everything is written: the records are not part of the result."""
        shutil.rmtree(self.path / _RECORDS, ignore_errors=True)


@contextmanager
def workspace(target: Path, needed: int, *, plan: str | None = None, resume: bool = False) -> Iterator[Workspace]:
    """A locked hidden directory beside `target`; removed on any exception, with the parents that were made for it.

    Args:
        needed: bytes that will be written; compared with the free space first.
        plan: a text that is equal for equal results; with it, complete files are recorded for a later `resume`.
        resume: go on in the directory that a killed process of the same plan left; an interruption leaves it again.

    Raises UserError where the disk is too small or cannot be written.
    """
    made = [place for place in (target.parent, *target.parent.parents) if not place.exists()]
    temporary = target.parent / f".{target.name}.tmp-{secrets.token_hex(4)}"
    lock = -1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if resume and plan is not None:
            temporary, lock = _adopted(target, plan) or (temporary, -1)
        remove_leftovers(target)
        there = sum(item.stat().st_size for item in temporary.rglob("*") if item.is_file()) if lock >= 0 else 0
        _check_space(target.parent, needed - there)
        if lock < 0:
            temporary.mkdir()
            lock = _lock(temporary)
            if plan is not None:
                (temporary / _RECORDS).mkdir()
                write_small(temporary / _RECORDS / _PLAN, plan.encode())
        yield Workspace(temporary, plan is not None, [])
    except BaseException as error:
        if not (resume and isinstance(error, KeyboardInterrupt)):
            shutil.rmtree(temporary, ignore_errors=True)
        for place in made:
            try:
                place.rmdir()
            except OSError:  # not empty: somebody else uses it by now
                break
        if isinstance(error, OSError):
            raise _disk_error(error, target, needed) from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def publish(temporary: Path, target: Path) -> None:
    """Make everything durable, then give it its name. Raises UserError where the name was taken meanwhile."""
    for item in temporary.rglob("*"):
        sync(item)
    sync(temporary)
    refuse_existing(target)
    try:
        os.rename(temporary, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            refuse_existing(target)
        raise
    sync(target.parent)


def refuse_existing(target: Path) -> None:
    """Raise UserError where the target exists."""
    if target.exists() or target.is_symlink():
        raise UserError(
            f"output directory {str(target)!r} exists already.",
            fix="give another directory, or --overwrite true to replace this one",
        )


def refuse_unfinished(path: Path) -> None:
    """Raise UserError for a directory that a killed conversion left: it may look whole, but nobody checked it."""
    if _TEMPORARY.fullmatch(path.name):
        raise UserError(
            "this is what an interrupted conversion left behind, not its result.",
            where=str(path),
            fix="run swift export again; with --resume true it keeps what is complete",
        )


def _adopted(target: Path, plan: str) -> tuple[Path, int] | None:
    """A directory that a dead process of the same plan left, now locked by this one."""
    for item in _leftovers(target):
        try:
            same = (item / _RECORDS / _PLAN).read_text(encoding="utf-8") == plan
        except (OSError, ValueError):
            continue
        lock = _lock(item) if same else -1
        if lock >= 0:
            return item, lock
    return None


def _leftovers(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.tmp-*"))


def remove_leftovers(target: Path) -> list[Path]:
    """Delete the temporary directories that killed processes left beside `target`; those of living ones are locked."""
    removed = []
    for item in _leftovers(target):
        try:
            old = time.time() - item.stat().st_mtime > _LEFTOVER_AGE
            handle = _lock(item) if old and item.is_dir() else -1
        except OSError:
            continue
        if handle >= 0:
            shutil.rmtree(item, ignore_errors=True)
            os.close(handle)
            removed.append(item)
    return removed


def _check_space(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed + 2**20:
        raise UserError(
            f"not enough disk space: {needed:,} bytes needed, {free:,} free.",
            where=str(place),
            fix="free space or write to another disk",
        )


def _disk_error(error: OSError, target: Path, needed: int) -> UserError:
    """A failed system call as an error of ours; only the disk itself can fail here."""
    if is_full(error):
        what = f"the disk is full: {needed:,} bytes are needed in all. Nothing was left behind."
        return UserError(what, where=str(target), fix="free space or write to another disk")
    return UserError(f"cannot write {str(target)!r}: {error.strerror or error}.", where=str(error.filename or target))


def _lock(directory: Path) -> int:
    """Hold a lock on a directory for as long as this process lives; -1 where somebody has it or there are no locks."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return -1
    return handle
