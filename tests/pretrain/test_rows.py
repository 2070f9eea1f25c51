"""Rows of text: every token once, ends learnt, borders kept, whatever the length; and how they are prepared."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswift.data.batches import Batches, make_micro_batch
from megaswift.data.documents import Documents, DocumentWriter
from megaswift.data.permutation import Permutation
from megaswift.data.pretrain import chunks
from megaswift.data.text_rows import Span, TextPlan, TextRows, open_rows
from megaswift.errors import DataError, UserError
from tests.pretrain.texts import END, PAD, expected, made, rows_of, texts, tokenizer, write_texts


@given(size=st.integers(1, 3000), key=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3))
@settings(max_examples=30)
def test_a_permutation_has_every_number_once(size: int, key: list[int]) -> None:
    order = Permutation(size, *key)
    assert sorted(map(order, range(size))) == list(range(size))


def test_permutations_are_even_and_differ_by_their_key() -> None:
    """Where a number goes is spread evenly over keys, and neighbours do not stay together."""
    size, draws = 97, 3000
    places = np.array([[Permutation(size, key)(number) for number in (0, 1)] for key in range(draws)])
    counts = np.bincount(places[:, 0], minlength=size)
    assert ((counts - draws / size) ** 2 / (draws / size)).sum() < 150, "chi-squared of 96 degrees of freedom"
    assert np.mean(np.abs(np.diff(places, axis=1)) == 1) < 0.04
    big = Permutation(10**12, 5)
    assert len({big(number) for number in range(1000)}) == 1000 and max(map(big, range(100))) > 10**11
    with pytest.raises(IndexError):
        big(10**12)


@pytest.mark.parametrize("bos", [False, True], ids=["end", "first and end"])
@pytest.mark.parametrize("separate", [True, False], ids=["separate", "across"])
def test_every_token_is_learnt_once(separate: bool, bos: bool, tmp_path: Path) -> None:
    """Labels of a pass are those of the documents end to end, but for what begins a document, and a tail that fills no row."""
    write_texts(tmp_path / "a.jsonl", 60)
    rows = rows_of(made(tmp_path, str(tmp_path / "a.jsonl"), bos=bos, reset_attention_mask=separate))
    store = Documents.open(rows.plan.parts[0][0].directory)
    own = tokenizer(tmp_path / "again", bos)
    whole = [own(text)["input_ids"] + [END] for text in texts(60)]
    assert store.tokens.tolist() == [token for one in whole for token in one]
    assert np.diff(store.offsets).tolist() == list(map(len, whole))
    size, seen, learnt, ends = rows.plan.max_length, set(), 0, 0
    assert len(rows) == len(store.tokens) // size > 30
    for row in range(len(rows)):
        ids, labels, document = expected(rows, row)
        batch = make_micro_batch(rows, [row], True, 1, PAD)
        assert batch.tokens[0].tolist() == ids.tolist()
        assert batch.labels[0].tolist() == labels.tolist()
        borders = [0, *(np.flatnonzero(np.diff(document)) + 1), size]
        if separate and len(borders) > 2:
            assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == borders
        else:
            assert batch.cu_seqlens is None, "a plain causal row"
        seen.add(rows.place(row)[1])
        learnt += int((labels != -100).sum())
        ends += int((labels == END).sum())
    assert len(seen) == len(rows), "a pass has every row once"
    tokens = len(rows) * size
    begun = int(
        np.searchsorted(store.offsets[1:-1], tokens, side="right")
    )  # documents after the first that begin in these rows
    last = int(tokens == len(store.tokens))
    assert learnt == tokens - last - (begun if separate or bos else 0)
    assert ends == int((np.asarray(store.tokens[1 : tokens + 1]) == END).sum()) > 40


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "across"])
@pytest.mark.parametrize("bos", [None, 0])
def test_rows_that_end_where_a_document_does(separate: bool, bos: int | None, tmp_path: Path) -> None:
    """What comes next is predicted only where attention crosses borders, and never the tokenizer's own first token."""
    (tmp_path / "documents").mkdir()
    writer = DocumentWriter(tmp_path / "documents", small=True)
    sizes = [8, 8, 5, 11, 2, 6, 8]
    for number, size in enumerate(sizes):
        ids = np.arange(10 * number + 10, 10 * number + 10 + size, dtype=np.int32)
        ids[0], ids[-1] = ids[0] if bos is None else bos, END
        writer.add(ids, [size])
    writer.finish({})
    span = Span(str(tmp_path / "documents"), 0, sum(sizes))
    TextPlan(((span,),), (1,), max_length=8, separate=separate, seed=1, shuffled=False, bos_id=bos).write(tmp_path / "rows")
    rows: Any = open_rows(tmp_path / "rows")
    assert len(rows) == len(rows.lengths) == 6
    for row, crosses in enumerate((True, True, False, True, True, False)):
        ids, labels, _ = expected(rows, row)
        batch = make_micro_batch(rows, [row], True, 1, PAD)
        assert batch.tokens[0].tolist() == ids.tolist() and batch.labels[0].tolist() == labels.tolist()
        assert (labels[-1] == -100) == (row == 5 or (crosses and (separate or bos is not None)))


