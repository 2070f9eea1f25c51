"""Files and directories that appear whole or not at all: filled under another name beside the target, made durable, renamed.

A process that dies leaves what it filled under a name that nothing reads:

    .NAME.tmp-XXXXXXXX   a conversion, locked while its process lives. The next one removes it, or, asked to resume, takes over
                         the files in it that were complete: each has a record with its SHA-256, and is hashed again.
    NAME.tmp-XXXXXXXX    a checkpoint, which goes when its run begins anew; a directory of the cache, which goes after a day.
    .NAME.tmp            a file, over which the next one is written.
    .NAME.old-XXXXXXXX   what a directory took the place of, a moment before it was to be deleted.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaswift.errors import UserError, is_full
from megaswift.store.files import FileRecord, missing, remove_empty, sha256_of, sync, write_small
from megaswift.store.lock import hold

_TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{8}")
_RECORDS = ".done"
_PLAN = "plan"
_LEFTOVER_AGE = 10.0  # seconds; a younger temporary directory may not have its lock yet


@contextmanager
def appearing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A name to write a file under; the file gets its own, in place of one that had it, when the block ends without an error.

    One process writes a file at a time.

    Args:
        durable: on the disk before it has its name, and its name on the disk after that; else others merely see it whole.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        sync(path.parent)


def put(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a small file that appears whole; text as UTF-8. Args are those of `appearing`."""
    with appearing(path, durable=durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def temporary_beside(target: Path, *, hidden: bool) -> Path:
    """A new name under which a directory is filled before it becomes `target`."""
    return target.with_name(f"{'.' * hidden}{target.name}.tmp-{secrets.token_hex(4)}")


def publish(
    temporary: Path, target: Path, *, taken: Literal["refuse", "replace", "keep"] = "refuse", synced: bool = False
) -> None:
    """Make everything in a directory durable, then give it its name.

    Args:
        taken: what becomes of a target that is there by now: it is an error, it is replaced, or it is kept and `temporary` stays.
        synced: the files are on the disk already.

    Raises UserError where the name is taken.
    """
    for item in () if synced else temporary.rglob("*"):
        sync(item)
    sync(temporary)
    old = _set_aside(target) if taken == "replace" else None
    if taken == "refuse":
        refuse_existing(target)
    try:
        os.rename(temporary, target)
    except OSError as error:
        if taken == "keep" and target.is_dir():
            return
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            refuse_existing(target)
        raise
    finally:
        if old is not None and not target.exists():
            os.rename(old, target)
    sync(target.parent)
    if old is not None and old.is_symlink():
        old.unlink()
    elif old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _set_aside(target: Path) -> Path | None:
    if not target.exists() and not target.is_symlink():
        return None
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    os.rename(target, old)
    return old


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
            put(self.path / _RECORDS / f"{name}.json", text)

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
    made, temporary = missing(target.parent), temporary_beside(target, hidden=True)
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
        remove_empty(made)
        if isinstance(error, OSError):
            raise _disk_error(error, target, needed) from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)


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
    """Temporary directories of this target, also those of earlier versions, which gave a replacement a name of its own first."""
    names = (f".{target.name}", f"..{target.name}.new")
    return sorted(path for name in names for path in target.parent.glob(f"{glob.escape(name)}.tmp-*"))


def remove_leftovers(target: Path) -> list[Path]:
    """Delete the temporary directories that killed processes left beside `target`; those of living ones are locked."""
    earlier = [target.with_name(f".{target.name}.new")] if target.exists() else []  # was to take its place, in earlier versions
    return remove_abandoned([*_leftovers(target), *earlier], _LEFTOVER_AGE)


def remove_abandoned(found: Iterable[Path], age: float, *, by_age: bool = False) -> list[Path]:
    """Delete the directories that nobody has touched for `age` seconds and no living process has locked; returns them.

    Args:
        by_age: where the file system has no locks, the age decides; else such directories stay.
    """
    removed = []
    for item in found:
        try:
            old = time.time() - item.stat().st_mtime > age
            handle = os.open(item, os.O_RDONLY) if old and item.is_dir() else -1
        except OSError:
            continue
        if handle >= 0:
            held = hold(handle)
            if held or (held is None and by_age):
                shutil.rmtree(item, ignore_errors=True)
                removed.append(item)
            os.close(handle)
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
    if not hold(handle):
        os.close(handle)
        return -1
    return handle
