"""From --dataset to tokenized rows: counts, cuts, packing, the cache, and every kind of bad input."""

from __future__ import annotations

import gzip
import html
import io
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_chats import byte_level, tokenizer_of
from rich.console import Console

from megaswift.config.options import SftArguments
from megaswift.data.chat import ChatTemplate
from megaswift.data.encode import PreparedData, prepare
from megaswift.data.page import write_page
from megaswift.data.pipeline import Pipeline
from megaswift.data.preference import PAIR
from megaswift.data.report import DataReport, print_report
from megaswift.data.sampling import split_and_sample
from megaswift.data.store import TokenRows
from megaswift.data.tables import NULLS
from megaswift.errors import DataError, UserError

NAMES = {"model_name": ["小黄", "Xiao Huang"], "model_author": ["魔搭", "ModelScope"]}
Jsonl = Callable[..., str]


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(tokenizer_of("smollm2"))


@pytest.fixture
def run(tmp_path: Path, template: ChatTemplate) -> Callable[..., PreparedData]:
    def prepared(*dataset: str, **options: Any) -> PreparedData:
        own = {name: options.pop(name) for name in ("packing", "processes", "stream_rows", "table") if name in options}
        args = SftArguments(dataset=list(dataset), **options)
        return prepare(args, template, cache_dir=tmp_path / "cache", **own)

    return prepared


def rows(count: int, words: int = 3) -> list[dict]:
    return [{"query": f"question {k}", "response": " ".join([f"answer{k}"] * (1 + k % words))} for k in range(count)]


def text(template: ChatTemplate, data: TokenRows, row: int) -> str:
    return template.decode(data[row][0])


def test_rows_and_labels(run: Callable[..., PreparedData], template: ChatTemplate, jsonl: Jsonl) -> None:
    data = run(jsonl(rows(3)), dataset_test_ratio=0.0)
    assert len(data.train) == 3 and data.val is None
    ids, labels = data.train[1]
    assert ids.dtype == labels.dtype == np.int32 and data.train.lengths[1] == len(ids)
    assert template.decode(ids).endswith("question 1<|im_end|>\n<|im_start|>assistant\nanswer1 answer1<|im_end|>")
    assert template.decode(labels[labels >= 0]) == "answer1 answer1<|im_end|>"
    assert (labels[labels >= 0] == ids[labels >= 0]).all()
    entry = data.report.datasets[0]
    assert entry.supervised == sum(int((data.train[row][1] >= 0).sum()) for row in range(3)) < entry.tokens


def test_weights_of_messages(run: Callable[..., PreparedData], template: ChatTemplate, jsonl: Jsonl) -> None:
    """Each token's weight is its message's; where all are 0 or 1 the data is what it was before there were weights."""
    plain = rows(600)  # more than one unit of work, so that the weights begin in the middle of a file
    first = {"role": "assistant", "content": "first", "loss_weight": 0.25}
    talk = [
        {"role": "user", "content": "q"},
        first,
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "second"},
    ]
    data = run(jsonl([*plain, {"messages": talk}]), dataset_test_ratio=0.0)
    assert (data.train.path / "weights.bin").stat().st_size == 4 * (data.train.path / "kept.bin").stat().st_size
    entry = data.report.datasets[0]
    for row in range(len(data.train)):
        [sample] = data.train.samples(row)
        assert sample.weights is not None
        if b"first" not in template.decode(sample.ids).encode():
            assert (sample.weights[sample.kept] == 1).all()
            continue
        for text, weight in (("first<|im_end|>", 0.25), ("second<|im_end|>", 1.0)):
            assert template.decode(sample.ids[sample.kept & (sample.weights == weight)]) == text
        expected = 0.25 * int((sample.weights == 0.25).sum()) + int((sample.weights == 1).sum())
        assert (entry.weighted, entry.weight) == (1, pytest.approx(expected))
    console = Console(file=io.StringIO(), width=200)
    print_report(data.report, console)
    assert "1 samples bring weights of their own" in console.file.getvalue()
    cut = run(jsonl([{"messages": talk}]), dataset_test_ratio=0.0, max_length=6, truncation_strategy="split").train
    pieces = [sample for row in range(len(cut)) for sample in cut.samples(row)]
    assert (pieces[0].weights[pieces[0].kept] == 0.25).all() and len(pieces) > 1
    talk[1]["loss_weight"] = 0
    data = run(jsonl([*plain, {"messages": talk}]), dataset_test_ratio=0.0)
    assert not (data.train.path / "weights.bin").exists() and data.report.datasets[0].weighted == 0


