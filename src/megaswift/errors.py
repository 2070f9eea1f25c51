"""Every error that a user can cause, and the exit code of each kind.

An error says what is wrong, where (file, row, tensor, flag) and what to do about it. The command line prints these
three parts and nothing else; a traceback is for our own defects only.
"""

from __future__ import annotations

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `swift` command."""

    DONE = 0
    USER = 2  # a flag, a configuration, a layout or an environment that cannot work
    DATA = 3  # a dataset, a model folder or a checkpoint that is damaged or incomplete
    NONFINITE = 4  # loss or gradients became NaN or infinite
    RANK_LOST = 5  # a process of the run died or hung
    STOPPED = 75  # stopped by a signal at a step boundary; the same command goes on


class MegaswiftError(Exception):
    """What went wrong, where, and how to mend it.

    Args:
        what: one sentence, naming the found and the expected value.
        where: file, file:line, tensor name or flag; empty where `what` already says it.
        fix: what to do now; empty only if nothing can be done.
    """

    exit_code: ExitCode = ExitCode.USER

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.text())

    def text(self) -> str:
        """The message as printed: up to three lines."""
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self):  # multiprocessing sends exceptions by pickle; keyword-only arguments need help
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(cls: type[MegaswiftError], what: str, where: str, fix: str) -> MegaswiftError:
    return cls(what, where=where, fix=fix)


class UserError(MegaswiftError):
    """A flag, a layout or an environment that cannot work (exit 2)."""

    exit_code = ExitCode.USER


class DataError(MegaswiftError):
    """A dataset, a model folder or a checkpoint that is damaged or incomplete (exit 3)."""

    exit_code = ExitCode.DATA


class NonFiniteError(MegaswiftError):
    """Loss, gradients or weights are NaN or infinite (exit 4)."""

    exit_code = ExitCode.NONFINITE


class RankLostError(MegaswiftError):
    """A process of the run died or hung (exit 5)."""

    exit_code = ExitCode.RANK_LOST


class Stopped(MegaswiftError):
    """Stopped by a signal at a step boundary; the run can be resumed (exit 75)."""

    exit_code = ExitCode.STOPPED


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or somebody's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(error: BaseException) -> UserError | None:
    """The error of a full disk where nothing more is known than what could not be written; None for another error."""
    if not isinstance(error, OSError) or not is_full(error):
        return None
    return UserError(
        f"the disk is full: {error.strerror}.",
        where=str(error.filename or ""),
        fix="free space, or write to another disk (--output_dir and its like, MEGASWIFT_CACHE, TMPDIR); then run it again",
    )


LISTED = 4  # lines of a library's error that follow a first line which ends with a colon


def first_line(error: BaseException) -> str:
    """What a library's error says first, on one line: with what its first line announces, where that ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if not lines[0].endswith(":"):
        return lines[0]
    told = " ".join(lines[: 1 + LISTED]) + (" ..." if len(lines) > 1 + LISTED else "")
    return told if len(lines) > 1 else told.rstrip(" :") or type(error).__name__


def nearest(word: str, known: list[str] | tuple[str, ...], count: int = 3) -> str:
    """The known names closest to a mistyped one, as text for an error message."""
    import difflib

    close = difflib.get_close_matches(word, known, n=count, cutoff=0.5)
    return ", ".join(close) if close else ", ".join(sorted(known)[:12])