def test_rows_go_on_in_another_order(tmp_path: Path) -> None:
    """Two passes have every row twice; the same seed gives the same rows, another other ones."""
    file = str(write_texts(tmp_path / "a.jsonl", 60))
    rows = rows_of(made(tmp_path, file))
    places = [rows.place(row)[1] for row in range(2 * len(rows))]
    first, second = places[: len(rows)], places[len(rows) :]
    assert sorted(first) == sorted(second) and first != second != sorted(second)
    again, other = rows_of(made(tmp_path, file)), rows_of(made(tmp_path, file, seed=7))
    assert [again.place(row)[1] for row in range(2 * len(rows))] == places
    assert again.fingerprint == rows.fingerprint != other.fingerprint
    assert [other.place(row)[1] for row in range(len(rows))] != first


def test_batches_take_rows_in_their_order_without_end(tmp_path: Path) -> None:
    """The same rows a step whatever the number of ranks, and never a row that one step had again before the pass ends."""
    rows = rows_of(made(tmp_path, str(write_texts(tmp_path / "a.jsonl", 60))))

    def step(number: int, ranks: int, micro: int) -> list[int]:
        found: list[int] = []
        for rank in range(ranks):
            batches = Batches(
                rows, micro_batch_size=micro, global_batch_size=8, dp_rank=rank, dp_size=ranks, seed=1, pad_id=PAD
            )
            found += [row for batch in batches.step(number) for row in batch.sample_ids]
        return sorted(found)

    for number in (0, 3, 1000):
        assert step(number, 1, 1) == step(number, 2, 2) == step(number, 4, 1) == list(range(8 * number, 8 * number + 8))
    assert open_rows(rows.path).fingerprint == rows.fingerprint


def test_tokens_are_stored_once_for_every_length(tmp_path: Path) -> None:
    """Another length, seed, blend or border is another plan of a few hundred bytes over the same tokens."""
    a, b = (str(write_texts(tmp_path / f"{name}.jsonl", 60, seed)) for name, seed in (("a", 0), ("b", 1)))
    fingerprints = set()
    for options in ({}, {"max_length": 48}, {"seed": 3}, {"reset_attention_mask": False}):
        fingerprints.add(rows_of(made(tmp_path, a, b, **options)).fingerprint)
    made(tmp_path, f"{a}:0.25", f"{b}:0.75")
    assert len(fingerprints) == 4
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 2
    plans = [path.stat().st_size for path in (tmp_path / "cache" / "data").rglob("*") if path.is_file()]
    assert len(plans) == 10 and max(plans) < 1000
    store = Path(rows_of(made(tmp_path, a)).plan.parts[0][0].directory)
    size = (store / "tokens.bin").stat().st_size
    assert size == 2 * Documents.open(store).offsets[-1], "two bytes a token"


def test_several_processes_give_the_same(tmp_path: Path) -> None:
    file = str(write_texts(tmp_path / "a.jsonl", 1500))
    one = made(tmp_path / "one", file, processes=1)
    two = made(tmp_path / "two", file, processes=2)
    assert rows_of(one).fingerprint == rows_of(two).fingerprint
    assert one.report.datasets[0].tokens == two.report.datasets[0].tokens > 20_000
    store, own = Documents.open(rows_of(two).plan.parts[0][0].directory), tokenizer(tmp_path / "own")
    sizes = [len(own(text)["input_ids"]) + 1 for text in texts(1500)]
    assert np.array_equal(store.offsets, np.cumsum([0, *sizes])), "over several units of work"


