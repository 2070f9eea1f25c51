"""What people read in the terminal: plain lines, tables, and one line that stays in place while a run goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


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