def test_lost_weights_are_not_ones(run: Callable[..., PreparedData], jsonl: Jsonl) -> None:
    answer = {"role": "assistant", "content": "a", "loss_scale": 2}
    data = run(jsonl([{"messages": [{"role": "user", "content": "q"}, answer]}]), dataset_test_ratio=0.0)
    (data.train.path / "weights.bin").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        TokenRows.open(data.train.path)


def test_self_cognition(run: Callable[..., PreparedData], template: ChatTemplate) -> None:
    data = run("self-cognition#160", **NAMES)
    assert (len(data.train), len(data.val or [])) == (159, 1)
    texts = [text(template, data.train, row) for row in range(len(data.train))]
    assert not any("{{" in item for item in texts)
    chinese = [item for item in texts if "你" in item or "我" in item]
    assert all("Xiao Huang" not in item and "小黄" in item and "魔搭" in item for item in chinese)
    english = [item for item in texts if item not in chinese and "小黄" not in item]
    assert all("Xiao Huang" in item and "ModelScope" in item for item in english) and len(english) > 60


def test_self_cognition_options(run: Callable[..., PreparedData], template: ChatTemplate) -> None:
    data = run("self-cognition", model_name=["Bo"], model_author=["Ann"])
    assert all("Bo" in text(template, data.train, row) for row in range(len(data.train)))
    thinking = run("self-cognition:qwen3", **NAMES)
    assert "/no_think<|im_end|>" in text(template, thinking.train, 0) and "<think>\n\n</think>\n\n" in text(
        template, thinking.train, 0
    )
    assert "/no_think" not in text(template, run("self-cognition:empty_think", **NAMES).train, 0)
    with pytest.raises(UserError, match="name and author"):
        run("self-cognition", model_name=["Bo"])
    with pytest.raises(UserError, match="expected one, or two"):
        run("self-cognition", model_name=["Xiao", "Huang", "x"], model_author=["a"])
    with pytest.raises(UserError, match="more than once"):
        run("self-cognition#5", "self-cognition:qwen3", **NAMES)


def test_the_written_rows() -> None:
    path = Path(__import__("megaswift.data").data.__file__).parent / "self_cognition.jsonl"
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for tag in ("zh", "en"):
        mine = [item for item in items if item["tag"] == tag]
        assert len(mine) >= 60 and len({item["query"] for item in mine}) == len(mine)
        assert all("{{NAME}}" in item["response"] and "{{AUTHOR}}" in item["response"] for item in mine)
        assert all(set(item) == {"query", "response", "tag"} for item in mine)


def test_sampling_and_validation(run: Callable[..., PreparedData], jsonl: Jsonl) -> None:
    path = jsonl(rows(100))
    data = run(f"{path}#250", dataset_test_ratio=0.05)
    entry = data.report.datasets[0]
    assert (entry.rows, entry.usable, entry.train, entry.val, entry.repeated) == (100, 100, 245, 5, 150)
    assert len(data.train) == 245 and len(data.val or []) == 5
    assert (data.train.path / "ids.bin").stat().st_size < 4 * 2 * entry.tokens / 2.4  # repeats are stored once
    val = jsonl(rows(10), "val.jsonl")
    data = run(path, val_dataset=[f"{val}#4"])
    assert (len(data.train), len(data.val or [])) == (100, 4)


