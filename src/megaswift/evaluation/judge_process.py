"""A process of its own that judges answers in mathematics, with a deadline for each.

Reading mathematics out of free text can take minutes for a degenerate answer, inside one regular expression that nothing
but the end of its process stops. EvalScope forks the asking process for that, twice an answer: 55 to 100 ms beside a loaded
model, where judging takes 2. Here one small process, which has no model, judges them all; what outlasts the deadline is
a wrong answer, and the next one gets a new process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from megaswift.evaluation.scoring import Asked, Scorer, Verdict
from megaswift.launch.agent import safe_path

DEADLINE = 30.0  # seconds for one answer; EvalScope's own
_START = 300.0  # seconds for importing EvalScope, from a cold disk on a busy machine


class JudgeProcess:
    """Judges answers like the scorer that `make()` builds, in a child process. A context manager.

    Args:
        make: builds the scorer; goes to the child, so it and what it holds must be picklable.
        deadline: seconds for one answer.

    Called with a question and an answer it returns the verdict: Verdict("", False, 0) past the deadline or where the child
    died over it. An exception of the scorer itself is raised here as it is.
    """

    def __init__(self, make: Callable[[], Scorer], deadline: float = DEADLINE) -> None:
        self._make, self._deadline = make, deadline
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._ready = False

    def __enter__(self) -> JudgeProcess:
        self._start()  # it imports while the first answers are made
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def __call__(self, asked: Asked, text: str) -> Verdict:
        """The verdict on one answer."""
        pipe = self._pipe or self._start()
        try:
            if not self._ready:
                _receive(pipe, _START)
                self._ready = True
            pipe.send((asked, text))
            return _receive(pipe, self._deadline + 10)  # the child ends by itself before that
        except (TimeoutError, EOFError, BrokenPipeError, ConnectionResetError):
            ready = self._ready
            self._stop()
            if not ready:
                raise RuntimeError("the process that judges answers did not start.") from None
            return Verdict("", False, 0.0)

    def _start(self) -> Connection:
        # Neither forked nor spawned by multiprocessing: the asking process has threads, perhaps a GPU, and a user's script
        # may be its main module, which must not run again. A session of its own, so that Ctrl-C is the asking process's alone.
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *safe_path(), "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._ready = False
        self._pipe.send((sys.path, self._deadline))
        self._pipe.send(self._make)
        return self._pipe

    def _stop(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.wait()
            self._process = self._pipe = None


def _receive(pipe: Connection, seconds: float) -> Any:
    if not pipe.poll(seconds):
        raise TimeoutError
    fine, value = pipe.recv()
    if not fine:
        raise value
    return value


def serve(pipe: Connection) -> None:
    """The child: says that it is ready, then answers until the pipe is closed or an answer takes too long."""
    multiprocessing.current_process().daemon = True  # daemonic processes have no children, so EvalScope forks none here
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also inside a regular expression
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        sys.path, deadline = pipe.recv()
        make = pipe.recv()
        fine, scorer = _outcome(make)
        _send(pipe, (fine, None if fine else scorer))
        while fine:
            question = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, deadline)
            verdict = _outcome(scorer.judge, *question)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(pipe, verdict)


def _outcome(function: Callable[..., Any], *words: Any) -> tuple[bool, Any]:
    """(True, what it returns) or (False, what it raises)."""
    try:
        return True, function(*words)
    except Exception as error:
        return False, error


def _send(pipe: Connection, outcome: tuple[bool, Any]) -> None:
    try:
        pipe.send(outcome)
    except (pickle.PicklingError, TypeError, AttributeError):  # an exception that holds what cannot travel
        pipe.send((False, RuntimeError(f"{type(outcome[1]).__name__}: {outcome[1]}")))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
