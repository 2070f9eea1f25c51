"""What people read in the terminal: plain lines, tables, and one line that stays in place while a run goes on."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import re
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


_RENAME = "rename the file or directory, for example: convmv -f GBK -t UTF-8 --notest NAME; or write the option in UTF-8"


def speak_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale knows ASCII only (LC_ALL=C).

    There every Chinese name, row and option would be an error, here, in each library and in each process that is started;
    what megaswift reads and writes is UTF-8 anyway. On a terminal of another encoding, characters that it lacks are escaped.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii" and not sys.flags.utf8_mode and sys.executable:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def refuse_not_utf8(words: list[str]) -> None:
    """Raise UserError for a word of the command line whose bytes are not UTF-8, such as a file name in GBK."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError("a word is not UTF-8.", where=f"command line: {_escape_bytes(word)}", fix=_RENAME) from None


def not_utf8(error: BaseException) -> UserError | None:
    """The error for a name on this machine that is not UTF-8 and was to be written; None for another error."""
    if not isinstance(error, UnicodeEncodeError) or error.reason != "surrogates not allowed":
        return None
    return UserError("a text or a name is not UTF-8.", where=_escape_bytes(error.object[-200:]), fix=_RENAME)


def _escape_bytes(text: str) -> str:
    """A text with the bytes that are not UTF-8 as \\xNN."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which no bytes stand behind
        return text.encode("utf-8", "backslashreplace").decode()


_OURS = ("bold", "/bold", "yellow", "/yellow")  # all the markup that is used here
_TAG = re.compile(r"(\\*)\[([a-z#/@][^[]*?)\]")  # what rich takes for markup


def console() -> Console:
    """A console for tables and coloured lines on standard output.

    Its markup is [bold] and [yellow], each to its [/...]. Any other word in brackets is text: paths, names and rows have them.
    """
    from rich.console import Console
    from rich.errors import MarkupError
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            if how.get("markup") is False:
                return super().render_str(text, **how)
            try:
                return super().render_str(_TAG.sub(_escaped, text), **how)
            except MarkupError:  # a text that closes what nobody opened
                return super().render_str(text, **{**how, "markup": False})

    return Plain(highlight=False, soft_wrap=True, emoji=False)


def _escaped(tag: re.Match[str]) -> str:
    """Backslashes are text too; before a tag rich halves them, and an odd one makes it text."""
    return f"{tag[1] * 2}{'' if tag[2] in _OURS else chr(92)}[{tag[2]}]"


def say(text: str) -> None:
    """Print one line; [bold] and [yellow] work as in `console`."""
    with terminal_may_be_gone():
        console().print(text)


@contextlib.contextmanager
def terminal_may_be_gone() -> Iterator[None]:
    """A run outlives the terminal that showed it: what is written to a closed one (EIO) is lost, and nothing else."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


class LiveLine:
    """One line that is rewritten in place on a terminal; elsewhere only the lines marked `keep` are printed."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.shown = False

    def show(self, text: str, keep: bool = False) -> None:
        """Show a line; `keep` lets it stay above the next ones."""
        if not self.live:
            if keep:
                _write(text + "\n")
            return
        width = shutil.get_terminal_size().columns
        _write("\r\033[K" + _cut(text, width - 1) + ("\n" if keep else ""))
        self.shown = not keep

    def close(self) -> None:
        """Leave the last line on the screen."""
        if self.shown:
            _write("\n")
            self.shown = False


def _write(text: str) -> None:
    with terminal_may_be_gone():
        sys.stdout.write(text)
        sys.stdout.flush()


def _cut(text: str, width: int) -> str:
    """As much of a text as fits; Chinese characters take two columns."""
    used = 0
    for position, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > width:
            return text[:position]
    return text


def duration(seconds: float) -> str:
    """Seconds as 9s, 3m05s or 2h05m."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def typed(path: Path) -> str:
    """A path as a word of a command that can be pasted: as short as `shown`, in quotes where the shell needs them."""
    short = shown(path)
    return shlex.quote(f"./{short}" if short.startswith("-") else short)


def shown(path: Path) -> str:
    """A path as short as it can be typed here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