def test_rows_stand_in_the_order_that_was_drawn(run: Callable[..., PreparedData], template: ChatTemplate, jsonl: Jsonl) -> None:
    data = run(f"{jsonl(rows(10))}#17", dataset_test_ratio=0.2, seed=3)
    drawn, held_out = split_and_sample(10, 17, 0.2, 3)
    for part, wanted in ((data.train, drawn), (data.val, held_out)):
        assert part is not None
        found = [int(re.findall(r"question (\d+)", text(template, part, row))[0]) for row in range(len(part))]
        assert found == wanted.tolist()


def test_what_changes_the_sampling(run: Callable[..., PreparedData], jsonl: Jsonl) -> None:
    path = jsonl(rows(50))
    base = run(f"{path}#20").train.fingerprint
    assert run(f"{path}#20", dataset_seed=42).train.fingerprint == base
    assert run(f"{path}#20", dataset_seed=7).train.fingerprint != base
    assert run(f"{path}#20", seed=7).train.fingerprint != base


@pytest.mark.parametrize(("strategy", "kept"), [("delete", 2), ("truncation_left", 3), ("split", 5)])
def test_long_rows(run: Callable[..., PreparedData], template: ChatTemplate, jsonl: Jsonl, strategy: str, kept: int) -> None:
    long = {"history": [["q", "y" * 150]], "query": "how", "response": "y" * 50}  # without loss between its answers
    items = [*rows(2), long]
    data = run(jsonl(items), dataset_test_ratio=0.0, max_length=100, truncation_strategy=strategy)
    assert len(data.train) == kept and data.train.lengths.max() <= 100
    assert data.report.datasets[0].too_long.count == 1 and "rows.jsonl:3" in data.report.datasets[0].too_long.places[0]
    whole = run(jsonl(items), dataset_test_ratio=0.0, max_length=-1)
    if strategy == "truncation_left":
        for part in (0, 1):  # ids and labels
            assert data.train[2][part].tolist() == whole.train[2][part][-100:].tolist()
        learnt = data.train[2][1] >= 0
        assert learnt[0] and learnt[-1] and not learnt.all(), "a mask that is one off must differ"
    if strategy == "split":
        assert np.concatenate([data.train[row][1] for row in range(2, 5)]).tolist() == whole.train[2][1].tolist()


def test_a_cut_that_leaves_nothing_to_learn_is_counted(run: Callable[..., PreparedData], jsonl: Jsonl) -> None:
    items = [
        *rows(2),
        {"query": "q" * 500, "response": "a"},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "q" * 200},
                {"role": "assistant", "content": "b", "loss": 0},
            ]
        },
    ]
    data = run(jsonl(items), dataset_test_ratio=0.0, max_length=100, truncation_strategy="truncation_left")
    assert len(data.train) == 3
    assert data.report.datasets[0].dropped["no supervised token left within max_length"].places == ["rows.jsonl:4"]


def test_packing(run: Callable[..., PreparedData], jsonl: Jsonl) -> None:
    path = jsonl(rows(200, 9))
    plain, packed = run(path), run(path, packing=True, max_length=512)
    assert packed.train.lengths.max() <= 512 and packed.train.packed and not plain.train.packed
    assert packed.report.train_samples == len(plain.train) and packed.report.fill == pytest.approx(
        packed.train.lengths.mean() / 512
    )
    assert sorted(tuple(sample.ids) for row in range(len(packed.train)) for sample in packed.train.samples(row)) == sorted(
        tuple(plain.train[row][0]) for row in range(len(plain.train))
    )


