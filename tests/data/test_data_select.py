"""Names, subsets, counts and the arithmetic of sampling, splitting and packing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaswift.data.packing import pack
from megaswift.data.registry import builtin, entries
from megaswift.data.resolve import resolve
from megaswift.data.sampling import sample_validation, split_and_sample
from megaswift.data.spec import DatasetSpec, parse_spec, parse_specs
from megaswift.errors import DataError, UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpaca-en", (None, "alpaca-en", (), None)),
        ("alpaca-en#500", (None, "alpaca-en", (), 500)),
        ("swift-mix:sharegpt/firefly#500", (None, "swift-mix", ("sharegpt", "firefly"), 500)),
        ("HF::tatsu-lab/alpaca#7", ("hf", "tatsu-lab/alpaca", (), 7)),
        ("ms::AI-ModelScope/a:default", ("ms", "AI-ModelScope/a", ("default",), None)),
    ],
)
def test_grammar(text: str, expected: tuple) -> None:
    assert parse_spec(text) == DatasetSpec(text, *expected)


def test_files_win_over_the_grammar(tmp_path: Path) -> None:
    odd = tmp_path / "a:b#3,c.jsonl"
    odd.write_text("{}")
    assert parse_specs([str(odd)]) == [DatasetSpec(str(odd), None, str(odd))]
    assert parse_spec(f"{odd}#5").count == 5 and parse_spec(f"{odd}#5").name == str(odd)
    assert parse_specs([f"{odd}#5"]) == [DatasetSpec(f"{odd}#5", None, str(odd), (), 5)]
    assert [spec.name for spec in parse_specs(["a#1,b", "c"])] == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["a#", "a#0", "a#-1", "a#x", "a#1.5", "XX::a", ":b", "a:", "#5"])
def test_grammar_errors(text: str) -> None:
    with pytest.raises(UserError):
        parse_spec(text)


def test_registry() -> None:
    table = builtin()
    assert len(table) >= 30
    assert table["swift-mix"].subsets == ("sharegpt", "firefly", "codefuse", "metamathqa")
    for name in ("alpaca-en", "alpaca-zh", "self-cognition", "gsm8k", "ultrachat", "openhermes", "longalpaca", "coig-cqia"):
        assert name in table


def test_custom_registry(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"q": "a", "r": "b"}\n')
    own = {"mine": {"dataset_path": "mine.jsonl", "columns": {"q": "query", "r": "response"}, "tags": ["x"]}}
    (tmp_path / "info.json").write_text(json.dumps(own))
    dataset = resolve(parse_spec("mine#2"), str(tmp_path / "info.json"))
    assert len(dataset.source) == 1 and dataset.columns == {"q": "query", "r": "response"}
    assert entries(json.dumps([{"dataset_name": "other", "hf_dataset_id": "x/y"}]))["other"].hf == "x/y"
    for wrong in (
        "no json{",
        "{",
        '{"a": {"nonsense": 1}}',
        '{"a": {}}',
        '{"a": {"hf": "x/y", "converter": "none"}}',
        '{"a": 3}',
        str(tmp_path / "no.json"),
    ):
        with pytest.raises(UserError):
            entries(wrong)


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="alpaca-en"):
        resolve(parse_spec("alpacca-en"))
    with pytest.raises(UserError, match="no subset 'x'"):
        resolve(parse_spec("swift-mix:x"))
    with pytest.raises(UserError, match="one subset"):
        resolve(parse_spec("self-cognition:qwen3/default"))
    with pytest.raises(DataError, match="no such dataset file"):
        resolve(parse_spec("missing/rows.jsonl#5"))


def test_hub_without_network_says_what_was_tried() -> None:
    with pytest.raises(DataError) as caught:
        resolve(parse_spec("alpaca-en#5"))
    text = str(caught.value)
    assert "ModelScope AI-ModelScope/alpaca-gpt4-data-en" in text and "Hugging Face vicgalle/alpaca-gpt4" in text
    with pytest.raises(DataError) as caught:
        resolve(parse_spec("HF::alpaca-en"))
    assert "ModelScope" not in str(caught.value)
    with pytest.raises(UserError, match="not on Hugging Face"):
        resolve(parse_spec("HF::cot-en"))


def test_a_hub_id_is_its_registered_name() -> None:
    with pytest.raises(DataError) as caught:
        resolve(parse_spec("vicgalle/alpaca-gpt4"))
    assert "AI-ModelScope/alpaca-gpt4-data-en" in str(caught.value)


def test_a_number_of_rows_is_drawn_at_random() -> None:
    """Neither the front of the file nor always the same: with and without validation rows, below and above the rows' number."""
    for count, ratio in ((5, 0.0), (5, 0.01), (105, 0.0)):
        drawn = [split_and_sample(100, count, ratio, seed)[0] for seed in (1, 1, 2)]
        ends = [rows[-5 + bool(ratio) :].tolist() for rows in drawn]
        assert ends[0] == ends[1] != ends[2] and all(len(set(end)) == len(end) for end in ends)
        assert all(sorted(end) != list(range(len(end))) for end in ends)
    validation = [sample_validation(100, 5, seed, "x").tolist() for seed in (1, 2)]
    assert validation[0] != validation[1] and sorted(validation[0]) != list(range(5))


