"""The server as its users see it: the official client, streams, limits, keys; on loopback only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaswift.commands.deploy import check, deploy_main, is_loopback
from megaswift.config.options import DeployArguments
from megaswift.errors import UserError
from megaswift.inference.gate import GATE_VARIABLE, KEY_VARIABLE, Gate, Rules
from megaswift.inference.objects import CHAT_FORM
from megaswift.inference.options import Answer, GenerationOptions
from megaswift.inference.request import _NEUTRAL, BOOKKEEPING, CHAT, COMPLETION
from megaswift.inference.tool_calls import Call, form_of, split_calls
from megaswift.inference.transformers_backend import TransformersBackend
from megaswift.inference.vllm_gate import VllmGate

uvicorn = pytest.importorskip("uvicorn", reason="the server's packages are not installed (pip install '.[deploy]')")
pytest.importorskip("fastapi")
openai = pytest.importorskip("openai", reason="the official client is not installed")

KEY = "secret-key"
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "who are you"}],
    "max_tokens": 8,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def server(backend: TransformersBackend) -> Iterator[str]:
    """The address of a running server with small limits."""
    from megaswift.inference.server import Limits, Service, make_app

    service = Service(backend, "tiny", GenerationOptions(max_new_tokens=16, temperature=0), Limits(new_tokens=16), 4)
    listening = socket.create_server(("127.0.0.1", 0))
    app = make_app(service, Rules(5000, 3, ("127.0.0.1",), model="tiny"), KEY)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join(10)
    service.line.close()


@pytest.fixture
def client(server: str) -> Any:
    return openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0, timeout=60)


def expected(backend: TransformersBackend, text: str = "who are you", **changes: Any) -> str:
    options = GenerationOptions(**({"max_new_tokens": 8, "temperature": 0} | changes))
    return backend.generate([[{"role": "user", "content": text}]], options)[0].text


def post(
    server: str, body: bytes, headers: dict[str, str] | None = None, *, events: bool = False, path: str = "chat/completions"
) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"{server}/v1/{path}", body, {"Authorization": f"Bearer {KEY}", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, {} if events else json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_official_client_gets_an_answer(client: Any, backend: TransformersBackend) -> None:
    answer = client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == expected(backend)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_stream_joins_to_the_answer(client: Any, backend: TransformersBackend) -> None:
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(backend)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 0


def test_requests_at_once_get_their_own_answers(client: Any, backend: TransformersBackend) -> None:
    texts = ["who are you", "你是谁", "What is the capital of France?"]

    def ask(text: str) -> str:
        return (
            client.chat.completions.create(**ASK | {"messages": [{"role": "user", "content": text}]}).choices[0].message.content
        )

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, texts)) == [expected(backend, text) for text in texts]


def test_a_reader_who_leaves_stops_the_answer(client: Any, server: str) -> None:
    for _ in range(4):  # more than may wait at once: each must have been let go
        stream = client.chat.completions.create(**ASK | {"max_tokens": 16}, stream=True)
        next(iter(stream))
        stream.close()
    for _ in range(50):
        if post(server, json.dumps(ASK).encode())[0] == 200:
            break
    else:
        pytest.fail("the server holds on to requests that nobody waits for")


def test_tokens_are_limited_whatever_is_asked(client: Any) -> None:
    answer = client.chat.completions.create(**ASK | {"max_tokens": 100_000})
    assert answer.usage.completion_tokens <= 16


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "use 'tiny'"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": [{"role": "user"}]}, 400, "text as its content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages[0].content[0]: image_url is not supported",
        ),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, 400, "must be the user's"),
        ({"messages": [{"role": "user", "content": "a" * 2000}]}, 400, "tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "must be a number"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 2}, 400, "n must be 1"),
        ({"tools": [{}]}, 400, "an entry of tools has no name"),
        ({"tool_choice": "required"}, 400, "tool_choice must be auto or none"),
        ({"logprobs": True}, 400, "logprobs is not supported with --infer_backend pt; vllm has it"),
        ({"top_logprobs": 2}, 400, "top_logprobs is not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
        ({"parallel_tool_calls": False}, 400, "parallel_tool_calls is not supported"),
        ({"reasoning_effort": "low"}, 400, "reasoning_effort is not supported"),
        ({"modalities": ["text", "audio"]}, 400, "modalities is not supported"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 400, "chat_template_kwargs is not supported"),
        ({"temprature": 0}, 400, "temprature is not supported"),
        ({"prompt": "x"}, 400, "prompt is not supported"),
        ({"stream_options": {"include_usage": True, "x": 1}}, 400, "stream_options.x is not supported"),
        ({"messages": [{"role": "user", "content": "hi", "name": "Tom"}]}, 400, "messages[0].name is not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}]},
            400,
            "content[1]: input_audio",
        ),
        ({"stop": [""]}, 400, "stop"),
        ({"response_format": {"type": "json_object"}}, 400, "must be text"),
        ({"response_format": "json"}, 400, "response_format must be an object"),
        ({"stream_options": "x"}, 400, "stream_options must be an object"),
        ({"stream_options": {"include_usage": "yes"}, "stream": True}, 400, "include_usage must be true or false"),
        ({"stream": "yes"}, 400, "stream must be true or false"),
        ({"model": 5}, 400, "model must be a text"),
        ({"n": True}, 400, "n must be a whole number"),
        ({"tools": {}}, 400, "tools must be a list"),
        ({"logit_bias": []}, 400, "logit_bias must be an object"),
        ({"temperature": 10**400}, 400, "temperature must be a number"),
        ({"temperature": float("inf")}, 400, "temperature must be a number"),
        ({"top_k": 1.5}, 400, "top_k must be a whole number"),
        ({"seed": 2**64}, 400, "seed must be a whole number of 64 bits"),
        ({"max_tokens": 8, "max_completion_tokens": "x"}, 400, "max_completion_tokens must be a whole number"),
        ({"max_completion_tokens": 8, "max_tokens": 1.5}, 400, "max_tokens must be a whole number"),
        ({"stop": [1]}, 400, "stop"),
        ({"stop": {}}, 400, "stop"),
        ({"stop": ["\ud800"]}, 400, "stop"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "text as its content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, 400, "text as its content"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, 400, "needs a role"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}, *ASK["messages"]]},
            400,
            "a tool call has no name",
        ),
        ({"padding": "x" * 6000}, 413, "larger than 5000 bytes"),
    ],
)
def test_what_cannot_be_is_refused(server: str, changes: dict[str, Any], status: int, message: str) -> None:
    code, body = post(server, json.dumps(ASK | changes).encode())
    assert (code, message in body["error"]["message"]) == (status, True), body


def test_any_value_gets_an_answer_or_an_error_of_the_api(server: str) -> None:
    """Whatever stands in a field, nothing is a traceback; null is as if the field were not there."""
    fields = (
        "model messages stream stream_options response_format n stop temperature top_p top_k repetition_penalty seed max_tokens "
        "max_completion_tokens tools functions logprobs top_logprobs logit_bias audio presence_penalty frequency_penalty"
    ).split()
    values = ["x", "", 5, -1, 1.5, True, [], [None], [["x"]], {}, {"type": 5, "include_usage": []}, 10**400, -(2**63) - 1]
    for name in fields:
        for value in values:
            code, body = post(server, json.dumps(ASK | {"stream": False, "max_tokens": 1, name: value}).encode(), events=True)
            assert code in (200, 400, 404), (name, value, body)
            if code != 200:
                assert {"message", "type", "param", "code"} == set(body["error"]), (name, value, body)
        if name != "messages":
            assert post(server, json.dumps(ASK | {name: None}).encode())[0] == 200, name


def test_a_null_hides_no_other_limit(client: Any) -> None:
    answer = client.chat.completions.create(**ASK | {"max_tokens": 3}, extra_body={"max_completion_tokens": None})
    assert answer.usage.completion_tokens <= 3
    answer = client.chat.completions.create(**ASK | {"max_tokens": 8}, max_completion_tokens=2)
    assert answer.usage.completion_tokens <= 2


def test_odd_bodies_keys_and_names(server: str) -> None:
    assert post(server, b"{not json")[0] == 400
    assert post(server, b"[]")[0] == 400
    assert post(server, json.dumps(ASK).encode(), {"Authorization": "Bearer wrong"})[0] == 401
    assert post(server, json.dumps(ASK).encode(), {"Host": "evil.example:80"})[0] == 400
    with urllib.request.urlopen(f"{server}/health", timeout=10) as answer:
        assert json.load(answer) == {"status": "ok"}


def test_too_many_requests_are_told_to_wait(server: str) -> None:
    body = json.dumps(ASK | {"max_tokens": 16}).encode()
    with ThreadPoolExecutor(12) as pool:
        codes = list(pool.map(lambda _: post(server, body)[0], range(12)))
    assert set(codes) <= {200, 429}
    assert 200 in codes


class _Asgi:
    """An application that keeps what it was called with and answers when it is let."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.free = asyncio.Event()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await send({"type": "lifespan.startup.complete"})
            return
        body = (await receive())["body"]
        assert dict(scope["headers"])[b"content-length"] == str(len(body)).encode()
        self.bodies.append(json.loads(body))
        await self.free.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def test_the_gate_before_vllms_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rules = Rules(5000, 2, ("localhost",), new_tokens=16, stop_token_ids=(7,), model="tiny", greeting="it answers")
    monkeypatch.setenv(GATE_VARIABLE, rules.to_variable())
    monkeypatch.setenv(KEY_VARIABLE, KEY)

    async def call(gate: VllmGate, kind: str, body: bytes = b"") -> Any:
        sent: list[dict[str, Any]] = []
        headers = [(b"host", b"LocalHost:80"), (b"authorization", f"Bearer {KEY}".encode()), (b"content-length", b"3")]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await gate({"type": kind, "method": "POST", "path": "/v1/chat/completions", "headers": headers}, receive, send)
        return sent[0].get("status", sent[0])

    async def story() -> None:
        app = _Asgi()
        gate = VllmGate(app)
        await call(gate, "lifespan")
        assert capsys.readouterr().err == "it answers\n"
        assert (await call(gate, "websocket"))["type"] == "websocket.close"
        asked = [
            asyncio.ensure_future(call(gate, "http", body))
            for body in (b'{"max_tokens": 99}', b'{"stop_token_ids": [3], "max_completion_tokens": 4}')
        ]
        await asyncio.sleep(0)
        assert await call(gate, "http", b"{}") == 429
        app.free.set()
        assert await asyncio.gather(*asked) == [200, 200]
        assert app.bodies == [
            {"max_tokens": 16, "stop_token_ids": [7]},
            {"max_completion_tokens": 4, "stop_token_ids": [3, 7]},
        ]
        assert await call(gate, "http", b"{}") == 200  # places are free again

    asyncio.run(story())


