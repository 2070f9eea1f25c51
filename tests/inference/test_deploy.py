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

from megaswift.arguments import DeployArguments
from megaswift.deploy import check, deploy_main, is_loopback
from megaswift.errors import UserError
from megaswift.inference.gate import GATE_VARIABLE, KEY_VARIABLE, Gate, Rules, VllmGate
from megaswift.inference.options import GenerationOptions
from megaswift.inference.transformers_backend import TransformersBackend

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
    app = make_app(service, Rules(5000, 3, ("127.0.0.1",)), KEY)
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
    server: str, body: bytes, headers: dict[str, str] | None = None, *, events: bool = False
) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}", **(headers or {})}
    )
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
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text as its content"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, 400, "must be the user's"),
        ({"messages": [{"role": "user", "content": "a" * 2000}]}, 400, "tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "must be a number"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 2}, 400, "n must be 1"),
        ({"tools": [{}]}, 400, "tools is not supported"),
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
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}, *ASK["messages"]]}, 400, "tool_calls"),
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
    rules = Rules(5000, 2, ("localhost",), new_tokens=16, stop_token_ids=(7,), greeting="it answers")
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
        job = service.job(ASK | {"messages": messages})
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
        ({"port": 70000}, "legal values"),
        ({"max_body_size": "big"}, "is no size"),
        ({"max_concurrency": 0}, "legal values"),
        ({"max_model_len": 1}, "legal values"),
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