def test_the_cache(run: Callable[..., PreparedData], jsonl: Jsonl, tmp_path: Path) -> None:
    path = jsonl(rows(20))
    first, second = run(path), run(path)
    assert not first.report.from_cache and second.report.from_cache
    assert first.train.fingerprint == second.train.fingerprint and second.train.path == first.train.path
    assert {**second.report.to_dict(), "from_cache": False} == first.report.to_dict()
    assert DataReport.from_dict(json.loads(json.dumps(first.report.to_dict()))) == first.report
    changes: list[dict[str, Any]] = [
        {"max_length": 100}, {"dataset_test_ratio": 0.2}, {"columns": '{"query": "prompt"}'}, {"packing": True},
        {"truncation_strategy": "split"}, {"strict": True}, {"seed": 7}, {"dataset_seed": 8},
    ]  # fmt: skip
    for change in changes:
        assert not run(path, **change).report.from_cache, change
    jsonl(rows(21))
    assert not run(path).report.from_cache
    fresh = run(path, data_cache=False)
    assert not fresh.report.from_cache and fresh.train.fingerprint == run(path).train.fingerprint
    assert not list((tmp_path / "cache" / "data").glob("*.tmp-*"))
    assert not [item for item in (tmp_path / "cache").rglob("*") if item.suffix in (".pkl", ".pt", ".pickle")]


def test_a_damaged_cache_is_an_error_with_its_place(run: Callable[..., PreparedData], jsonl: Jsonl) -> None:
    path = jsonl(rows(20))
    where = run(path).train.path
    for damaged in (b"1234", (where / "ids.bin").read_bytes() + b"1234"):
        (where / "ids.bin").write_bytes(damaged)
        with pytest.raises(DataError, match="delete this directory") as caught:
            run(path)
        assert str(where) in caught.value.where


def test_several_processes_give_the_same(run: Callable[..., PreparedData], jsonl: Jsonl) -> None:
    items: list[Any] = rows(1500)
    items[700] = "not json"
    path = jsonl(items)
    one, two = run(path), run(path, data_cache=False, processes=2)
    assert one.train.fingerprint == two.train.fingerprint
    assert one.report.datasets == two.report.datasets


