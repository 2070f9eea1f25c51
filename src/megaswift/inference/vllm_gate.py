"""The gate within vLLM's server: requests are brought within our limits, and what vLLM would leave out silently is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

from megaswift.inference.gate import GATE_VARIABLE, KEY_VARIABLE, Gate, Refused, Rules
from megaswift.inference.request import asks_for_nothing, refuse_media


class VllmGate(Gate):
    """The gate that vLLM's server puts before itself (--middleware); rules and key come from the environment."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        rules = json.loads(os.environ[GATE_VARIABLE])
        lists = {name: None if rules[name] is None else tuple(rules[name]) for name in ("hosts", "stop_token_ids")}
        super().__init__(app, Rules(**rules | lists), os.environ.get(KEY_VARIABLE) or None)

    def changed(self, scope: dict[str, Any], body: bytes) -> bytes:
        """A request within the rules; a body that is no JSON object goes on as it is, to be refused by vLLM. Raises Refused."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return body
        if not isinstance(request, dict):
            return body
        self._check_fields(request, _fields(scope))
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(request.get(name), int) and request[name] > self._rules.new_tokens > 0:
                request[name] = self._rules.new_tokens
        own = request.get("stop_token_ids") or []
        if self._rules.stop_token_ids and isinstance(own, list):
            request["stop_token_ids"] = [*own, *self._rules.stop_token_ids]
        return json.dumps(request).encode()

    def _check_fields(self, request: dict[str, Any], known: frozenset[str] | None) -> None:
        """Raise Refused for fields without an effect: vLLM passes over those that it does not have, and only its log tells."""
        for name, value in request.items():
            if known is not None and name not in known and not asks_for_nothing(name, value):
                raise Refused(400, f"{name} is not supported by this server", param=name)
        if request.get("tools") and not self._rules.tools:
            raise Refused(400, "tools is not supported: the model's chat template has no place for them", param="tools")
        refuse_media(request.get("messages"))


def _fields(scope: dict[str, Any]) -> frozenset[str] | None:
    """The fields that the path's own request has in vLLM; None where that cannot be seen."""
    for route in getattr(scope.get("app"), "routes", ()):
        if getattr(route, "path", None) != scope["path"]:
            continue
        for parameter in getattr(getattr(route, "dependant", None), "body_params", ()):
            model = getattr(parameter.field_info, "annotation", None)
            fields = getattr(model, "model_fields", None)
            if fields:
                return frozenset(fields) | {field.alias for field in fields.values() if field.alias}
    return None
