"""Rows of preferences in every usual form, what becomes of bad ones, and pairs that are never divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaswift.data.batches import Batches, EvalBatches
from megaswift.data.conversation import BadRow
from megaswift.data.pairs import to_labelled, to_pair
from megaswift.errors import DataError, UserError
from tests.rlhf.pairs import prepared, write_labelled, write_pairs
from tests.training import tiny_start

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "good"), ("assistant", "bad"))
)
SYSTEM = {"role": "system", "content": "s"}
FORMS: dict[str, dict[str, Any]] = {
    "ms-swift, text": {"messages": [USER, GOOD], "rejected_response": "bad"},
    "ms-swift, messages": {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
    "ms-swift, query and response": {"query": "q", "response": "good", "rejected_response": "bad"},
    "trl, text": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "trl, messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "trl, implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "trl, prompt beside whole conversations": {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "llama-factory, alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "llama-factory, sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "roles in capitals": {
        "messages": [{"role": "User", "content": "q"}, {"role": "Assistant", "content": "good"}],
        "rejected_response": "bad",
    },
    "an answer by a bot": {
        "prompt": "q",
        "chosen": [{"role": "bot", "content": "good"}],
        "rejected": [{"role": "Model", "content": "bad"}],
    },
    "openai": {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    "ultrafeedback": {"prompt": "q", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 3},
    "an answer beside the two": {"question": "q", "answer": "other", "chosen": "good", "rejected": "bad", "label": 0},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_pair_in_every_form(name: str) -> None:
    chosen, rejected = to_pair(FORMS[name])
    for conversation, answer in ((chosen, "good"), (rejected, "bad")):
        assert [(m.role, m.content) for m in conversation.messages] == [("user", "q"), ("assistant", answer)], name
        assert conversation.messages[-1].loss == 1


def test_system_tools_and_earlier_turns_are_those_of_both() -> None:
    tools = [{"name": "f", "parameters": {}}]
    earlier = [USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    row = {"system": "s", "tools": tools, "messages": [*earlier, GOOD], "rejected_response": "bad"}
    chosen, rejected = to_pair(row)
    for conversation in (chosen, rejected):
        assert [m.role for m in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
        assert conversation.tools[0]["function"]["name"] == "f"
        assert [m.loss for m in conversation.messages if m.role == "assistant"] == [0, 1], "what both say is no preference"


def test_an_answer_of_several_turns_is_all_that_differs() -> None:
    more = [{"role": "user", "content": "r"}, {"role": "assistant", "content": "more"}]
    chosen, rejected = to_pair({"chosen": [USER, GOOD, *more], "rejected": [USER, BAD]})
    assert [m.loss for m in chosen.messages if m.role == "assistant"] == [1, 1] and len(rejected.messages) == 2


BAD_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "no rejected": ({"messages": [USER, GOOD]}, "no rejected answer"),
    "equal": ({"messages": [USER, GOOD], "rejected_response": "good"}, "chosen equal to rejected"),
    "equal texts": ({"chosen": "one text", "rejected": "one text"}, "chosen equal to rejected"),
    "other question": ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "p"}, BAD]}, "two questions"),
    "other system": ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "two questions"),
    "a beginning": ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "the beginning of the other"),
    "empty": ({"messages": [USER, GOOD], "rejected_response": ""}, "no answer in a pair"),
    "blank": ({"messages": [USER, GOOD], "rejected_response": " "}, "empty content"),
    "a number": ({"messages": [USER, GOOD], "rejected_response": 7}, "no answer in a pair"),
    "texts in a list": ({"messages": [USER, GOOD], "rejected_response": ["bad", "worse"]}, "wrong type"),
    "only a rejected one": ({"messages": [USER], "rejected_response": "bad"}, "no assistant turn"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs(name: str) -> None:
    row, reason = BAD_PAIRS[name]
    with pytest.raises(BadRow, match=reason):
        to_pair(row)


@pytest.mark.parametrize(
    ("row", "good"),
    [
        ({"messages": [USER, GOOD], "label": True}, True),
        ({"messages": [USER, GOOD], "label": False}, False),
        ({"prompt": "q", "completion": "good", "label": 1}, True),
        ({"prompt": [USER], "completion": [GOOD], "label": 0}, False),
        ({"instruction": "q", "input": "", "output": "good", "kto_tag": "True"}, True),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}], "kto_tag": False}, False),
    ],
)
def test_labels(row: dict[str, Any], good: bool) -> None:
    [(conversation, found)] = to_labelled(row)
    assert found is good
    assert [(m.role, m.content) for m in conversation.messages] == [("user", "q"), ("assistant", "good")]


def test_a_pair_is_two_labelled_answers_and_only_the_last_turn_is_judged() -> None:
    (chosen, one), (rejected, other) = to_labelled({"messages": [USER, GOOD], "rejected_response": "bad"})
    assert (one, other) == (True, False) and chosen.messages[-1].content == "good" and rejected.messages[-1].content == "bad"
    [(conversation, _)] = to_labelled({"messages": [USER, GOOD, USER, BAD], "label": True})
    assert [m.loss for m in conversation.messages if m.role == "assistant"] == [0, 1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER, GOOD]}, "no label"),
        ({"messages": [USER, GOOD], "label": 0.5}, "a label that is none"),
        ({"messages": [USER, GOOD], "label": "maybe"}, "a label that is none"),
        ({"messages": [USER, GOOD], "label": -1}, "a label that is none"),
        ({"messages": [USER], "label": True}, "no assistant turn"),
    ],
)
def test_labels_that_are_none(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        to_labelled(row)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_start(tmp_path_factory.mktemp("start"))


def test_bad_rows_are_told_by_line_and_counted(start: Path, tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", 4)
    with rows.open("a", encoding="utf-8") as file:
        for row, _ in BAD_PAIRS.values():
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"messages": [USER, GOOD], "rejected_response": "bad " * 300}) + "\n")
        file.write(json.dumps({"messages": [USER, {**GOOD, "loss": 0}], "rejected_response": "bad"}) + "\n")
    _, data, _, _ = prepared(start, rows)
    [entry] = data.report.datasets
    assert len(data.train) == 4 and entry.rows == 17
    assert entry.dropped["chosen equal to rejected"].count == 2
    assert entry.dropped["chosen equal to rejected"].places[0].endswith("rows.jsonl:6")
    assert ":5 (columns: messages)" in entry.dropped["no rejected answer"].places[0]
    assert entry.too_long.count == 1 and ":16" in entry.too_long.places[0], "a rejected answer that is too long"
    assert sum(item.count for item in entry.dropped.values()) + entry.too_long.count == 13
    with pytest.raises(DataError, match="bad row: no rejected answer"):
        prepared(start, rows, strict=True)


def test_a_label_column_with_one_slip(start: Path, tmp_path: Path) -> None:
    rows = write_labelled(tmp_path / "rows.jsonl", 6)
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": [USER, GOOD], "label": "good"}) + "\n")
    _, data, _, _ = prepared(start, rows, rlhf_type="kto")
    [entry] = data.report.datasets
    assert entry.dropped["a label that is none"].places[0].endswith("rows.jsonl:7 (label is 'good', expected true or false)")
    assert [bool(data.train.desirable(row)[0]) for row in range(6)] == [k % 3 != 1 for k in range(6)]


def test_whole_texts_carry_loss_where_they_differ(start: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"chosen": "Human: a b c. Assistant: yes", "rejected": "Human: a b c. Assistant: no"}) + "\n")
    _, data, _, _ = prepared(start, rows)
    one, other = data.train.samples(0)
    common = int(np.flatnonzero(one.ids[: len(other.ids)] != other.ids[: len(one.ids)])[0])
    assert common > 5
    for sample in (one, other):
        assert not sample.kept[:common].any() and sample.kept[common:].all()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("repeats", ["", "#60"])
def test_a_pair_is_never_divided(packing: bool, repeats: str, start: Path, tmp_path: Path) -> None:
    """In every row, micro batch and repeat a chosen answer is followed by its own rejected one."""
    rows = write_pairs(tmp_path / "rows.jsonl")
    _, apart, _, pad_id = prepared(start, rows)
    pairs = {tuple(sample.ids.tobytes() for sample in apart.train.samples(row)) for row in range(len(apart.train))}
    _, data, _, _ = prepared(start, f"{rows}{repeats}", packing=packing)  # type: ignore[arg-type]
    seen: list[tuple[bytes, ...]] = []
    for row in range(len(data.train)):
        samples = [sample.ids.tobytes() for sample in data.train.samples(row)]
        seen += zip(samples[::2], samples[1::2], strict=True)  # type: ignore[arg-type]
        assert data.train.desirable(row).tolist() == [True, False] * (len(samples) // 2)
        assert sum(len(sample.ids) for sample in data.train.samples(row)) <= 2 * 136
    assert set(seen) == pairs and len(seen) == (60 if repeats else 24)
    data.train.reference = -np.arange(len(data.train.sizes), dtype=np.float32)
    common: dict[str, Any] = {"global_batch_size": 4, "dp_rank": 1, "dp_size": 2, "pad_id": pad_id}
    for batches in (
        Batches(data.train, micro_batch_size=2, seed=1, **common),
        EvalBatches(data.train, micro_batch_size=2, padding_free=False, **common),
    ):
        for micro in batches.step(0):
            assert micro.reference is not None and micro.desirable is not None
            places = np.concatenate([np.arange(len(data.train.sizes))[data.train.places(row)] for row in micro.sample_ids])
            assert micro.reference.tolist() == (-places).tolist() and len(micro.desirable) == len(places)
            lengths = [len(sample.ids) for row in micro.sample_ids for sample in data.train.samples(row)]
            if micro.cu_seqlens is None:
                assert micro.tokens.shape == (len(places), max(lengths))
            else:
                assert micro.cu_seqlens.diff().tolist()[: len(places)] == lengths


def test_streamed_pairs_are_whole(start: Path, tmp_path: Path) -> None:
    from megaswift.data.encode import prepare
    from megaswift.data.preference import PAIRS
    from megaswift.run.setup import template_of
    from megaswift.store.cache import cache_root

    args, _, found, _ = prepared(start, write_pairs(tmp_path / "rows.jsonl"))
    data = prepare(args, template_of(args, found), cache_dir=cache_root(), stream_rows=5, preferences=PAIRS)
    assert len(data.train) == 5 and all(data.train.desirable(row).tolist() == [True, False] for row in range(5))


def test_answers_that_are_cut_stay_pairs(start: Path, tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl")
    _, data, _, _ = prepared(start, rows, max_length=30, truncation_strategy="truncation_left")
    assert data.report.datasets[0].too_long.count > 3 and len(data.train) == 24
    assert max(len(sample.ids) for row in range(24) for sample in data.train.samples(row)) == 30
    with rows.open("a", encoding="utf-8") as file:  # what differs is cut off
        answers = {"chosen": "good" + " a day" * 30, "rejected": "bad" + " a day" * 30}
        file.write(json.dumps({"prompt": "q", **answers}) + "\n")
    _, data, _, _ = prepared(start, rows, max_length=30, truncation_strategy="truncation_left")
    assert len(data.train) == 24 and data.report.datasets[0].dropped["chosen equal to rejected"].count == 1
    with pytest.raises(UserError, match="cut an answer into pieces"):
        prepared(start, rows, truncation_strategy="split")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"simpo_gamma": 0.5}, "--simpo_gamma means nothing for --rlhf_type dpo"),
        ({"rlhf_type": "kto", "rpo_alpha": 1.0}, "--rpo_alpha means nothing for --rlhf_type kto"),
        ({"rlhf_type": "orpo", "cpo_alpha": 0.5}, "--cpo_alpha means nothing for --rlhf_type orpo"),
        ({"desirable_weight": 2.0}, "--desirable_weight means nothing for --rlhf_type dpo"),
        ({"rlhf_type": "ipo", "loss_type": "hinge"}, "--rlhf_type ipo has no form 'hinge'"),
        ({"loss_type": "aot"}, "sorts the pairs of a batch"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "--label_smoothing means nothing"),
        ({"rlhf_type": "kto", "desirable_weight": 0.0, "undesirable_weight": 0.0}, "nothing would be learnt"),
        ({"loss_scale": "all"}, "--loss_scale all counts the question"),
        ({"beta": 0.0}, "--beta 0 is not above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], text: str, start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        prepared(start, write_pairs(tmp_path / "rows.jsonl"), **options)


def test_mismatched_answers_are_those_to_the_question_before(start: Path, tmp_path: Path) -> None:
    """They stand beside the answers, are no part of a micro batch, and share with it only the question."""
    rows = write_labelled(tmp_path / "rows.jsonl")
    _, data, _, pad_id = prepared(start, rows, rlhf_type="kto")
    assert data.train.mismatched and len(data.train) == 24
    own = [data.train.samples(row) for row in range(24)]
    answers = [sample.ids[sample.kept].tolist() for sample, _ in own]
    for k, (sample, beside) in enumerate(own):
        asked = int(np.argmax(sample.kept))
        assert beside.ids[:asked].tolist() == sample.ids[:asked].tolist()
        assert beside.ids[beside.kept].tolist() == answers[k - 1]
    data.train.reference = np.arange(48, dtype=np.float32)
    for padding_free in (True, False):
        batches = Batches(
            data.train, micro_batch_size=3, global_batch_size=6, dp_rank=0, dp_size=1, seed=1, pad_id=pad_id,
            padding_free=padding_free,
        )  # fmt: skip
        for micro in batches.step(0):
            assert micro.mismatched is not None and micro.reference is not None and micro.mismatched.reference is not None
            assert micro.reference.tolist() == [2 * row for row in micro.sample_ids]
            assert micro.mismatched.reference.tolist() == [2 * row + 1 for row in micro.sample_ids]
            labels = micro.labels[micro.labels != -100].tolist()
            assert labels == [token for row in micro.sample_ids for token in answers[row]]


def test_labels_alone_need_no_mismatched_answers(start: Path, tmp_path: Path) -> None:
    _, data, _, _ = prepared(start, write_labelled(tmp_path / "rows.jsonl"), rlhf_type="kto", loss_type="apo_zero_unpaired")
    assert not data.train.mismatched and len(data.train.samples(0)) == 1
