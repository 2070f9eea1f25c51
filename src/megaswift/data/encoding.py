"""Text that is not UTF-8: told as what it is, with the line and what to do."""

from __future__ import annotations

import re
from pathlib import Path

from megaswift.data.conversation import BadRow
from megaswift.errors import DataError

_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # the mark of UTF-16; UTF-32 begins with the first of them too
_CHINESE = re.compile("[\u4e00-\u9fff]{2}")


class OtherEncoding(BadRow):
    """A row in an encoding that is known: not one damaged row, but a file to be converted first."""


def refuse_utf16(path: Path, first: bytes) -> None:
    """Raise DataError where the first bytes of a text file (four of them tell all) are those of UTF-16."""
    if first[:2] in _UTF16 or (len(first) >= 4 and b"\0" in first[:2] and first[:4].count(0) == 2):
        raise DataError("the file is UTF-16, expected UTF-8.", where=f"{path}:1", fix=_conversion("UTF-16"))


def not_utf8(data: bytes, error: UnicodeDecodeError) -> BadRow:
    """Why the bytes of a row cannot be read: one wrong byte, or another encoding."""
    found = _encoding(data)
    detail = f"byte {error.start} of the row"
    return OtherEncoding("not UTF-8", f"{detail}; as {found} it is Chinese") if found else BadRow("not UTF-8", detail)


def refuse_encoding(error: BadRow, where: str) -> None:
    """Raise DataError for a row that shows the whole file to be in another encoding."""
    if isinstance(error, OtherEncoding):
        raise DataError(f"the file is not UTF-8: {error.detail}.", where=where, fix=_conversion("GB18030"))


def wrong_bytes(path: Path, line: int, data: bytes) -> DataError:
    """The error for a file, read as a whole, whose `data` at a line is not UTF-8."""
    found = _encoding(data)
    what = f"the file is not UTF-8{f' (as {found} it is Chinese)' if found else ''}."
    return DataError(
        what, where=f"{path}:{line}", fix=_conversion("GB18030") if found else "save it as UTF-8, or mend the line"
    )


def _encoding(data: bytes) -> str | None:
    """GBK where the bytes are Chinese in it, else None. GB18030 holds GBK and GB2312."""
    try:
        return "GBK" if _CHINESE.search(data.decode("gb18030")) else None
    except UnicodeDecodeError:
        return None


def _conversion(encoding: str) -> str:
    return f"save it as UTF-8, for example: iconv -f {encoding} -t UTF-8 FILE > NEW"
