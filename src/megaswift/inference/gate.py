"""The gate before a server: who may ask, how much, and how many at once. It stands before our own application and before vLLM's."""

from __future__ import annotations

import hmac
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

KEY_VARIABLE = "MEGASWIFT_API_KEY"
GATE_VARIABLE = "MEGASWIFT_GATE"  # for vLLM's server, which makes the gate itself: the rules as JSON

_Receive = Callable[[], Awaitable[dict[str, Any]]]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


class Refused(Exception):
    """A request that gets an error of the API instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        kind: str = "invalid_request_error",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Rules:
    """What a gate lets through.

    Attributes:
        body_bytes: of a request.
        requests: POST requests that wait or run at once; more get status 429.
        hosts: names under which the server may be called, in small letters; None for any. A web page that points its own
            name at this machine is refused by it.
        new_tokens: most that a request may ask for; a larger number is cut to it. 0: the application sees to it.
        stop_token_ids: tokens that end an answer, added to requests.
        greeting: printed on stderr once the server answers.
    """

    body_bytes: int
    requests: int
    hosts: tuple[str, ...] | None = None
    new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    greeting: str = ""

    def to_variable(self) -> str:
        """The rules as the value of GATE_VARIABLE."""
        return json.dumps(asdict(self))


class Gate:
    """Looks at a request before the application does: host, key, size of the body, number of requests. ASGI, version 3.

    Args:
        app: the application.
        api_key: what requests must bring as a bearer token; None for no key. /health needs none.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], rules: Rules, api_key: str | None) -> None:
        self._app, self._rules, self._api_key = app, rules, api_key
        self._running = 0

    async def __call__(self, scope: dict[str, Any], receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._greeting(send))
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # no application behind the gate needs websockets
        else:
            await self._request(scope, receive, send)

    async def _request(self, scope: dict[str, Any], receive: _Receive, send: _Send) -> None:
        try:
            self._check(scope)
            if scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            body = await self._body(receive)
            if body is None:
                return
            if self._running >= self._rules.requests:
                raise Refused(429, "too many requests are waiting; try again later", "rate_limit_exceeded", "rate_limit_error")
        except Refused as error:
            await _answer(send, error)
            return
        if self._rules.stop_token_ids or self._rules.new_tokens:
            body = self._changed(body)
            others = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
            scope = scope | {"headers": [*others, (b"content-length", str(len(body)).encode())]}
        given = False

        async def replay() -> dict[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        self._running += 1
        try:
            await self._app(scope, replay, send)
        finally:
            self._running -= 1

    def _check(self, scope: dict[str, Any]) -> None:
        """What the head of a request tells. Raises Refused."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._rules.hosts is not None and name.lower() not in self._rules.hosts:
            raise Refused(400, f"this server does not answer to the name {name!r}")
        if self._api_key is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"").decode("latin-1").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._api_key.encode()):
                raise Refused(401, "the API key is missing or wrong", "invalid_api_key", "authentication_error")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._rules.body_bytes:
            raise self._too_large()

    async def _body(self, receive: _Receive) -> bytes | None:
        """The whole body; None where the client went away. Raises Refused where it is too large."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._rules.body_bytes:
                raise self._too_large()
            if not message.get("more_body"):
                return body

    def _changed(self, body: bytes) -> bytes:
        """A request within the rules; a body that is no JSON object goes on as it is, to be refused behind the gate."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return body
        if not isinstance(request, dict):
            return body
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(request.get(name), int) and request[name] > self._rules.new_tokens > 0:
                request[name] = self._rules.new_tokens
        own = request.get("stop_token_ids") or []
        if self._rules.stop_token_ids and isinstance(own, list):
            request["stop_token_ids"] = [*own, *self._rules.stop_token_ids]
        return json.dumps(request).encode()

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self._rules.body_bytes} bytes")

    def _greeting(self, send: _Send) -> _Send:
        async def tell(message: dict[str, Any]) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete" and self._rules.greeting:
                print(self._rules.greeting, file=sys.stderr, flush=True)

        return tell


class VllmGate(Gate):
    """The gate that vLLM's server puts before itself (--middleware); rules and key come from the environment."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        rules = json.loads(os.environ[GATE_VARIABLE])
        lists = {name: None if rules[name] is None else tuple(rules[name]) for name in ("hosts", "stop_token_ids")}
        super().__init__(app, Rules(**rules | lists), os.environ.get(KEY_VARIABLE) or None)


async def _answer(send: _Send, refused: Refused) -> None:
    body = json.dumps(refused.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