def test_the_model_by_its_name(client: Any, server: str) -> None:
    found = client.models.retrieve("tiny")
    assert (found.id, found.object, found.owned_by) == ("tiny", "model", "megaswift")
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4' is not served here; use 'tiny'"):
        client.models.retrieve("gpt-4")


def test_what_the_server_does_not_have_is_an_error_of_the_api(server: str) -> None:
    code, body = post(server, b"{}", path="embeddings")
    assert (code, body["error"]["message"]) == (404, "POST /v1/embeddings: Not Found")


def test_completions_of_plain_text(client: Any, backend: TransformersBackend) -> None:
    """Texts and token ids, one or several, whole and streamed: no template stands around them."""
    texts = ["who are you", "What is"]
    ids = [backend.tokenizer(text)["input_ids"] for text in texts]
    wanted = dict(backend.answer_all(ids, GenerationOptions(max_new_tokens=8, temperature=0), batch_size=2))
    ask = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    for prompt in (texts, ids):
        answer = client.completions.create(prompt=prompt, **ask)
        assert [(choice.index, choice.text) for choice in answer.choices] == [(0, wanted[0].text), (1, wanted[1].text)]
        assert answer.object == "text_completion"
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    for prompt in (texts[0], ids[0]):
        assert client.completions.create(prompt=prompt, **ask).choices[0].text == wanted[0].text
    chunks = list(client.completions.create(prompt=texts, stream=True, stream_options={"include_usage": True}, **ask))
    joined = ["".join(c.text for chunk in chunks for c in chunk.choices if c.index == place) for place in (0, 1)]
    assert joined == [wanted[0].text, wanted[1].text]
    assert chunks[-1].usage.completion_tokens == wanted[0].tokens + wanted[1].tokens
    assert client.completions.create(model="tiny", prompt="a").usage.completion_tokens <= 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "prompt must be a text"), ({"prompt": []}, "prompt must hold 1 to 64"), ({"prompt": ["a", 5]}, "prompt must be"),
        ({"prompt": [[5], [999_999]]}, "token ids from 0 to"), ({"prompt": ["a"] * 65}, "1 to 64 texts"), ({"prompt": "a " * 2000}, "tokens"),
        ({"logprobs": 0}, "logprobs is not supported"), ({"echo": True}, "echo is not supported"), ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 2}, "best_of is not supported"), ({"n": 2}, "n must be 1"), ({"messages": []}, "messages is not supported"),
        ({"max_completion_tokens": 2}, "max_completion_tokens is not supported"), ({"model": "gpt-4"}, "use 'tiny'"),
    ],
)  # fmt: skip
def test_completions_that_cannot_be(server: str, changes: dict[str, Any], message: str) -> None:
    code, body = post(server, json.dumps({"prompt": "a", "max_tokens": 1} | changes).encode(), path="completions")
    assert (code, message in body["error"]["message"]) == (404 if "model" in changes else 400, True), body


