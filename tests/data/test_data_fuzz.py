"""Any row and any file is either used or refused with a typed error: no other exception, and no hang."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from data_chats import tokenizer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaswift.data.chat import ChatTemplate
from megaswift.data.conversation import BadRow
from megaswift.data.pipeline import Pipeline, Recipe
from megaswift.data.read import decode, open_path
from megaswift.data.registry import CONVERTERS
from megaswift.data.rows import to_conversation
from megaswift.data.spec import parse_specs
from megaswift.errors import MegaswiftError

COLUMNS = ("query", "response", "history", "system", "tools", "instruction", "input", "output", "messages", "conversations", "conversation", "text", "prompt", "completion", "images")  # fmt: skip
KEYS = ("role", "from", "content", "value", "human", "assistant", "tool_calls", "function", "name", "arguments", "loss", "type", "text", "thinking", "reasoning_content")  # fmt: skip
WORDS = ("user", "assistant", "system", "tool", "tool_call", "gpt", "", "hi", "<think>a</think>b", "[]", "{}", '{"name": "f"}', "<|im_end|>", "\ud800", "text", "tool_use")  # fmt: skip

leaves = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=True) | st.sampled_from(WORDS) | st.text(max_size=4)
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4), max_leaves=12
)
rows = st.dictionaries(st.sampled_from(COLUMNS), values, max_size=4)
message = st.fixed_dictionaries({"role": st.sampled_from(WORDS), "content": values}, optional=dict.fromkeys(KEYS[6:], values))
chats = st.fixed_dictionaries({"messages": st.lists(message, max_size=4)}, optional={"tools": values, "system": values})


@cache
def template_of(name: str) -> ChatTemplate:
    return ChatTemplate(tokenizer_of(name))


SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@SETTINGS
@given(
    row=rows | chats,
    converter=st.none() | st.sampled_from(list(CONVERTERS)),
    name=st.sampled_from(["qwen3", "smollm2", "mistral"]),
)
def test_rows(row: dict[str, Any], converter: str | None, name: str) -> None:
    pipeline = Pipeline(template_of(name), 64, "split")
    encoding = pipeline.encode([row, json.dumps(row).encode()], Recipe(converter=converter))
    assert len(encoding.counts) == 2 and sum(encoding.counts) == len(encoding.sizes)
    assert all(0 < size <= 64 for size in encoding.sizes)
    assert all(count > 0 or number in encoding.bad for number, count in enumerate(encoding.counts))


@SETTINGS
@given(data=st.binary(max_size=60) | st.lists(st.sampled_from([b'{"a":1}', b"\n", b"[", b"]", b",", b"\xef\xbb\xbf", b"\xff", b'"', b" ", b"\r\n", b"a,b"]), max_size=8).map(b"".join), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".jsonl.gz", ".parquet", ".arrow"]))  # fmt: skip
def test_files(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    try:
        source = open_path(path)
        for index in range(len(source)):
            assert source.where(index)
            try:
                to_conversation(decode(source.raw(index)))
            except BadRow as error:
                assert error.reason
    except MegaswiftError as error:
        assert error.where


@SETTINGS
@given(text=st.text(st.sampled_from("HFms:#/.,a1-~ \x00é"), max_size=12))
def test_dataset_names(text: str) -> None:
    try:
        for spec in parse_specs([text]):
            assert spec.name and (spec.count is None or spec.count > 0)
    except MegaswiftError as error:
        assert error.where
