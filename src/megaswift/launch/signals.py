"""SIGTERM, SIGINT and SIGHUP: the first asks the run to stop at its next step boundary, the second ends the process at once.

A closed terminal sends SIGHUP; where that is ignored (nohup) it stays so.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal, raised where a process prepares: no `except Exception` of a library mistakes it for an error of its own."""


class StopSignals:
    """While it is entered, signals are counted by a thread of their own, so that a process that waits in C hears them too.

    Args:
        shared: a file by which the launcher tells all ranks of the machine, those that have not started yet included.
        on_first: called in that thread with the signal's name.

    Attributes:
        interrupt: called in the main thread at the first signal; it may raise.
    """

    def __init__(self, shared: Path | None = None, on_first: Callable[[str], None] | None = None) -> None:
        self.shared, self.on_first = shared, on_first
        self.interrupt: Callable[[str], None] | None = None
        self.name = ""
        self._old: dict[int, Any] = {}

    @property
    def asked(self) -> str:
        """Name of the signal that asked for a stop, or an empty text."""
        if not self.name and self.shared is not None and self.shared.exists():
            self.name = self.shared.read_text(encoding="utf-8") or "SIGTERM"
        return self.name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            heard = SIGNALS if signal.getsignal(signal.SIGHUP) in (signal.SIG_IGN, None) else (*SIGNALS, signal.SIGHUP)
            self._old = {number: signal.signal(number, self._in_main_thread) for number in heard}
            self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._count, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._old:
            signal.set_wakeup_fd(self._old_fd)
            for number, handler in self._old.items():
                signal.signal(number, handler)
            self._writer.close()

    def _count(self) -> None:
        with self._reader:
            while data := self._reader.recv(1):
                if data[0] not in self._old or (self.name and data[0] == signal.SIGHUP):
                    continue  # terminals and service managers send SIGHUP beside another signal: it is never the second
                if self.name:
                    os._exit(128 + data[0])
                self.name = signal.Signals(data[0]).name
                if self.on_first is not None:
                    self.on_first(self.name)

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self.interrupt is not None:
            self.interrupt(signal.Signals(number).name)