def test_a_killed_worker_is_an_error_and_no_hang(
    run: Callable[..., PreparedData], jsonl: Jsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "encode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="was killed"):
        run(jsonl(rows(1000)), processes=2)


def test_columns(run: Callable[..., PreparedData], template: ChatTemplate, jsonl: Jsonl) -> None:
    path = jsonl([{"ask": f"q{k}", "reply": "a", "text": "no"} for k in range(3)])
    data = run(path, columns='{"ask": "query", "reply": "response", "text": "-"}')
    assert list(data.report.datasets[0].shapes) == ["query, response"] and "q" in text(template, data.train, 0)
    dropped = run(jsonl([{"query": "q", "response": "no", "text": "yes"}], "two.jsonl"), columns='{"response": "-"}')
    assert list(dropped.report.datasets[0].shapes) == ["query, text"] and "yes" in text(template, dropped.train, 0)
    for wrong in ("{", "[1]", '{"a": 1}'):
        with pytest.raises(UserError, match="--columns"):
            run(path, columns=wrong)
    slip = '{"aks": "query", "reply": "response"}'  # would make pre-training of it
    with pytest.raises(UserError, match="no row has the column 'aks'"):
        run(path, columns=slip)
    with pytest.raises(UserError, match="no row has the column 'aks'"):
        run(path, columns=slip, stream_rows=2)
    asked = jsonl([{"query": "q", "reply": "a"}], "asked.jsonl")
    run(asked, jsonl([{"aks": "q", "reply": "a"}], "other.jsonl"), columns=slip)  # one of several datasets has it


BAD = [
    b"not json",
    b"[1]",
    b'{"a": 1}',
    b'{"messages": [{"role": "user", "content": "q"}]}',
    b'{"query": "\xff", "response": "a"}',
    b'{"query": "\\ud800", "response": "a"}',
]


def test_bad_rows_are_skipped_counted_and_shown(run: Callable[..., PreparedData], jsonl: Jsonl) -> None:
    path = jsonl([*rows(2), *BAD, *[b"again"] * 7])
    data = run(path, dataset_test_ratio=0.0)
    entry = data.report.datasets[0]
    assert (entry.rows, entry.usable, len(data.train)) == (15, 2, 2)
    assert {reason: item.count for reason, item in entry.dropped.items()} == {
        "not JSON": 8,
        "not a JSON object": 1,
        "columns not recognised": 1,
        "no assistant turn": 1,
        "not UTF-8": 1,
        "lone surrogate": 1,
    }
    assert len(entry.dropped["not JSON"].places) == 5 and entry.dropped["not JSON"].places[0].startswith("rows.jsonl:3 (")
    out = io.StringIO()
    print_report(data.report, Console(file=out, width=80))
    shown = out.getvalue()
    assert "dropped 8: not JSON" in shown and "rows.jsonl:3" in shown and "[[answer0<|im_end|>]]" in shown
    with pytest.raises(DataError, match="not JSON") as caught:
        run(path, strict=True)
    assert caught.value.where == "rows.jsonl:3"


def test_nothing_usable(run: Callable[..., PreparedData], jsonl: Jsonl, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable row: 2 x not JSON, first at rows.jsonl:1"):
        run(jsonl([b"x", b"y"]))
    with pytest.raises(DataError, match="it is empty"):
        run(jsonl([], "empty.jsonl"))
    with pytest.raises(DataError, match="5 x longer than --max_length 10"):
        run(jsonl(rows(5)), max_length=10, dataset_test_ratio=0.0)
    assert not list((tmp_path / "cache" / "data").iterdir())


def test_a_huge_row_is_dropped_without_tokenizing_it(run: Callable[..., PreparedData], jsonl: Jsonl) -> None:
    data = run(jsonl([*rows(3), {"query": "q", "response": "word " * 10_000_000}]), dataset_test_ratio=0.0)
    assert len(data.train) == 3 and data.report.datasets[0].too_long.places == ["rows.jsonl:4"]


def test_options_that_cannot_work(run: Callable[..., PreparedData], jsonl: Jsonl) -> None:
    path = jsonl(rows(3))
    for options in (
        {"dataset_test_ratio": 1.0},
        {"dataset_test_ratio": -0.1},
        {"max_length": 0},
        {"max_length": -1, "packing": True},
    ):
        with pytest.raises(UserError):
            run(path, **options)
    with pytest.raises(UserError, match="no training data"):
        run()


def test_what_follows_the_last_answer_is_left_out_and_told(
    run: Callable[..., PreparedData], template: ChatTemplate, jsonl: Jsonl
) -> None:
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    tails = [[], [question], [{"role": "tool", "content": "r"}, {"role": "user", "content": ""}]]
    items = [{"messages": [question, answer, question, answer, *tail]} for tail in tails]
    items.append({"messages": [question, call, {"role": "tool", "content": "r"}]})
    data = run(jsonl(items), dataset_test_ratio=0.0, strict=True)
    assert len(data.train) == 4
    for row in (1, 2):
        assert all(data.train[row][part].tolist() == data.train[0][part].tolist() for part in (0, 1))
    assert text(template, data.train, 3).endswith("</tool_call><|im_end|>")
    cut = data.report.datasets[0].cut
    assert cut.count == 3
    assert cut.places == ["rows.jsonl:2 (1 message)", "rows.jsonl:3 (2 messages)", "rows.jsonl:4 (1 message)"]
    out = io.StringIO()
    print_report(data.report, Console(file=out, width=80))
    assert "3 rows do not end with an answer" in out.getvalue() and "rows.jsonl:3 (2 messages)" in out.getvalue()


def test_control_tokens_in_text_rows_are_read_and_counted(
    run: Callable[..., PreparedData], template: ChatTemplate, jsonl: Jsonl
) -> None:
    rendered = "<|im_start|>user\nSay 1<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
    path = jsonl([{"text": rendered}, {"text": "a<|endoftext|>b"}, *rows(1)])
    options = {"dataset_test_ratio": 0.0, "data_cache": True}
    tokens, characters = run(path, **options), run(path, parse_special_tokens=False, **options)
    tokenizer = tokenizer_of("smollm2")
    assert tokens.train[0][0].tolist() == [*tokenizer(rendered)["input_ids"], template.eos_id]
    split = tokenizer(rendered, split_special_tokens=True)["input_ids"]
    assert characters.train[0][0].tolist() == [*split, template.eos_id]
    assert len(characters.train[0][0]) > len(tokens.train[0][0])
    assert tokens.train[2][0].tolist() == characters.train[2][0].tolist()
    for data, how in ((tokens, "tokens (--parse_special_tokens false: as characters)"), (characters, "characters")):
        assert data.report.datasets[0].control_tokens == {"<|im_start|>": 2, "<|im_end|>": 2, "<|endoftext|>": 1}
        assert DataReport.from_dict(json.loads(json.dumps(data.report.to_dict()))) == data.report
        out = io.StringIO()
        print_report(data.report, Console(file=out, width=80))
        line = f"text rows hold 5 control tokens, read as {how}: <|im_end|> (2), <|im_start|> (2), <|endoftext|> (1)"
        assert line in out.getvalue()


def test_a_row_that_one_token_swallows_is_not_too_long(jsonl: Jsonl, tmp_path: Path) -> None:
    """A row is left out by its bytes alone only where no token may stand for any number of them."""
    from tokenizers import AddedToken

    tokenizer = byte_level(("<|im_start|>", "<|im_end|>"))
    tokenizer.add_tokens([AddedToken("<gap>", rstrip=True, normalized=False)])
    tokenizer.chat_template = tokenizer_of("chatml").chat_template
    path = jsonl([{"query": "<gap>" + " " * 20_000, "response": "a"}, {"query": "q " * 20_000, "response": "a"}])
    args = SftArguments(dataset=[path], dataset_test_ratio=0.0, max_length=100)
    data = prepare(args, ChatTemplate(tokenizer), cache_dir=tmp_path)
    assert len(data.train) == 1 and data.report.datasets[0].too_long.places == ["rows.jsonl:2"]


def test_pretraining_rows(run: Callable[..., PreparedData], template: ChatTemplate, jsonl: Jsonl) -> None:
    data = run(jsonl([{"text": f"some text {k}"} for k in range(3)]), dataset_test_ratio=0.0)
    ids, labels = data.train[0]
    assert template.decode(ids) == "some text 0<|im_end|>" and (ids == labels).all()
    assert list(data.report.datasets[0].shapes) == ["text alone (pre-training)"]


def test_streams_are_read_as_far_as_needed(run: Callable[..., PreparedData], template: ChatTemplate, jsonl: Jsonl) -> None:
    path = jsonl(["bad", *rows(3000)])
    data = run(path, stream_rows=700)
    entry = data.report.datasets[0]
    assert len(data.train) == 700 and data.val is None and 700 < entry.rows < 3001 and entry.dropped["not JSON"].count == 1
    assert text(template, data.train, 0).endswith("answer0<|im_end|>")
    assert run(path, stream_rows=700).report.from_cache
    assert run(path, stream_rows=700, data_cache=False, processes=2).train.fingerprint == data.train.fingerprint
    two = run(f"{path}#100", jsonl(rows(50), "b.jsonl"), "self-cognition", stream_rows=120, **NAMES)
    assert [item.train for item in two.report.datasets] == [40, 40, 40]
    packed = run(path, stream_rows=20, packing=True, max_length=512)
    assert 20 <= len(packed.train) <= 80 and packed.report.fill > 0.9
    val = run(path, stream_rows=10, val_dataset=[jsonl(rows(5), "v.jsonl")])
    assert len(val.val or []) == 5


def test_streams_of_other_files(run: Callable[..., PreparedData], template: ChatTemplate, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows(5)))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\n")
    data = run(str(tmp_path / "a.json"), str(tmp_path / "b.txt"), stream_rows=100)
    assert [item.train for item in data.report.datasets] == [5, 2]
    assert text(template, data.train, 5) == "one<|im_end|>"
    with pytest.raises(DataError, match="no usable row"):
        (tmp_path / "c.jsonl").write_text("x\n")
        run(str(tmp_path / "c.jsonl"), stream_rows=5)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("notes.txt.jsonl", b'{"query": "q", "response": "a"}\n'),
        ("rows.JSONL", b'{"query": "q", "response": "a"}\n'),
        ("X.TXT", b"one\ntwo\n"),
        ("x.jsonl.txt", b'["one"]\n'),
        ("list.jsonl", b'\xef\xbb\xbf\n [{"query": "q",\n"response": "a"}, {"query": "r", "response": "b"}]'),
        ("list.txt", b'\n[{"query": "q", "response": "a"}]'),
        ("lines.txt", b'{"query": "q", "response": "a"}\n{"query": "r", "response": "b"}\n'),
        ("code.txt", b"{ x }\n[y]\n"),
        ("lines.log", b'{"query": "q", "response": "a"}\n'),
        ("lines.csv", b'{"query": "q", "response": "a"}\n'),
        ("list.jsonl.gz", gzip.compress(b'[{"query": "q", "response": "a"}]', mtime=0)),
        ("utf16.jsonl", '{"query": "q", "response": "a"}'.encode("utf-16")),
        ("broken.jsonl.gz", gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 20),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_streams_read_a_file_as_it_is_read_whole(
    run: Callable[..., PreparedData], template: ChatTemplate, tmp_path: Path, name: str, data: bytes
) -> None:
    def read(**options: Any) -> list[str] | str:
        try:
            found = run(str(tmp_path / name), dataset_test_ratio=0.0, **options)
        except DataError as error:
            return error.what.partition(", first at ")[0]  # a stream knows rows, no lines
        return [text(template, found.train, row) for row in range(len(found.train))]

    (tmp_path / name).write_bytes(data)
    assert read(stream_rows=9) == read()


def printed(data: PreparedData) -> str:
    out = io.StringIO()
    print_report(data.report, Console(file=out, width=200), example=False)
    return out.getvalue()


def test_what_was_changed_in_rows_is_counted_and_told(run: Callable[..., PreparedData], jsonl: Jsonl, tmp_path: Path) -> None:
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"query": "q", "response": "a", "label": False}] * 3
    calls = [
        {"messages": [{"role": "user", "content": "q", "x": {key: 1}}, {"role": "assistant", "content": "a"}]} for key in "ab"
    ]
    pq.write_table(pa.Table.from_pylist(calls), tmp_path / "calls.parquet")
    (tmp_path / "list.txt").write_text(json.dumps([{"query": "q", "response": "a"}] * 2))
    paths = [jsonl(pairs), str(tmp_path / "calls.parquet"), str(tmp_path / "list.txt")]
    for options in ({"dataset_test_ratio": 0.0}, {"stream_rows": 30}):
        data = run(*paths, **options)
        shown = printed(data)
        assert f"3 rows: {PAIR}\n    rows.jsonl" in shown and "dropped 3: a rejected answer" in shown
        assert f"2 rows: {NULLS}\n    calls.parquet: row 1 (messages.x.b)\n" in shown
        assert "list.txt holds JSON, whatever its name says: read as that\n" in shown
        assert [entry.train for entry in data.report.datasets] == [3, 2, 2]
        assert DataReport.from_dict(json.loads(json.dumps(data.report.to_dict()))) == data.report
    page = write_page(tmp_path / "page", data.report, Shown(data.train.sizes), []).read_text(encoding="utf-8")
    assert all(html.escape(text) in page for text in (PAIR, NULLS, "holds JSON"))


