"""The OpenAI API over one loaded model: /v1/chat/completions, /v1/models, /health."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from megaswift.errors import MegaswiftError, UserError
from megaswift.inference.backends import Backend
from megaswift.inference.options import Answer, GenerationOptions, PromptError, PromptTooLongError
from megaswift.inference.serving import Job, Line

_FINISH = {"stop": "stop", "length": "length", "interrupted": "stop"}
_REFUSED = ("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "audio", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class Limits:
    """What one server allows.

    Attributes:
        body_bytes: of a request.
        new_tokens: of an answer.
        requests: that wait or run at once.
        messages: of one conversation.
    """

    body_bytes: int = 4_000_000
    new_tokens: int = 2048
    requests: int = 64
    messages: int = 1000


class Refused(Exception):
    """A request that gets an error of the API instead of an answer."""

    def __init__(self, status: int, message: str, code: str | None = None, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Service:
    """Turns requests into jobs and answers into the API's objects.

    Args:
        backend: a loaded model.
        name: of the model in requests.
        options: decoding where a request says nothing.
    """

    def __init__(self, backend: Backend, name: str, options: GenerationOptions, limits: Limits, batch_size: int) -> None:
        self.name, self.limits = name, limits
        self._backend, self._options = backend, options
        self.line = Line(backend, batch_size)
        self.running: weakref.WeakSet[Job] = weakref.WeakSet()  # a job that nobody holds any more takes no place
        self.born = int(time.time())

    def job(self, request: Any) -> Job:
        """The job of a request. Raises Refused for what cannot be."""
        if not isinstance(request, dict):
            raise Refused(400, "the body must be a JSON object")
        if request.get("model") not in (None, self.name):
            raise Refused(404, f"model {request['model']!r} is not served here; use {self.name!r}", "model_not_found")
        messages = self._messages(request.get("messages"))
        for name in _REFUSED:
            if request.get(name):
                raise Refused(400, f"{name} is not supported")
        if request.get("n", 1) not in (None, 1):
            raise Refused(400, "n must be 1")
        if (request.get("response_format") or {"type": "text"}).get("type") != "text":
            raise Refused(400, "response_format must be text")
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
            raise Refused(400, "messages must be a list with at least one message")
        if len(messages) > self.limits.messages:
            raise Refused(400, f"more than {self.limits.messages} messages")
        found = []
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                content = "".join(str(part.get("text", "")) for part in content)
            if not isinstance(content, str) or message.get("role") not in ("system", "developer", "user", "assistant"):
                raise Refused(400, "a message needs a role (system, user, assistant) and text as its content")
            found.append({"role": "system" if message["role"] == "developer" else message["role"], "content": content})
        if found[-1]["role"] != "user":
            raise Refused(400, "the last message must be the user's")
        return found

    def _decoding(self, request: dict[str, Any]) -> GenerationOptions:
        """The request's decoding within the limits; what it leaves open is the server's."""
        changes: dict[str, Any] = {}
        for name, kind in (
            ("temperature", float),
            ("top_p", float),
            ("top_k", int),
            ("repetition_penalty", float),
            ("seed", int),
        ):
            value = request.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not isinstance(value, int)):
                raise Refused(400, f"{name} must be a number")
            changes[name] = kind(value)
        wanted = request.get("max_completion_tokens", request.get("max_tokens"))
        if wanted is not None:
            if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
                raise Refused(400, "max_tokens must be a whole number of 1 or more")
            changes["max_new_tokens"] = min(wanted, self.limits.new_tokens)
        stop = request.get("stop")
        if stop is not None:
            words = [stop] if isinstance(stop, str) else stop
            if not isinstance(words, list) or len(words) > 16 or not all(isinstance(word, str) and word for word in words):
                raise Refused(400, "stop must be up to 16 texts")
            changes["stop_words"] = tuple(words)
        try:
            return replace(self._options, **changes)
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


def make_app(service: Service, api_key: str | None, hosts: list[str] | None) -> Any:
    """The application.

    Args:
        api_key: what requests must bring as a bearer token; None for no key.
        hosts: names under which this server may be called; None for any. A web page that points its own name at this
            machine is refused by it.
    """
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
        if len(service.running) >= service.limits.requests:
            raise Refused(429, "too many requests are waiting; try again later", "rate_limit_exceeded", "rate_limit_error")
        service.running.add(job)
        if job.streams:
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(_counted(service, job, service.events(job, usage)), media_type="text/event-stream")
        try:
            return JSONResponse(await _unless_gone(request, service.whole(job)))
        except (MegaswiftError, RuntimeError) as error:
            raise Refused(500, _first_line(error), kind="server_error") from error
        finally:
            service.running.discard(job)

    # Annotations are texts here, and `Request` is no name of the module: FastAPI would take it for a field of the body.
    chat.__annotations__ = {"request": Request}
    app.post("/v1/chat/completions")(chat)
    return _Gate(app, service.limits.body_bytes, api_key, hosts)


async def _counted(service: Service, job: Job, events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield event
    finally:
        service.running.discard(job)


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


class _Gate:
    """Looks at a request before the application does: host, key, size of the body."""

    def __init__(self, app: Callable[..., Any], body_bytes: int, api_key: str | None, hosts: list[str] | None) -> None:
        self._app, self._body_bytes, self._api_key, self._hosts = app, body_bytes, api_key, hosts

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, refusal)
            return
        body = b""
        if scope["method"] == "POST":
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                if len(body) > self._body_bytes:
                    await _answer(send, self._too_large())
                    return
                if not message.get("more_body"):
                    break
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _refusal(self, scope: dict[str, Any], headers: dict[bytes, bytes]) -> Refused | None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._hosts is not None and name not in self._hosts:
            return Refused(400, f"this server does not answer to the name {name!r}")
        if self._api_key is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"").decode("latin-1").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._api_key.encode()):
                return Refused(401, "the API key is missing or wrong", "invalid_api_key", "authentication_error")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self._body_bytes} bytes")


async def _answer(send: Callable[..., Any], refused: Refused) -> None:
    body = json.dumps(refused.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens, "total_tokens": total}


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
