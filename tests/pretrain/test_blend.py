"""Blends by weight: how they are written, what is refused as unclear, and that every stretch of a run has its shares."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswift.config.files import write_args_file
from megaswift.config.options import PtArguments
from megaswift.config.parse import count_of
from megaswift.data.blend import parse_weighted, shares
from megaswift.data.kept import kept_data
from megaswift.data.mixture import pattern, ranks
from megaswift.errors import UserError
from tests.pretrain.texts import made, rows_of, write_texts


@given(st.lists(st.integers(1, 60), min_size=2, max_size=9))
@settings(max_examples=60)
def test_every_stretch_has_its_shares_to_within_one_row(counts: list[int]) -> None:
    order, period = pattern(counts), sum(counts)
    taken = np.stack([np.cumsum(order == kind) for kind in range(len(counts))], axis=1)
    wanted = np.arange(1, period + 1)[:, None] * np.array(counts) / period
    assert np.abs(taken - wanted).max() < 1, "Tijdeman's bound"
    assert taken[-1].tolist() == counts, "so that the next period can begin as the first did"
    own = ranks(order, len(counts))
    assert [int(own[place]) for place in range(period)] == [int(taken[place, order[place]]) - 1 for place in range(period)]


def test_one_large_and_many_small_ones() -> None:
    """The case in which rounding each share by itself is many rows off."""
    counts = [500, *([5] * 100)]
    order = pattern(counts)
    taken = np.cumsum(order == 0)
    assert np.abs(taken - np.arange(1, 1001) / 2).max() < 1


def test_weights_become_whole_numbers() -> None:
    assert shares([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert shares([Fraction(2), Fraction("0.5"), Fraction("1.5")]) == [4, 1, 3]
    with pytest.raises(UserError, match="repeat only after"):
        shares([Fraction("0.12345678"), Fraction("0.7")])


def test_rows_of_a_blend(tmp_path: Path) -> None:
    """Rows come from the parts in their shares, each part in an order of its own, begun again when it is used up."""
    items = [str(write_texts(tmp_path / f"{name}.jsonl", count, count)) for name, count in (("a", 90), ("b", 12), ("c", 40))]
    data = made(tmp_path, *(f"{item}:{weight}" for item, weight in zip(items, ("0.5", "0.3", "0.2"))))
    rows = rows_of(data)
    parts = [rows.part_of(row) for row in range(1000)]
    for part, share in enumerate((0.5, 0.3, 0.2)):
        numbers = [number for kind, number in parts if kind == part]
        assert numbers == list(range(len(numbers)))
        for row in (1, 17, 333, 1000):
            assert abs(sum(kind == part for kind, _ in parts[:row]) - share * row) < 1
        assert abs(len(numbers) - share * 1000) <= 1
    places = [rows.place(row) for row in range(1000)]
    b = [place for place, (part, _) in zip(places, parts) if part == 1]
    size = rows.passes[1]
    assert len(b) > 10 * size and len({place[1] for place in b[:size]}) == size and b[:size] != b[size : 2 * size]
    assert {place[0].directory for place in b} == {rows.plan.parts[1][0].directory}
    assert data.report.blend == [(item, share, own) for item, share, own in zip(items, (0.5, 0.3, 0.2), rows.passes)]
    other = rows_of(made(tmp_path, *(f"{item}:{weight}" for item, weight in zip(items, ("0.5", "0.2", "0.3")))))
    assert other.fingerprint != rows.fingerprint


def test_without_weights_a_pass_has_every_row_of_all(tmp_path: Path) -> None:
    items = [str(write_texts(tmp_path / f"{name}.jsonl", 40, seed)) for name, seed in (("a", 0), ("b", 1))]
    rows = rows_of(made(tmp_path, *items))
    places = [rows.place(row) for row in range(len(rows))]
    assert len(set(places)) == len(rows) == sum((span.last - span.first) // 32 for span in rows.plan.parts[0])
    first = {place[0].directory for place in places[:20]}
    assert len(first) == 2, "they are shuffled together"


def read(tmp_path: Path, *items: str) -> Any:
    return [
        (spec.name, spec.subsets, spec.count, None if weight is None else float(weight))
        for spec, weight in parse_weighted(list(items))
    ]


def test_how_weights_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.txt", "odd:3", "odd:0.5", "c_document.idx", "c_document.bin"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert read(tmp_path, "a.jsonl:0.7", "b.txt:0.3") == [("a.jsonl", (), None, 0.7), ("b.txt", (), None, 0.3)]
    assert read(tmp_path, "a.jsonl:7,b.txt:3") == [("a.jsonl", (), None, 7.0), ("b.txt", (), None, 3.0)]
    assert read(tmp_path, "a.jsonl#100:.5", "folder:0.5") == read(tmp_path, "a.jsonl:.5#100", "folder:0.5")
    assert read(tmp_path, "a.jsonl:.5#100", "folder:0.5") == [("a.jsonl", (), 100, 0.5), ("folder", (), None, 0.5)]
    assert read(tmp_path, "HF::owner/name:sub:2", "owner/name:0.5") == [
        ("owner/name", ("sub",), None, 2.0), ("owner/name", (), None, 0.5),
    ]  # fmt: skip
    assert read(tmp_path, "folder:2024:1", "owner/name:2024:1") == [
        ("folder", ("2024",), None, 1.0), ("owner/name", ("2024",), None, 1.0),
    ]  # fmt: skip
    assert read(tmp_path, "odd:3", "odd:0.5") == [("odd:3", (), None, None), ("odd:0.5", (), None, None)], "they are files"
    assert read(tmp_path, "odd:3:0.5", "c_document:0.5") == [("odd:3", (), None, 0.5), ("c_document", (), None, 0.5)]
    assert read(tmp_path, "owner/name:2024:1") == [("owner/name", ("2024",), None, 1.0)], "a way to say the subset"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["a.jsonl:0.7", "b.txt"], "a.jsonl has a weight and b.txt has none"),
        (["a.jsonl:0", "b.txt:1"], "a weight is above 0"),
        (["a.jsonl:0.7"], "the only dataset, so its weight means nothing"),
        (["0.7", "a.jsonl", "0.3", "b.txt"], "'0.7' is no dataset"),
        (["owner/name:2024", "a.jsonl:0.5"], "2024 may be a weight or a subset"),
        (["folder:2", "a.jsonl:0.5"], "2 may be a weight or a subset"),
        (["a.jsonl#five", "b.txt:0.5"], "'#five' is no number of rows"),
    ],
)
def test_what_is_unclear_is_refused(items: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        parse_weighted(items)
    assert message in caught.value.what and caught.value.fix


def test_options_that_are_kept_mean_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sft_args.json has absolute paths, weights and all."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "c_document.idx", "c_document.bin"):
        (tmp_path / name).touch()
    args = PtArguments(dataset=["a.jsonl:0.7#50", "c_document:3", "HF::owner/name:2024:0.125"])
    write_args_file(tmp_path, args, kept_data(args))
    kept = json.loads((tmp_path / "sft_args.json").read_text())["dataset"]
    monkeypatch.chdir("/")
    assert [(spec.name, spec.count, weight) for spec, weight in parse_weighted(kept)] == [
        (str(tmp_path / "a.jsonl"), 50, Fraction("0.7")), (str(tmp_path / "c_document"), None, Fraction(3)),
        ("owner/name", None, Fraction("0.125")),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "number"), [("2B", 2 * 10**9), ("1.5m", 1_500_000), ("4096", 4096), ("3K", 3000), ("1T", 10**12), ("1_000", 1000)]
)
def test_token_counts(text: str, number: int) -> None:
    assert count_of(text, "train_tokens") == number and PtArguments(train_tokens=text).train_tokens == text


@pytest.mark.parametrize("text", ["", "0", "2G", "two", "-1B", "0.5", "1.2.3M", "B"])
def test_what_is_no_token_count(text: str) -> None:
    with pytest.raises(UserError, match="is no number of tokens"):
        PtArguments(train_tokens=text)