@dataclass
class Shown:
    sizes: np.ndarray
    shown: list[list[tuple[str, float]]] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)


IDENTITY = [
    {"instruction": "who are you", "output": "I am {{name}} by {{AUTHOR}}"},
    {"instruction": "{{NAME}}?", "output": "我是 {{name}}"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>{{name}}</think>{{author}}"}]},
    {"instruction": "code", "output": "{{ name }} and\n```\n<b>{{name}}</b>\n```"},
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "reasoning_content": "I am {{name}}", "content": "a"},
        ]
    },
]


def test_places_for_names_are_filled_or_told(run: Callable[..., PreparedData], template: ChatTemplate, jsonl: Jsonl) -> None:
    path = jsonl(IDENTITY)
    data = run(path, dataset_test_ratio=0.0, **NAMES)
    texts = [text(template, data.train, row) for row in range(5)]
    assert "I am Xiao Huang by ModelScope<" in texts[0] and "小黄?" in texts[1] and "我是 小黄<" in texts[1]
    assert "<think>Xiao Huang</think>" in texts[2] and "ModelScope<" in texts[2]
    assert "<think>\nI am Xiao Huang\n</think>" in texts[4]
    assert "{{ name }}" in texts[3] and "<b>{{name}}</b>" in texts[3]  # another language's braces
    assert {note: entry.count for note, entry in data.report.datasets[0].notes.items()} == {
        "{{name}} filled from --model_name": 4,
        "{{author}} filled from --model_author": 2,
    }
    half = run(path, dataset_test_ratio=0.0, model_name=["Bo"])
    assert "I am Bo by {{AUTHOR}}<" in text(template, half.train, 0)
    assert "2 rows: {{author}} is left as it stands and will be learnt: give --model_author\n    rows.jsonl:1" in printed(half)
    none = run(path, dataset_test_ratio=0.0)
    assert [entry.count for entry in none.report.datasets[0].notes.values()] == [2, 4]
    assert not run("self-cognition", **NAMES).report.datasets[0].notes  # there to be filled


