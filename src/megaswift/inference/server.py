"""The OpenAI API over one loaded model: /v1/chat/completions, /v1/completions, /v1/models, /health."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megaswift.data.conversation import BadRow, Conversation
from megaswift.data.messages import read_messages, tools_of
from megaswift.errors import MegaswiftError, UserError, first_line
from megaswift.inference.backends import Backend
from megaswift.inference.gate import Gate, Refused, Rules
from megaswift.inference.objects import CHAT_FORM, TEXT_FORM, Form
from megaswift.inference.options import Answer, GenerationOptions, PromptError, PromptTooLongError, fit_prompt
from megaswift.inference.request import (
    CHAT,
    COMPLETION,
    check_supported,
    check_types,
    decoding_of,
    message_of,
    prompts_of,
    refuse_media,
)
from megaswift.inference.serving import Job, Line
from megaswift.inference.tool_calls import form_of

_COMPLETION_TOKENS = 16  # of a completion that does not say how many, as in OpenAI's API


@dataclass(frozen=True)
class Asked:
    """A request that can be answered: a job for each prompt, and whether the model may call tools."""

    jobs: list[Job]
    tools: bool = False

    @property
    def adapter(self) -> str | None:
        """The adapter that answers; None: the model itself."""
        return self.jobs[0].options.adapter


@dataclass(frozen=True)
class Limits:
    """What one server allows.

    Attributes:
        new_tokens: of an answer.
        messages: of one conversation.
        prompts: of one completion.
    """

    new_tokens: int = 2048
    messages: int = 1000
    prompts: int = 64


class Service:
    """Turns requests into jobs and answers into the API's objects.

    Args:
        backend: a loaded model.
        name: of the model in requests.
        options: decoding where a request says nothing.
        system: system prompt of conversations that bring none; None for the template's.
        adapters: names in requests of adapters that the backend has beside the model.
    """

    def __init__(
        self,
        backend: Backend,
        name: str,
        options: GenerationOptions,
        limits: Limits,
        batch_size: int,
        system: str | None = None,
        adapters: Sequence[str] = (),
    ) -> None:
        self.names = (name, *adapters)
        self.name, self.limits, self._system = name, limits, system
        self._backend, self._options = backend, options
        self.line = Line(backend, batch_size)
        self.born = int(time.time())
        self._tool_form = form_of(backend.prompts, backend.tokenizer)

    def chat(self, request: Any) -> Asked:
        """A chat completion. Raises Refused for what cannot be."""
        self._check(request, CHAT)
        offered = [] if request.get("tool_choice") == "none" else request.get("tools") or []
        conversation = self._conversation(request.get("messages"), offered)
        try:
            return Asked([self._job(request, lambda options: self._backend.prompt_ids(conversation, options))], bool(offered))
        except PromptTooLongError as error:
            raise Refused(400, error.what, "context_length_exceeded") from error
        except PromptError as error:
            raise Refused(400, error.what) from error

    def completion(self, request: Any) -> Asked:
        """A completion of plain text: no template, tokens as the tokenizer makes them. Raises Refused for what cannot be."""
        self._check(request, COMPLETION)
        prompts = prompts_of(request.get("prompt"), self.limits.prompts)
        request = {"max_tokens": _COMPLETION_TOKENS} | {name: value for name, value in request.items() if value is not None}

        def ids(prompt: str | list[int], options: GenerationOptions) -> list[int]:
            tokenizer = self._backend.tokenizer
            found = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            if not found or not all(0 <= token < len(tokenizer) for token in found):
                raise Refused(400, f"prompt must hold token ids from 0 to {len(tokenizer) - 1}", param="prompt")
            return fit_prompt(list(found), self._backend.context, options)

        try:
            return Asked([self._job(request, partial(ids, prompt)) for prompt in prompts])
        except PromptTooLongError as error:
            raise Refused(400, error.what, "context_length_exceeded") from error

    def _check(self, request: Any, known: frozenset[str]) -> None:
        check_types(request)
        if request.get("model") not in (None, *self.names):
            names = " or ".join(map(repr, self.names))
            raise Refused(404, f"model {request['model']!r} is not served here; use {names}", "model_not_found")
        check_supported(request, known)

    def _job(self, request: dict[str, Any], ids: Callable[[GenerationOptions], list[int]]) -> Job:
        asked = request.get("model")
        options = replace(self._decoding(request), adapter=None if asked == self.name else asked)
        return Job(ids(options), options, bool(request.get("stream")), asyncio.get_running_loop())

    def _conversation(self, messages: Any, tools: list[Any]) -> Conversation:
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "messages must be a list with at least one message", param="messages")
        if len(messages) > self.limits.messages:
            raise Refused(400, f"more than {self.limits.messages} messages")
        refuse_media(messages)
        found = [message_of(message, number) for number, message in enumerate(messages)]
        if found[-1]["role"] not in ("user", "tool"):
            raise Refused(400, "the last message must be the user's, or a tool's")
        if self._system is not None and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": self._system})
        with_tools = tools or any(message["role"] == "tool" or message.get("tool_calls") for message in found)
        if with_tools and self._tool_form != "hermes":
            raise Refused(
                400,
                "tools is not supported: the calls of this chat template are not read here; vllm has more forms",
                param="tools",
            )
        try:
            return Conversation(read_messages(found), tools_of(tools))
        except BadRow as error:
            raise Refused(400, f"{'tools' if error.detail.startswith('an entry of tools') else 'messages'}: {error}") from error

    def _decoding(self, request: dict[str, Any]) -> GenerationOptions:
        """The request's decoding within the limits; what it leaves open is the server's."""
        try:
            return replace(self._options, **decoding_of(request, self.limits.new_tokens))
        except UserError as error:
            raise Refused(400, error.what.removeprefix("--")) from error

    async def whole(self, asked: Asked, form: Form) -> dict[str, Any]:
        """The answer as one object."""
        answers = await asyncio.gather(*map(self._answer, asked.jobs))
        choices = [form.choice(answer, index, asked.tools) for index, answer in enumerate(answers)]
        return form.object(asked.adapter or self.name, _new_id(form)) | {"choices": choices, "usage": _usage(*answers)}

    async def _answer(self, job: Job) -> Answer:
        answer: Answer | None = None
        async with contextlib.aclosing(self.line.pieces(job)) as pieces:
            async for item in pieces:
                answer = item if isinstance(item, Answer) else answer
        assert answer is not None
        return answer

    async def events(self, asked: Asked, form: Form, with_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events; those to several prompts one after the other."""
        number, answers = _new_id(form), []

        def event(choices: list[dict[str, Any]], **more: Any) -> str:
            return _event(form.object(asked.adapter or self.name, number, chunk=True) | {"choices": choices} | more)

        try:
            for index, job in enumerate(asked.jobs):
                pieces = form.pieces(index, asked.tools)
                for choice in pieces.first():
                    yield event([choice])
                async with contextlib.aclosing(self.line.pieces(job)) as items:
                    async for item in items:
                        for choice in pieces.last(item) if isinstance(item, Answer) else pieces.text(item):
                            yield event([choice])
                        answers += [item] if isinstance(item, Answer) else []
            if with_usage:
                yield event([], usage=_usage(*answers))
            yield "data: [DONE]\n\n"
        except (MegaswiftError, RuntimeError) as error:
            yield _event({"error": {"message": first_line(error), "type": "server_error", "param": None, "code": None}})