def test_chunks_are_bounded_in_bytes() -> None:
    groups = list(chunks(iter([b"x" * 400_000] * 10 + [{"text": "y" * 1_100_000}] * 2 + [b"z"] * 1100)))
    assert [len(group) for group in groups] == [3, 3, 3, 2, 1, 512, 512, 76]


def test_files_of_every_kind_hold_the_same_text(tmp_path: Path) -> None:
    found = texts(40)
    write_texts(tmp_path / "a.jsonl", 40)
    write_texts(tmp_path / "b.txt", 40)
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("\n\n".join(found))
    pq.write_table(pa.table({"content": found, "url": ["x"] * 40}), tmp_path / "d.parquet", row_group_size=7)
    (tmp_path / "e.json").write_text(json.dumps([{"document": text} for text in found]))
    pq.write_table(pa.table({"story": found}), tmp_path / "f.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for part in (0, 1):
        (folder / f"{part}.txt").write_text("\n".join(found[20 * part : 20 * part + 20]))
    names = ("a.jsonl", "b.txt", "c.txt.gz", "d.parquet", "e.json", "folder")
    prints = {rows_of(made(tmp_path, str(tmp_path / name))).fingerprint for name in names}
    prints.add(rows_of(made(tmp_path, str(tmp_path / "f.parquet"), columns='{"story": "text"}')).fingerprint)
    assert len(prints) == 1
    front = made(tmp_path, f"{tmp_path / 'a.jsonl'}#25")
    assert front.report.datasets[0].rows == 25, "the first N documents"
    assert "#50 asks for more" in made(tmp_path, f"{tmp_path / 'a.jsonl'}#50").report.datasets[0].files[0]


def test_hubs_and_registered_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of a hub, beside a name of one's own; conversations that are built in are none of them."""
    from datasets import Dataset

    from megaswift.data import hubs

    found, asked = texts(40), []

    def first(places: Any, subsets: Any, splits: Any, name: str, streaming: bool) -> Any:
        asked.append((places, subsets))
        return ("hf", "owner/name"), [Dataset.from_list([{"content": text, "id": None} for text in found])]

    monkeypatch.setattr(hubs, "_first", first)
    path = write_texts(tmp_path / "a.jsonl", 40)
    wanted = rows_of(made(tmp_path, str(path))).fingerprint
    data = made(tmp_path, "HF::owner/name:en")
    assert rows_of(data).fingerprint == wanted and asked == [((("hf", "owner/name"),), ("en",))]
    assert data.report.datasets[0].place == "Hugging Face owner/name" and not data.report.from_cache
    assert made(tmp_path, "HF::owner/name:en").report.from_cache
    own = json.dumps({"ours": {"path": str(path)}})
    blend = made(tmp_path, "ours:0.5", "HF::owner/name#10:0.5", custom_dataset_info=own)
    assert [entry.rows for entry in blend.report.datasets] == [40, 10] and len(rows_of(blend).plan.counts) == 2
    with pytest.raises(UserError, match="self-cognition holds conversations"):
        made(tmp_path, "self-cognition")


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [{"text": text} for text in texts(50)]
    bad: list[Any] = [{"text": "  "}, {"text": 3}, {"query": "a", "response": "b"}, {"text": "\ud800"}, ["text"]]
    lines = [json.dumps(row) for row in [*rows[:10], *bad, *rows[10:]]]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    data = made(tmp_path, str(tmp_path / "a.jsonl"))
    [entry] = data.report.datasets
    assert (entry.rows, entry.usable) == (56, 50)
    assert {reason: item.count for reason, item in entry.dropped.items()} == {
        "empty content": 1, "wrong type": 1, "no text": 1, "lone surrogate": 1, "not a JSON object": 1, "not JSON": 1,
    }  # fmt: skip
    assert entry.dropped["no text"].places == [
        "a.jsonl: row 13 (columns: query, response; conversations are trained by swift sft)"
    ]
    with pytest.raises(DataError, match="bad row: empty content") as caught:
        made(tmp_path, str(tmp_path / "a.jsonl"), strict=True)
    assert caught.value.where == "a.jsonl: row 11"
    (tmp_path / "b.jsonl").write_text('{"story": "no column of ours"}\n')
    with pytest.raises(DataError, match=r"no usable text: 1 x no text, first at b\.jsonl: row 1"):
        made(tmp_path, str(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="no row has the column 'tale'"):
        made(tmp_path, str(tmp_path / "a.jsonl"), columns='{"tale": "text"}')
    (tmp_path / "c.jsonl").write_text('{"text": "short"}\n')
    [_, short] = made(tmp_path, str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl")).report.datasets
    assert short.files == ["it has fewer tokens than one row of 32, so nothing of it is trained on"]
    with pytest.raises(DataError, match=r"c\.jsonl has \d tokens for training, fewer than one row of 32"):
        made(tmp_path, f"{tmp_path / 'a.jsonl'}:0.5", f"{tmp_path / 'c.jsonl'}:0.5")
    with pytest.raises(DataError, match="fewer than one row of 5,000"):
        made(tmp_path, str(tmp_path / "b.jsonl"), max_length=5000, columns='{"story": "text"}')


def test_control_tokens_in_text(tmp_path: Path) -> None:
    """They are tokens, and counted; on demand they are characters. An end that the text has is not doubled."""
    found = ["one<|im_start|>two", "three<|im_end|>", "four<|im_end|>five"] * 30
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    data = made(tmp_path, str(tmp_path / "a.jsonl"))
    assert data.report.datasets[0].control_tokens == {"<|im_start|>": 30, "<|im_end|>": 30}
    store = Documents.open(rows_of(data).plan.parts[0][0].directory)
    assert (np.asarray(store.tokens) == END).sum() == 120
    data = made(tmp_path, str(tmp_path / "a.jsonl"), parse_special_tokens=False)
    store = Documents.open(rows_of(data).plan.parts[0][0].directory)
    assert (np.asarray(store.tokens) == END).sum() == 90 and not data.report.datasets[0].control_tokens


def test_the_last_documents_validate(tmp_path: Path) -> None:
    """Whole ones, enough for a row; or all of what is named for it. None where that would be more than half."""
    file = str(write_texts(tmp_path / "a.jsonl", 60))
    data = made(tmp_path, file, dataset_test_ratio=0.1)
    [train], [val] = (rows.plan.parts[0] for rows in (rows_of(data), data.val) if isinstance(rows, TextRows))
    store = Documents.open(train.directory)
    assert train.last == val.first and val.last == store.offsets[-1] and val.first in store.offsets
    assert 0.1 <= (val.last - val.first) / val.last < 0.2
    entry = data.report.datasets[0]
    assert entry.train + entry.val == 60 and entry.val == (np.asarray(store.offsets[:-1]) >= val.first).sum()
    assert data.val is not None and len(data.val) == len(data.val.lengths) == (val.last - val.first) // 32
    assert [expected(data.val, row)[0][0] for row in range(2)] == [store.tokens[val.first], store.tokens[val.first + 32]]
    small = made(tmp_path, file, max_length=3000)
    assert small.val is None and made(tmp_path, file, max_length=3000, dataset_test_ratio=0.001).val is None
    other = str(write_texts(tmp_path / "b.txt", 20, 5))
    data = made(tmp_path, file, val_dataset=[other], dataset_test_ratio=0.1)
    assert data.val is not None and isinstance(data.val, TextRows)
    assert (
        Documents.open(data.val.plan.parts[0][0].directory).path != store.path
        and rows_of(data).plan.parts[0][0].last == val.last
    )


def test_what_was_tokenized_is_used_until_the_file_changes(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", 60)
    first = made(tmp_path, str(path))
    assert not first.report.from_cache and made(tmp_path, str(path), max_length=40).report.from_cache
    write_texts(path, 61)
    assert not made(tmp_path, str(path)).report.from_cache
    before = len(list((tmp_path / "cache" / "text").iterdir()))
    assert not made(tmp_path, str(path), data_cache=False).report.from_cache
    assert len(list((tmp_path / "cache" / "text").iterdir())) == before + 1, "until the process ends"
    rows = rows_of(made(tmp_path, str(path)))
    with (Path(rows.plan.parts[0][0].directory) / "tokens.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(DataError, match=r"tokens.bin has \d+ bytes, expected"):
        open_rows(rows.path)
