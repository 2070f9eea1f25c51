"""The gate before a server: who may ask, how much, and how many at once. It stands before our own application and before vLLM's."""

from __future__ import annotations

import hmac
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

KEY_VARIABLE = "MEGASWIFT_API_KEY"
GATE_VARIABLE = "MEGASWIFT_GATE"  # for vLLM's server, which makes the gate itself: the rules as JSON
_MODELS = "/v1/models/"

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
        tools: the model's chat template has a place for tools; looked at where new_tokens is.
        model: name of the model in requests; adapters: names of those that are loaded beside it.
        greeting: printed on stderr once the server answers.
    """

    body_bytes: int
    requests: int
    hosts: tuple[str, ...] | None = None
    new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    tools: bool = True
    model: str = ""
    adapters: tuple[str, ...] = ()
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
        self._running, self._born = 0, int(time.time())

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
                if scope["method"] == "GET" and scope["path"].startswith(_MODELS):
                    await _send_json(send, 200, self._model(scope["path"].removeprefix(_MODELS)))
                else:
                    await self._app(scope, receive, send)
                return
            body = await self._body(receive)
            if body is None:
                return
            if self._running >= self._rules.requests:
                raise Refused(429, "too many requests are waiting; try again later", "rate_limit_exceeded", "rate_limit_error")
            body = self.changed(scope, body)
        except Refused as error:
            await _send_json(send, error.status, error.body)
            return
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

    def changed(self, scope: dict[str, Any], body: bytes) -> bytes:
        """The body that the application gets. Raises Refused. Here: as it came."""
        return body

    def _model(self, name: str) -> dict[str, Any]:
        """The model, or an adapter of it, as OpenAI's API describes it. Raises Refused for another name."""
        served = (self._rules.model, *self._rules.adapters)
        if name not in served:
            names = " or ".join(map(repr, served))
            raise Refused(404, f"model {name!r} is not served here; use {names}", "model_not_found", param="model")
        return {"id": name, "object": "model", "created": self._born, "owned_by": "megaswift"}

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self._rules.body_bytes} bytes")

    def _greeting(self, send: _Send) -> _Send:
        async def tell(message: dict[str, Any]) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete" and self._rules.greeting:
                print(self._rules.greeting, file=sys.stderr, flush=True)

        return tell


async def _send_json(send: _Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