def make_app(service: Service, rules: Rules, api_key: str | None) -> Any:
    """The application behind its gate; `rules` and `api_key` are the gate's."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import Request

    app = FastAPI(title="megaswift", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(Refused(error.status_code, what).body, error.status_code)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        every = [{"id": name, "object": "model", "created": service.born, "owned_by": "megaswift"} for name in service.names]
        return {"object": "list", "data": every}

    async def answer(request: Request, ask: Callable[[Any], Asked], form: Form) -> Any:
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the body is not JSON") from error
        asked = ask(body)
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(service.events(asked, form, usage), media_type="text/event-stream")
        try:
            return JSONResponse(await _unless_gone(request, service.whole(asked, form)))
        except (MegaswiftError, RuntimeError) as error:
            raise Refused(500, first_line(error), kind="server_error") from error

    async def chat(request: Request) -> Any:
        return await answer(request, service.chat, CHAT_FORM)

    async def completion(request: Request) -> Any:
        return await answer(request, service.completion, TEXT_FORM)

    # Annotations are texts here, and `Request` is no name of the module: FastAPI would take it for a field of the body.
    for path, handler in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        handler.__annotations__ = {"request": Request}
        app.post(path)(handler)
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


def _usage(*answers: Answer) -> dict[str, int]:
    prompt, made = sum(answer.prompt_tokens for answer in answers), sum(answer.tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _new_id(form: Form) -> str:
    return f"{form.prefix}-{uuid.uuid4().hex}"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
