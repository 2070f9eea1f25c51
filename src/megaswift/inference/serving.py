"""One thread that owns the model: requests wait in a line, are answered together where they can be, and can be given up."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from megaswift.errors import MegaswiftError
from megaswift.inference.backends import Backend
from megaswift.inference.options import Answer, GenerationOptions


@dataclass(eq=False)
class Job:
    """One request on its way.

    Attributes:
        prompt: token ids.
        options: decoding.
        streams: pieces are wanted while the answer is made.
        given_up: set when nobody waits any more.
    """

    prompt: list[int]
    options: GenerationOptions
    streams: bool
    loop: asyncio.AbstractEventLoop
    given_up: threading.Event = field(default_factory=threading.Event)
    pieces: asyncio.Queue[str | Answer | BaseException] = field(default_factory=asyncio.Queue)

    def tell(self, item: str | Answer | BaseException) -> None:
        """Hand something to the waiting request, from the model's thread."""
        with contextlib.suppress(RuntimeError):  # the server is going down
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class Line:
    """The line of waiting requests and the thread that answers them.

    Args:
        backend: a loaded model; only the thread of this object touches it after the start.
        batch_size: requests with equal decoding that are answered together.
    """

    def __init__(self, backend: Backend, batch_size: int) -> None:
        self._backend, self._batch_size = backend, batch_size
        self._waiting: queue.Queue[Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after the answer it is at."""
        self._waiting.put(None)

    async def pieces(self, job: Job) -> AsyncGenerator[str | Answer, None]:
        """Pieces of a job's answer and, last, the whole; leaving early gives the job up."""
        self._waiting.put(job)
        try:
            while True:
                item = await job.pieces.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Answer):
                    return
        finally:
            job.given_up.set()

    def _work(self) -> None:
        held: Job | None = None
        while True:
            job = held or self._waiting.get()
            held = None
            if job is None:
                return
            if job.given_up.is_set():
                continue
            group, held, ends = [job], None, False
            while not job.streams and len(group) < self._batch_size:
                try:
                    other = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if other is None:
                    ends = True
                    break
                if other.given_up.is_set():
                    continue
                if other.streams or other.options != job.options:
                    held = other
                    break
                group.append(other)
            self._answer(group)
            if ends:
                return

    def _answer(self, group: list[Job]) -> None:
        try:
            if group[0].streams:
                self._stream(group[0])
                return
            prompts = [job.prompt for job in group]
            answers = self._backend.answer_all(
                prompts, group[0].options, batch_size=len(group), given_up=lambda place: group[place].given_up.is_set()
            )
            for place, answer in answers:
                group[place].tell(answer)
        except Exception as error:  # the server must go on; the request is told
            for job in group:
                job.tell(error if isinstance(error, MegaswiftError) else RuntimeError(f"{type(error).__name__}: {error}"))

    def _stream(self, job: Job) -> None:
        stream = self._backend.stream_ids(job.prompt, job.options)
        for piece in stream:
            if job.given_up.is_set():
                stream.stop()
                return
            if piece:
                job.tell(piece)
        job.tell(stream.answer)