def test_a_file_in_gbk_is_one_error(run: Callable[..., PreparedData], jsonl: Jsonl) -> None:
    chinese = json.dumps({"query": "你好，你是谁", "response": "我是一个助手"}, ensure_ascii=False).encode("gbk")
    path = jsonl([*rows(3), chinese])
    for options in ({}, {"stream_rows": 9}, {"processes": 2}):
        with pytest.raises(DataError, match="the file is not UTF-8") as caught:
            run(path, **options)
        assert caught.value.where in ("rows.jsonl:4", "rows.jsonl: row 4") and "iconv -f GB18030" in caught.value.fix


@pytest.mark.parametrize("name", ["ids.bin", "offsets.npy", "index.json", "report.json"])
def test_a_full_disk_under_the_cache(
    run: Callable[..., PreparedData], jsonl: Jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """/dev/full takes no byte; buffered ones are refused when the file is closed."""
    real = io.open

    def opened(file: Any, *words: Any, **options: Any) -> Any:
        return real("/dev/full" if Path(str(file)).name == name and "w" in str(words or options) else file, *words, **options)

    monkeypatch.setattr("io.open", opened)
    monkeypatch.setattr("builtins.open", opened)
    with pytest.raises(UserError, match="the disk of the cache is full") as caught:
        run(jsonl(rows(5)))
    assert "MEGASWIFT_CACHE" in caught.value.fix and not list((tmp_path / "cache" / "data").iterdir())


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 128}, {"stream_rows": 3}, {"processes": 2}], ids=str)
def test_a_row_with_a_token_beyond_the_embedding_is_an_error(
    run: Callable[..., PreparedData], jsonl: Jsonl, options: dict[str, Any]
) -> None:
    """By the first row that uses one, long and bad rows before it counted; the largest id that has a row is none."""
    usual = [{"query": "q", "response": "a"}, "bad", {"query": "q", "response": "a " * 3}]
    largest = run(jsonl(usual), dataset_test_ratio=0.0).train.largest_id
    path = jsonl([*usual, {"text": "a<|endoftext|>b"}, *usual])
    last = run(path, dataset_test_ratio=0.0).train.largest_id
    assert last > largest and run(path, dataset_test_ratio=0.0, table=last + 1, **options).train.largest_id == last
    message = (
        rf"this row has a token without a row in the model's embedding, which has {last:,} rows: '<\|endoftext\|>' \({last}\)"
    )
    with pytest.raises(DataError, match=message) as caught:
        run(path, dataset_test_ratio=0.0, table=last, **options)
    assert caught.value.where == ("rows.jsonl: row 4" if "stream_rows" in options else "rows.jsonl:4")
