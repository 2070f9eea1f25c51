"""The OpenAI API over one loaded model: /v1/chat/completions, /v1/models, /health."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from megaswift.errors import MegaswiftError, UserError
from megaswift.inference.backends import Backend
from megaswift.inference.gate import Gate, Refused, Rules
from megaswift.inference.options import Answer, GenerationOptions, PromptError, PromptTooLongError
from megaswift.inference.request import check_supported, check_types, decoding_of, message_of
from megaswift.inference.serving import Job, Line

_FINISH = {"stop": "stop", "length": "length", "interrupted": "stop"}


@dataclass(frozen=True)
class Limits:
    """What one server allows.

    Attributes:
        new_tokens: of an answer.
        messages: of one conversation.
    """

    new_tokens: int = 2048
    messages: int = 1000


class Service:
    """Turns requests into jobs and answers into the API's objects.

    Args:
        backend: a loaded model.
        name: of the model in requests.
        options: decoding where a request says nothing.
        system: system prompt of conversations that bring none; None for the template's.
    """

    def __init__(
        self,
        backend: Backend,
        name: str,
        options: GenerationOptions,
        limits: Limits,
        batch_size: int,
        system: str | None = None,
    ) -> None:
        self.name, self.limits, self._system = name, limits, system
        self._backend, self._options = backend, options
        self.line = Line(backend, batch_size)
        self.born = int(time.time())

    def job(self, request: Any) -> Job:
        """The job of a request. Raises Refused for what cannot be."""
        check_types(request)
        if request.get("model") not in (None, self.name):
            raise Refused(404, f"model {request['model']!r} is not served here; use {self.name!r}", "model_not_found")
        messages = self._messages(request.get("messages"))
        check_supported(request)
        options = self._decoding(request)
        try:
            prompt = self._backend.prompt_ids(messages, options)
        except PromptTooLongError as error:
            raise Refused(400, error.what, "context_length_exceeded") from error
        except PromptError as error:
            raise Refused(400, error.what) from error
        return Job(prompt, messages, options, bool(request.get("stream")), asyncio.get_running_loop())

    def _messages(self, messages: Any) -> list[dict[str, Any]]:
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "messages must be a list with at least one message", param="messages")
        if len(messages) > self.limits.messages:
            raise Refused(400, f"more than {self.limits.messages} messages")
        found = [message_of(message) for message in messages]
        if found[-1]["role"] != "user":
            raise Refused(400, "the last message must be the user's")
        if self._system is not None and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": self._system})
        return found

    def _decoding(self, request: dict[str, Any]) -> GenerationOptions:
        """The request's decoding within the limits; what it leaves open is the server's."""
        try:
            return replace(self._options, **decoding_of(request, self.limits.new_tokens))
        except UserError as error:
            raise Refused(400, error.what.removeprefix("--")) from error

    async def whole(self, job: Job) -> dict[str, Any]:
        """The answer as one object."""
        answer: Answer | None = None
        async with contextlib.aclosing(self.line.pieces(job)) as pieces:
            async for item in pieces:
                answer = item if isinstance(item, Answer) else answer
        assert answer is not None
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": None,
            "finish_reason": _FINISH[answer.finish],
        }
        return self._object("chat.completion", _new_id()) | {"choices": [choice], "usage": _usage(answer)}

    async def events(self, job: Job, with_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        number = _new_id()

        def event(delta: dict[str, Any], finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return _event(self._object("chat.completion.chunk", number) | {"choices": [choice]})

        try:
            yield event({"role": "assistant", "content": ""})
            async with contextlib.aclosing(self.line.pieces(job)) as pieces:
                async for item in pieces:
                    if isinstance(item, str):
                        yield event({"content": item})
                        continue
                    yield event({}, _FINISH[item.finish])
                    if with_usage:
                        yield _event(self._object("chat.completion.chunk", number) | {"choices": [], "usage": _usage(item)})
            yield "data: [DONE]\n\n"
        except (MegaswiftError, RuntimeError) as error:
            yield _event({"error": {"message": _first_line(error), "type": "server_error", "param": None, "code": None}})

    def _object(self, kind: str, number: str) -> dict[str, Any]:
        return {"id": number, "object": kind, "created": int(time.time()), "model": self.name}


def make_app(service: Service, rules: Rules, api_key: str | None) -> Any:
    """The application behind its gate; `rules` and `api_key` are the gate's."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.requests import Request

    app = FastAPI(title="megaswift", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": service.name, "object": "model", "created": service.born, "owned_by": "megaswift"}
        return {"object": "list", "data": [entry]}

    async def chat(request: Request) -> Any:
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the body is not JSON") from error
        job = service.job(body)
        if job.streams:
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(service.events(job, usage), media_type="text/event-stream")
        try:
            return JSONResponse(await _unless_gone(request, service.whole(job)))
        except (MegaswiftError, RuntimeError) as error:
            raise Refused(500, _first_line(error), kind="server_error") from error

    # Annotations are texts here, and `Request` is no name of the module: FastAPI would take it for a field of the body.
    chat.__annotations__ = {"request": Request}
    app.post("/v1/chat/completions")(chat)
    return Gate(app, rules, api_key)


async def _unless_gone(request: Any, work: Any) -> Any:
    """The result of `work`; when the client goes away it is given up."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=0.5)
            if not task.done() and await request.is_disconnected():
                raise Refused(499, "the client went away")
        return task.result()
    finally:
        task.cancel()


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens, "total_tokens": total}


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
