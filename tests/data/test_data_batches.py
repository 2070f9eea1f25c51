"""The order of rows and the tensors of micro batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaswift.data.batches import Batches, EvalBatches, MicroBatch, _end_to_end, _padded, prefetch
from megaswift.data.store import RowWriter, TokenRows
from megaswift.data.tokens import Encoded
from megaswift.errors import DataError, UserError

torch.set_num_threads(1)


def make_rows(path: Path, sizes: list[int], bounds: list[int] | None = None) -> TokenRows:
    """Row r holds tokens 100 r, 100 r + 1, ...; the first half of each carries no loss."""
    writer = RowWriter(path)
    for row, size in enumerate(sizes):
        writer.add(np.arange(size, dtype=np.int32) + 100 * row, np.arange(size) >= size // 2, [size])
    writer.finish(np.arange(len(sizes)), None if bounds is None else np.array(bounds))
    return TokenRows.open(path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    return make_rows(tmp_path_factory.mktemp("rows") / "r", (np.random.default_rng(0).integers(2, 60, 50)).tolist())


def batches(rows: TokenRows, **options: Any) -> Batches:
    return Batches(
        rows, **{"micro_batch_size": 2, "global_batch_size": 8, "dp_rank": 0, "dp_size": 1, "seed": 3, "pad_id": 0, **options}
    )


def everything(micros: list[MicroBatch]) -> list[int]:
    return sorted(row for micro in micros for row in micro.sample_ids)


def test_each_epoch_sees_every_row_once(rows: TokenRows) -> None:
    stream = np.concatenate([batches(rows).sample_ids(step) for step in range(25)])  # 4 epochs of 50 rows
    for epoch in stream.reshape(4, 50):
        assert sorted(epoch) == list(range(50))
    assert (stream[:50] != stream[50:100]).any()
    other = np.concatenate([batches(rows, seed=4).sample_ids(step) for step in range(25)])
    assert (other != stream).reshape(4, 50).any(axis=1).all(), "the seed moves every epoch, not the first alone"
    assert np.concatenate([batches(rows, shuffle=False).sample_ids(step) for step in range(7)])[:50].tolist() == list(range(50))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dp=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2]),
    step=st.integers(0, 40),
    by_length=st.booleans(),
    free=st.booleans(),
)
def test_a_step_sees_the_same_rows_in_every_layout(
    rows: TokenRows, dp: int, micro: int, step: int, by_length: bool, free: bool
) -> None:
    parts = [
        batches(rows, dp_rank=rank, dp_size=dp, micro_batch_size=micro, group_by_length=by_length, padding_free=free).step(step)
        for rank in range(dp)
    ]
    assert {len(part) for part in parts} == {8 // (micro * dp)}
    found = sorted(row for part in parts for micro_batch in part for row in micro_batch.sample_ids)
    assert found == sorted(batches(rows, group_by_length=by_length).sample_ids(step))


def test_any_step_can_be_asked_for_first(rows: TokenRows) -> None:
    going = batches(rows)
    for step in range(20):
        last = going.step(step)
    for one, other in zip(last, batches(rows).step(19), strict=True):
        assert one.sample_ids == other.sample_ids and torch.equal(one.tokens, other.tokens)


def test_end_to_end_rows(rows: TokenRows) -> None:
    for micro in batches(rows, pad_multiple=8).step(0):
        assert micro.cu_seqlens is not None and micro.cu_seqlens.dtype == torch.int32
        assert micro.tokens.shape == micro.labels.shape == micro.position_ids.shape == (1, int(micro.cu_seqlens[-1]))
        assert micro.tokens.shape[1] % 8 == 0 and micro.tokens.dtype == micro.labels.dtype == torch.int64
        borders = micro.cu_seqlens.tolist()
        for row, first, last in zip([*micro.sample_ids, None], borders, borders[1:], strict=False):
            labels, positions = micro.labels[0, first:last], micro.position_ids[0, first:last]
            assert positions.tolist() == list(range(last - first))
            if row is None:  # the padded tail
                assert (labels == -100).all()
                continue
            ids, expected = rows[row]
            assert micro.tokens[0, first:last].tolist() == ids.tolist()
            assert labels.tolist() == [*expected[1:].tolist(), -100]


def test_padded_rows(rows: TokenRows) -> None:
    for micro in batches(rows, padding_free=False, pad_multiple=4).step(1):
        assert micro.cu_seqlens is None and micro.tokens.shape[0] == 2 and micro.tokens.shape[1] % 4 == 0
        assert micro.tokens.shape[1] - rows.lengths[list(micro.sample_ids)].max() < 4
        for k, row in enumerate(micro.sample_ids):
            ids, expected = rows[row]
            assert micro.tokens[k, : len(ids)].tolist() == ids.tolist() and (micro.tokens[k, len(ids) :] == 0).all()
            assert micro.labels[k].tolist() == [*expected[1:].tolist(), *[-100] * (micro.tokens.shape[1] - len(ids) + 1)]


def test_one_row_is_a_plain_causal_row(rows: TokenRows) -> None:
    micro = batches(rows, micro_batch_size=1, pad_multiple=8).step(0)[0]
    assert micro.cu_seqlens is None and micro.tokens.shape[1] % 8 == 0


def test_packed_rows_keep_their_samples_apart(tmp_path: Path) -> None:
    packed = make_rows(tmp_path / "p", [5, 6, 7, 8], bounds=[0, 2, 4])
    assert packed.packed and packed.lengths.tolist() == [11, 15]
    for free in (True, False):
        micro = batches(packed, micro_batch_size=1, global_batch_size=2, padding_free=free, shuffle=False).step(0)[1]
        assert micro.cu_seqlens is not None and micro.cu_seqlens.tolist() == [0, 5, 11] and micro.sample_ids == (0,)
        assert micro.labels[0, 4] == -100 and micro.labels[0, 10] == -100
        assert micro.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("free", [True, False])
def test_no_token_learns_the_first_one_of_the_next_sample(tmp_path: Path, free: bool) -> None:
    """Samples whose first token has loss, as text rows and the pieces of split rows have: nothing predicts it."""
    writer = RowWriter(tmp_path / "w")
    sizes = [3, 1, 4, 2]
    for number, size in enumerate(sizes):
        writer.add(np.arange(size, dtype=np.int32) + 10 * (number + 1), np.ones(size, bool), [size])
    for bounds in (None, np.array([0, 4])):
        writer.finish(np.arange(4), bounds)
        data = TokenRows.open(tmp_path / "w")
        many = 4 if bounds is None else 1
        options = {"micro_batch_size": many, "global_batch_size": many, "padding_free": free, "shuffle": False}
        [micro] = batches(data, **options).step(0)
        expected = {
            10 * (number + 1) + place: 10 * (number + 1) + place + 1
            for number, size in enumerate(sizes)
            for place in range(size - 1)
        }
        for token, label in zip(micro.tokens.flatten().tolist(), micro.labels.flatten().tolist(), strict=True):
            assert label == expected.get(token, -100)


@pytest.mark.parametrize("free", [True, False])
def test_each_label_has_its_weight(free: bool) -> None:
    """A label's weight is that of the token that is predicted; where there is no label it is 0, also beside samples without any."""
    own = Encoded(np.arange(5, dtype=np.int32), np.array([0, 1, 1, 0, 1], bool), np.array([9, 2, 3, 8, 4], np.float32))
    plain = Encoded(np.arange(10, 13, dtype=np.int32), np.array([0, 1, 1], bool))
    micro = (_end_to_end if free else _padded)([own, plain], (0, 1), 4, 0)
    wanted = {1: 2.0, 2: 3.0, 4: 4.0, 11: 1.0, 12: 1.0}
    assert micro.weights is not None and micro.weights.shape == micro.labels.shape
    found = list(zip(micro.labels.flatten().tolist(), micro.weights.flatten().tolist(), strict=True))
    assert all(weight == wanted.get(label, 0.0) for label, weight in found)
    assert [label for label, _ in found if label >= 0] == list(wanted)


