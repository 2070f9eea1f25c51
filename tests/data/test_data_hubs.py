"""Hubs: order, subsets, what is said when nothing can be loaded. No network is used."""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from megaswift.data import hubs
from megaswift.data.read import decode
from megaswift.data.resolve import resolve
from megaswift.data.spec import parse_spec
from megaswift.data.stream import resolve_stream
from megaswift.errors import DataError


@pytest.fixture
def ms(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the modelscope library, and a network that answers; returns the calls."""
    from datasets import Dataset

    calls: list[tuple[Any, ...]] = []

    class MsDataset:
        @staticmethod
        def load(dataset_id: str, subset_name: str, split: str, use_streaming: bool) -> Any:
            calls.append((dataset_id, subset_name, split))
            rows = [{"query": f"{subset_name} {k}", "response": "a"} for k in range(3)]
            return iter(rows) if use_streaming else Dataset.from_list(rows)

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(MsDataset=MsDataset))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hubs, "probe", lambda addresses: [""] * len(addresses))
    return calls


def test_subsets_are_joined(ms: list[tuple[Any, ...]]) -> None:
    dataset = resolve(parse_spec("swift-mix:sharegpt/codefuse#4"))
    assert ms == [("swift/swift-sft-mixture", "sharegpt", "train"), ("swift/swift-sft-mixture", "codefuse", "train")]
    assert [decode(dataset.source.raw(k))["query"] for k in (0, 3)] == ["sharegpt 0", "codefuse 0"]
    assert dataset.place == "ModelScope swift/swift-sft-mixture" and dataset.source.where(3) == "swift/swift-sft-mixture: row 1"
    ms.clear()
    resolve(parse_spec("swift-mix"))
    assert [call[1] for call in ms] == ["sharegpt", "firefly", "codefuse", "metamathqa"]
    ms.clear()
    resolve(parse_spec("medical-en"))
    assert [call[2] for call in ms] == ["train", "val", "test"]


def test_a_stream_of_the_hub(ms: list[tuple[Any, ...]]) -> None:
    dataset = resolve_stream(parse_spec("swift-mix:sharegpt/codefuse#4"))
    rows = list(dataset.source.rows(4))
    assert [row["query"] for row in rows] == ["sharegpt 0", "sharegpt 1", "sharegpt 2", "codefuse 0"]
    assert dataset.place == "ModelScope swift/swift-sft-mixture"


def test_null_members_of_a_hub_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    rows = [{"messages": [{"role": "user", "content": "q", "x": {key: 1}}]} for key in ("a", "b")]
    data = Dataset.from_list(rows)
    parts = {False: data, True: data.to_iterable_dataset()}
    monkeypatch.setattr(hubs, "_first", lambda *call, streaming: (("hf", "o/n"), [parts[streaming]]))
    assert decode(resolve(parse_spec("HF::o/n")).source.raw(1)) == rows[1]
    streamed = list(resolve_stream(parse_spec("HF::o/n")).source.rows(2))
    assert streamed == rows and streamed[0].nulls == ("messages.x.b",)


def test_self_cognition_of_the_hub_is_asked_for_by_prefix(ms: list[tuple[Any, ...]]) -> None:
    assert resolve(parse_spec("self-cognition")).place == "built in" and not ms
    assert resolve(parse_spec("MS::self-cognition")).self_cognition and ms == [("swift/self-cognition", "default", "train")]


def test_any_hub_id(ms: list[tuple[Any, ...]]) -> None:
    resolve(parse_spec("somebody/something:part"))
    assert ms == [("somebody/something", "part", "train")]


def test_use_hf_changes_the_order(ms: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(hubs, "_load_hf", lambda *call: tried.append(call[0]) or 1 / 0)
    monkeypatch.setenv("USE_HF", "1")
    resolve(parse_spec("alpaca-en"))
    assert tried == ["vicgalle/alpaca-gpt4"] and ms[0][0] == "AI-ModelScope/alpaca-gpt4-data-en"


def test_a_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text(
        "".join(json.dumps({"query": str(k), "response": "a"}) + "\n" for k in range(3))
    )
    assert hubs._load_hf(str(tmp_path / "d"), None, "train", True, False).num_rows == 3
    assert next(iter(hubs._load_hf(str(tmp_path / "d"), None, "train", False, True))) == {"query": "0", "response": "a"}


def test_without_a_network_the_error_comes_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        resolve(parse_spec("ultrachat#5"))
    assert time.monotonic() - started < 10
    text = str(caught.value)
    assert (
        "ModelScope HuggingFaceH4/ultrachat_200k" in text
        and "Hugging Face HuggingFaceH4/ultrachat_200k (" in text
        and "refused" in text
    )