def test_every_field_of_the_official_client_is_known(client: Any) -> None:
    """Each has its effect, is bookkeeping, or is refused unless it asks for nothing."""
    from openai.types import completion_create_params as text
    from openai.types.chat import completion_create_params as chat

    for params, known in ((chat.CompletionCreateParamsBase, CHAT), (text.CompletionCreateParamsBase, COMPLETION)):
        assert not set(params.__annotations__) - known - BOOKKEEPING - set(_NEUTRAL)
        assert not known & BOOKKEEPING
    free = dict(user="me", metadata={"a": "b"}, store=True, n=1, logprobs=False, presence_penalty=0, frequency_penalty=0.0,
                response_format={"type": "text"}, parallel_tool_calls=True, tool_choice="auto", modalities=["text"])  # fmt: skip
    assert client.chat.completions.create(**ASK | free).choices[0].message.content


def test_what_asks_for_nothing_has_its_own_type() -> None:
    """JSON's true is no 1 and 0 is no false, though Python calls them equal; 0 and 0.0 are one penalty."""
    from megaswift.inference.request import asks_for_nothing

    nothing = (("n", 1), ("echo", False), ("logprobs", False), ("presence_penalty", 0.0), ("frequency_penalty", 0), ("n", None))
    something = (("n", True), ("n", 1.0), ("echo", 0), ("logprobs", 0), ("top_logprobs", False), ("tools", {}), ("x", ""))
    assert all(asks_for_nothing(*field) for field in nothing)
    assert not any(asks_for_nothing(*field) for field in something)