def test_the_arithmetic_of_the_workflow_in_the_documentation() -> None:
    """500 + 250 + 250 + self-cognition#500 of 134 rows: 1490 rows to train on, 10 to validate."""
    splits = [split_and_sample(rows, count, 0.01, 42) for rows, count in ((10000, 500), (9000, 250), (8000, 250), (134, 500))]
    assert [len(val) for _, val in splits] == [5, 2, 2, 1]
    assert [len(train) for train, _ in splits] == [495, 248, 248, 499]
    assert sum(len(train) for train, _ in splits) == 1490
    counts = np.bincount(splits[3][0], minlength=134)
    assert sorted(set(counts)) == [0, 3, 4] and (counts == 4).sum() == 100 and counts[splits[3][1][0]] == 0


@given(
    rows=st.integers(1, 300),
    count=st.none() | st.integers(1, 900),
    ratio=st.sampled_from([0.0, 0.01, 0.3, 0.99]),
    seed=st.integers(0, 99),
)
def test_split_and_sample(rows: int, count: int | None, ratio: float, seed: int) -> None:
    train, val = split_and_sample(rows, count, ratio, seed)
    wanted = rows if count is None else count
    assert len(train) + len(val) == wanted
    assert not set(train) & set(val) and len(set(val)) == len(val)
    times = np.bincount(train, minlength=rows)[sorted(set(range(rows)) - set(val))]
    assert times.max() - times.min() <= 1  # nothing is repeated while something else is left out
    again = split_and_sample(rows, count, ratio, seed)
    assert (again[0] == train).all() and (again[1] == val).all()


def test_validation_is_never_repeated() -> None:
    assert len(sample_validation(10, None, 0, "v")) == 10
    assert len(set(sample_validation(10, 4, 0, "v"))) == 4
    drawn = [sample_validation(100, 5, seed, "v").tolist() for seed in (0, 1)]
    assert drawn[0] != drawn[1] and list(range(5)) not in drawn  # at random, not the front of the file
    with pytest.raises(UserError, match="cannot be repeated"):
        sample_validation(10, 11, 0, "v")


@given(lengths=st.lists(st.integers(1, 64), max_size=80))
def test_pack(lengths: list[int]) -> None:
    groups = pack(lengths, 64)
    assert sorted(sample for group in groups for sample in group) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in group) <= 64 for group in groups)
    assert groups == pack(lengths, 64)
    if lengths:  # no two groups could be one
        sums = sorted(sum(lengths[sample] for sample in group) for group in groups)
        assert len(sums) < 2 or sums[0] + sums[1] > 64


def test_pack_is_tight() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 5000)
    assert lengths.sum() / (len(pack(lengths, 2048)) * 2048) > 0.995
    with pytest.raises(ValueError, match="does not fit"):
        pack([5], 4)
