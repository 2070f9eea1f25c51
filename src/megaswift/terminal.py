"""What people read in the terminal: plain lines, tables, and one line that stays in place while a run goes on."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """A console for tables and coloured lines on standard output."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line; [bold] and colours work as in rich."""
    console().print(text)


class LiveLine:
    """One line that is rewritten in place on a terminal; elsewhere only the lines marked `keep` are printed."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.shown = False

    def show(self, text: str, keep: bool = False) -> None:
        """Show a line; `keep` lets it stay above the next ones."""
        if not self.live:
            if keep:
                print(text, flush=True)
            return
        width = shutil.get_terminal_size().columns
        sys.stdout.write("\r\033[K" + _cut(text, width - 1) + ("\n" if keep else ""))
        sys.stdout.flush()
        self.shown = not keep

    def close(self) -> None:
        """Leave the last line on the screen."""
        if self.shown:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self.shown = False


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


def shown(path: Path) -> str:
    """A path as short as it can be typed here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
