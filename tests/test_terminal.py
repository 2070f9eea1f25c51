"""What is printed is what was meant: brackets in paths and names are text, and a terminal that is gone stops nothing."""

from __future__ import annotations

import errno
import io
import sys
from typing import Any

import pytest
from rich.table import Table

from megaswift.terminal import LiveLine, console, say


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[bold]o[lr1e-5]/v0[/bold] is ready", "o[lr1e-5]/v0 is ready"),
        ("run directory: o[red]/[/x]/[@y]/[#1]", "run directory: o[red]/[/x]/[@y]/[#1]"),
        ("[yellow]removed a[b=c][/yellow]", "removed a[b=c]"),
        ("closed by nobody[/bold]", "closed by nobody[/bold]"),
        (r"[bold]C:\[x]\\[y][/bold]", r"C:\[x]\\[y]"),
        ("of :fire: and :smile:", "of :fire: and :smile:"),
        ("swift export --ckpt_dir 'a[1]' --to_hf true", "swift export --ckpt_dir 'a[1]' --to_hf true"),
    ],
)
def test_only_our_markup_is_markup(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    assert capsys.readouterr().out == shown + "\n"


def test_cells_of_tables(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name")
    table.add_row("[bold]a[dim]b[/bold]")
    console().print(table)
    assert "a[dim]b" in capsys.readouterr().out


class Gone(io.StringIO):
    """Standard output on a terminal that fails as told."""

    number = errno.EIO

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(self.number, "gone")


def test_a_terminal_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Gone())
    line: Any = LiveLine()
    line.show("step 1")
    line.show("step 2", keep=True)
    line.close()
    say("[bold]ready[/bold]")
    monkeypatch.setattr(Gone, "number", errno.ENOSPC)
    with pytest.raises(OSError, match="gone"):
        say("no room is no closed terminal")
