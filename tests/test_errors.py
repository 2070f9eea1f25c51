"""What is kept of a library's error is one line that does not end in the air."""

from __future__ import annotations

import pytest

from megaswift.errors import first_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n  plain  \nmore", "plain"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
        ("from one of: \n(1) a file,\n\n(2) a class", "from one of: (1) a file, (2) a class"),
        ("from one of:", "from one of"),
        (":", "ValueError"),
        ("wrong:\n\ta\n\tb\n\tc\n\td", "wrong: a b c d"),
        ("wrong:\n\ta\n\tb\n\tc\n\td\n\te", "wrong: a b c d ..."),
    ],
)
def test_what_an_error_says_first(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line
