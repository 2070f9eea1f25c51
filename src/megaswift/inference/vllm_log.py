"""What vLLM and its engine's process write about themselves: kept aside, and searched for the cause when they fail."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# "(EngineCore pid=7) ERROR 11-28 11:36:19 [core.py:1330] ValueError: No available memory ..."
_EXCEPTION = re.compile(r"(?:^|[\])] )([\w.]*(?:Error|Exception)): (.+)$", re.MULTILINE)
_LENGTH = 300  # characters of a cause that are shown
_WANTED = "VLLM_LOGGING_LEVEL" in os.environ  # the user wants to see vLLM's log


class EngineLog:
    """Takes standard error while vLLM starts; the engine's process, which begins there, goes on writing into it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the engine

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """Standard error of this process and of those that it starts goes into the log, unless the user set VLLM_LOGGING_LEVEL."""
        if _WANTED:
            yield
            return
        sys.stderr.flush()
        shown = os.dup(2)
        os.dup2(self._file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)

    def cause(self) -> str:
        """The last error in the log that is not about another one; "" where there is none."""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(size - 1_000_000, 0))
        text = self._file.read().decode("utf-8", "replace").replace("\r", "")
        found = [
            said for _, said in _EXCEPTION.findall(text) if "See root cause above" not in said and "See stack trace" not in said
        ]
        return found[-1][:_LENGTH] if found else ""

    def close(self) -> None:
        """Forget what was written."""
        self._file.close()
