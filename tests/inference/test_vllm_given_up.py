"""Answers that nobody waits for any more, on an engine that is made up: vLLM itself need not be installed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megaswift.inference.options import Answer, GenerationOptions
from megaswift.inference.vllm_backend import VllmBackend


class _Engine:
    """Answers one request a step, the newest first; a request that was given up never comes."""

    engine_core = None

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.aborted: list[str] = []

    def step(self) -> list[Any]:
        return [SimpleNamespace(finished=True, request_id=self.waiting.pop(), outputs=[None])] if self.waiting else []

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names
        self.waiting = [name for name in self.waiting if name not in names]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> VllmBackend:
    sampling, exceptions = ModuleType("vllm.sampling_params"), ModuleType("vllm.v1.engine.exceptions")
    sampling.RequestOutputKind = SimpleNamespace(FINAL_ONLY=None)  # type: ignore[attr-defined]
    exceptions.EngineDeadError = RuntimeError  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.v1", "vllm.v1.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, sampling.__name__, sampling)
    monkeypatch.setitem(sys.modules, exceptions.__name__, exceptions)
    made = VllmBackend.__new__(VllmBackend)
    made._engine, made._repeatable = _Engine(), False

    def add(prompt: list[int], *_: Any, **__: Any) -> str:
        made._engine.waiting.append(str(prompt[0]))
        return str(prompt[0])

    monkeypatch.setattr(made, "_add", add)
    monkeypatch.setattr(made, "_answer", lambda prompt, *_: Answer(str(prompt[0]), 1, 1, "stop"))
    return made


@pytest.mark.parametrize("ahead", [1, 2, 4096])
def test_the_engine_stops_what_is_given_up(backend: VllmBackend, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    monkeypatch.setattr("megaswift.inference.vllm_backend._AHEAD", ahead)
    gone: set[int] = set()
    found = []
    prompts = [[number] for number in range(6)]
    for place, _ in backend.answer_all(prompts, GenerationOptions(), given_up=gone.__contains__):
        found.append(place)
        gone |= {0, 3}
    assert set(found) | {0, 3} == set(range(6)) and len(found) == len(set(found))
    assert not gone & set(found[1:])
    if ahead == 4096:  # all were there when two were given up
        assert {int(name) for name in backend._engine.aborted} == {0, 3} - set(found)
    assert backend._engine.waiting == []