HOUR = {
    "type": "function",
    "function": {
        "name": "hour",
        "description": "The hour.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
CALLED = 'I look.\n<tool_call>\n{"name": "hour", "arguments": {"town": "Nuuk"}}\n</tool_call>\n<tool_call>{"name": "hour", "arguments": {}}</tool_call>'


class _Said:
    """A stream that says a text in small pieces."""

    def __init__(self, text: str) -> None:
        self.answer = Answer(text, 3, 9, "stop")
        self._pieces = iter([text[place : place + 3] for place in range(0, len(text), 3)])

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def stop(self) -> Answer:
        return self.answer


def test_tools_are_written_and_calls_are_read(
    client: Any, backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def answer_all(self: Any, prompts: Any, *_: Any, **__: Any) -> Iterator[tuple[int, Answer]]:
        asked.extend(prompts)
        yield 0, Answer(CALLED, 3, 9, "stop")

    monkeypatch.setattr(TransformersBackend, "answer_all", answer_all)
    monkeypatch.setattr(TransformersBackend, "stream_ids", lambda *_: _Said(CALLED))
    first = client.chat.completions.create(**ASK, tools=[HOUR])
    [choice] = first.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert calls == [("hour", {"town": "Nuuk"}), ("hour", {})]
    assert '"name": "hour"' in backend.tokenizer.decode(asked[0])
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ASK, tools=[HOUR], stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks).strip() == "I look."
    streamed = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [(call.index, call.function.name, json.loads(call.function.arguments)) for call in streamed] == [
        (number, *call) for number, call in enumerate(calls)
    ]
    assert chunks[-1].finish_reason == "tool_calls"
    history = [*ASK["messages"], choice.message.model_dump(), {"role": "tool", "tool_call_id": "c", "content": "It is noon."}]
    client.chat.completions.create(**ASK | {"messages": history})
    assert "<tool_response>\nIt is noon.\n</tool_response>" in backend.tokenizer.decode(asked[1])
    assert '{"name": "hour", "arguments": {"town": "Nuuk"}}' in backend.tokenizer.decode(asked[1])
    plain = client.chat.completions.create(**ASK, tools=[HOUR], tool_choice="none")
    assert (plain.choices[0].message.content, plain.choices[0].message.tool_calls) == (CALLED, None)
    assert '"name": "hour"' not in backend.tokenizer.decode(asked[2])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain", "plain", []), ("<tool_call>{broken}</tool_call>", "<tool_call>{broken}</tool_call>", []), ("<tool_call>{", "<tool_call>{", []),
        ('<think><tool_call>{"name": "x"}</tool_call></think>no', '<think><tool_call>{"name": "x"}</tool_call></think>no', []),
        ('<tool_call>{"name": "x", "arguments": {"a": "}"}}</tool_call>', "", [Call("x", '{"a": "}"}')]),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ],
)  # fmt: skip
def test_calls_in_a_text(text: str, content: str, calls: list[Call]) -> None:
    assert split_calls(text) == (content, calls)
    pieces = CHAT_FORM.pieces(0, True)
    events = [*(event for part in text for event in pieces.text(part)), *pieces.last(Answer(text, 1, 1, "stop"))]
    assert "".join(event["delta"].get("content", "") for event in events) == content
    assert sum(len(event["delta"].get("tool_calls", ())) for event in events) == len(calls)


WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMS = {
    "hermes": '<tool_call>\n{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}\n</tool_call>',
    "llama3_json": '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}',
    "mistral": "[TOOL_CALLS][{{ c.function | tojson }}]",
    None: "{{ c.function.name }}({{ c.function.arguments }})",
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_calls_is_the_templates(
    form: str | None, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is not the one that is read here, tools are refused by name; vLLM is told its parser."""
    from megaswift.inference.server import Limits, Service
    from megaswift.inference.vllm_server import VllmServer

    model = make_model(tmp_path / "model", chat_template=WITH_TOOLS.replace("CALL", FORMS[form]))
    loaded = TransformersBackend.load(model)
    assert form_of(loaded.prompts, loaded.tokenizer) == form
    service = Service(loaded, "tiny", GenerationOptions(max_new_tokens=4), Limits(), 1)

    async def ask() -> Any:
        return service.chat(ASK | {"tools": [HOUR]})

    if form == "hermes":
        assert asyncio.run(ask()).tools
    else:
        with pytest.raises(Exception, match="tools is not supported: the calls of this chat template are not read here"):
            asyncio.run(ask())
    service.line.close()
    monkeypatch.setattr("megaswift.inference.vllm_server.packages_distributions", lambda: {"vllm": ["openai"]})
    line = VllmServer(DeployArguments(ckpt_dir=str(model)), model, "tiny", "tiny").command(80)
    assert ("--enable-auto-tool-choice" in line) is (form is not None)
    assert (line[line.index("--tool-call-parser") + 1] if "--tool-call-parser" in line else None) == form


def test_vllms_gate_refuses_what_vllm_would_pass_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its application here is a FastAPI one whose request allows any further field, as vLLM's does."""
    from fastapi import FastAPI
    from pydantic import BaseModel, ConfigDict

    class Request(BaseModel):
        model_config = ConfigDict(extra="allow")
        messages: list[Any] = []
        tools: list[Any] | None = None
        logprobs: bool | None = None

    async def chat(request: Request) -> dict[str, Any]:
        return request.model_dump()

    chat.__annotations__["request"] = Request
    refusals = [
        ({"web_search_options": {"a": 1}}, "web_search_options is not supported by this server"), ({"temprature": 0}, "temprature is not supported"),
        ({"tools": [HOUR]}, "tools is not supported: the model's chat template has no place for them"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url is not supported"),
    ]  # fmt: skip
    for tools in (True, False):
        monkeypatch.setenv(GATE_VARIABLE, Rules(5000, 2, None, new_tokens=16, tools=tools, model="a/b").to_variable())
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
        app = FastAPI()
        app.post("/v1/chat/completions")(chat)
        app.add_middleware(VllmGate)
        for body, message in refusals:
            refused = tools is False or "tools" not in body
            code, said = _called(app, "POST", "/v1/chat/completions", body)
            assert (code, message in said) == ((400, True) if refused else (200, False)), said
        passed = {"user": "me", "metadata": {"a": "b"}, "logprobs": True, "functions": [], "modalities": ["text"]}
        assert _called(app, "POST", "/v1/chat/completions", passed)[0] == 200
        code, said = _called(app, "GET", "/v1/models/a/b")
        assert (code, json.loads(said)["id"]) == (200, "a/b")
        assert _called(app, "GET", "/v1/models/c")[0] == 404


def _called(app: Any, method: str, path: str, content: Any = None) -> tuple[int, str]:
    """Status and body of one call of an ASGI application."""
    body, sent = b"" if content is None else json.dumps(content).encode(), []
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers, "query_string": b""}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


def test_a_body_that_comes_in_pieces_is_limited_as_a_whole() -> None:
    async def answered(pieces: int) -> Any:
        app, sent, left = _Asgi(), [], [pieces]
        app.free.set()

        async def receive() -> dict[str, Any]:
            left[0] -= 1
            return {"type": "http.request", "body": b" " * 1000, "more_body": left[0] > 0}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        await Gate(app, Rules(3000, 2), None)(scope, receive, send)
        return sent[0]["status"], left[0]

    assert asyncio.run(answered(4000)) == (413, 3996)  # what is left is not read
    assert asyncio.run(answered(4)) == (413, 0)


def test_a_servers_system_prompt(backend: TransformersBackend) -> None:
    from megaswift.inference.server import Limits, Service

    async def prompts(messages: list[dict[str, str]], system: str | None) -> list[int]:
        service = Service(backend, "tiny", GenerationOptions(max_new_tokens=4, temperature=0), Limits(), 1, system)
        [job] = service.chat(ASK | {"messages": messages}).jobs
        service.line.close()
        return job.prompt

    user, own = {"role": "user", "content": "hi"}, {"role": "system", "content": "Own."}
    served = asyncio.run(prompts([user], "Ours."))
    assert (
        served
        == asyncio.run(prompts([{"role": "system", "content": "Ours."}, user], None))
        != asyncio.run(prompts([user], None))
    )
    assert asyncio.run(prompts([own, user], "Ours.")) == asyncio.run(prompts([own, user], None))


def test_what_vllms_server_cannot_do(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaswift.inference.backends.pick_backend", lambda _: "vllm")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("vLLM was started"))
    with pytest.raises(UserError, match="vLLM makes its batches itself"):
        deploy_main(["--ckpt_dir", str(model_dir), "--port", "0", "--infer_batch_size", "4"])
    monkeypatch.setattr("megaswift.inference.prompts.Prompts.system_text", lambda *_: "written by the template")
    with pytest.raises(UserError, match="writes a system prompt by itself"):
        deploy_main(["--ckpt_dir", str(model_dir), "--port", "0", "--system", ""])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "there is no API key"),
        ({"port": 70000}, "is not 0 or more, at most 65535"),
        ({"max_body_size": "big"}, "is no size"),
        ({"max_concurrency": 0}, "is not 1 or more"),
        ({"max_model_len": 1}, "is not 2 or more"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(DeployArguments(**options), None)


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.3.2.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "example.org", "::")))
    assert check(DeployArguments(host="0.0.0.0"), KEY) == 4_000_000


def test_a_port_that_is_taken(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaswift.inference.transformers_backend.load_model", lambda *_: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot listen"):
        deploy_main(DeployArguments(ckpt_dir=str(model_dir), port=taken.getsockname()[1]))


@contextlib.contextmanager
def command(model: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`swift deploy` in its own process, and the address that it tells."""
    line = ["-m", "megaswift", "deploy", "--ckpt_dir", str(model), "--port", "0", "--served_model_name", "tiny", *words]
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2] / "src"))))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *line], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        greeting = process.stderr.readline()
        assert "answers at http://127.0.0." in greeting, greeting
        yield process, greeting.split("answers at ")[1].split(",")[0]
    finally:
        process.kill()
        process.wait()


def test_the_command_serves_and_ends_on_sigterm(model_dir: Path) -> None:
    with command(model_dir) as (process, address):
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=3)
        assert client.chat.completions.create(**ASK).usage.completion_tokens > 0
        code, body = post(address.removesuffix("/v1"), json.dumps(ASK).encode(), {"Host": "evil.example"})
        assert (code, "evil.example" in body["error"]["message"]) == (400, True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)


def never_ending(model: Path) -> Path:
    """Lets a tiny model never choose an end token."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][:3] = 0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_a_client_that_leaves_stops_a_whole_answer(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """On another loopback address, which the server then answers to."""
    model = never_ending(make_model(tmp_path / "model", context=50_000))
    with command(model, "--host", "127.0.0.2", "--max_new_tokens", "40000") as (_, address):
        assert address.startswith("http://127.0.0.2:")
        impatient = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=1)
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(**ASK | {"max_tokens": 40_000})  # a minute of work, and more
        started = time.monotonic()
        patient = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=20)
        assert patient.chat.completions.create(**ASK).usage.completion_tokens == 8
        assert time.monotonic() - started < 15


def test_an_answer_that_is_given_up_keeps_nobody(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """A batch ends with its last answer that somebody waits for, and is that of a batch without the others."""
    backend = TransformersBackend.load(never_ending(make_model(tmp_path / "model", context=50_000)))
    options = GenerationOptions(max_new_tokens=40_000, temperature=0)
    prompts = [backend.prompt_ids([{"role": "user", "content": text}], options) for text in ("who are you", "hi", "你是谁")]
    given_up = [threading.Event() for _ in prompts]
    timer = threading.Timer(0.3, lambda: [event.set() for event in given_up])
    timer.start()
    started = time.monotonic()
    assert list(backend.answer_all(prompts, options, batch_size=3, given_up=lambda place: given_up[place].is_set())) == []
    assert time.monotonic() - started < 10
    short = replace(options, max_new_tokens=8)
    found = dict(backend.answer_all(prompts, short, batch_size=3, given_up=lambda place: place == 1))
    whole = dict(backend.answer_all(prompts, short, batch_size=3))
    assert found == {place: whole[place] for place in (0, 2)}