def test_micro_batches_are_balanced(rows: TokenRows) -> None:
    free = [micro.tokens.shape[1] for micro in batches(rows, micro_batch_size=4).step(0)]
    assert max(free) - min(free) < 60 and max(free) < 1.3 * min(free)
    padded = batches(rows, micro_batch_size=4, padding_free=False).step(0)
    in_order = [rows.lengths[batches(rows).sample_ids(0)[k : k + 4]].max() for k in (0, 4)]
    assert sum(micro.tokens.shape[1] for micro in padded) <= sum(in_order)


def test_group_by_length(rows: TokenRows) -> None:
    grouped, plain = batches(rows, group_by_length=True), batches(rows)
    spread = [sum(np.ptp(rows.lengths[source.sample_ids(step)]) for step in range(6)) for source in (grouped, plain)]
    assert spread[0] < spread[1] / 3
    assert sorted(np.concatenate([grouped.sample_ids(step) for step in range(25)]).tolist()) == sorted(list(range(50)) * 4)


@pytest.mark.parametrize(("dp", "micro", "size"), [(1, 1, 8), (2, 2, 8), (4, 1, 16), (2, 4, 64)])
def test_evaluation_sees_each_row_once(rows: TokenRows, dp: int, micro: int, size: int) -> None:
    ranks = [
        EvalBatches(rows, micro_batch_size=micro, global_batch_size=size, dp_rank=rank, dp_size=dp, pad_id=0, pad_multiple=4)
        for rank in range(dp)
    ]
    assert {len(rank) for rank in ranks} == {-(-50 // size)}
    seen = []
    for rank in ranks:
        for step in range(len(rank)):
            micros = rank.step(step)
            assert len(micros) == size // (micro * dp)
            for item in micros:
                assert item.tokens.shape[1] % 4 == 0
                if not item.sample_ids:
                    assert (item.labels == -100).all()
            seen += everything(micros)
    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_prefetch(rows: TokenRows, threads: int) -> None:
    source = batches(rows)
    found = list(prefetch(source, 3, 9, threads))
    assert [step for step, _ in found] == list(range(3, 9))
    assert [everything(micros) for _, micros in found] == [sorted(source.sample_ids(step)) for step in range(3, 9)]
    assert list(prefetch(source, 5, 5, threads)) == []
    stream = prefetch(source, 0, 1000, threads)
    next(stream)
    stream.close()


def test_errors_of_a_thread_arrive(rows: TokenRows, monkeypatch: pytest.MonkeyPatch) -> None:
    source = batches(rows)
    monkeypatch.setattr(source, "step", lambda step: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        list(prefetch(source, 0, 3, 1))


def test_sizes_that_cannot_work(rows: TokenRows) -> None:
    with pytest.raises(UserError, match="16 or 24"):
        batches(rows, global_batch_size=18, micro_batch_size=4, dp_size=2)
    with pytest.raises(DataError, match="50 training rows are fewer"):
        batches(rows, global_batch_size=64)


def test_fingerprint(rows: TokenRows, tmp_path: Path) -> None:
    sizes = [5, 6, 7, 8]
    base = make_rows(tmp_path / "a", sizes)
    assert base.fingerprint == make_rows(tmp_path / "b", sizes).fingerprint
    assert base.fingerprint != make_rows(tmp_path / "c", sizes[::-1]).fingerprint
    assert base.fingerprint != make_rows(tmp_path / "d", sizes, bounds=[0, 2, 4]).fingerprint
    assert batches(rows).fingerprint == batches(rows, dp_rank=1, dp_size=2).fingerprint != batches(rows, seed=4).fingerprint
