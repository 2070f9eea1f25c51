"""Arrangements of rows as properties: every form there and back, cut and merged, whatever its sizes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswift.models.kinds import Kind
from megaswift.models.parameters import Arrangement, by_key, fused, grouped, halves, rearranged, stacked, whole
from megaswift.models.rules import Rule, Sizes, expanded, is_mixed

Form = tuple[Arrangement, list[int]]  # and the rows of its Hugging Face tensors


@st.composite
def forms(draw: st.DrawFn) -> Form:
    """Any arrangement that a rule makes; all its sizes can be cut by 4."""
    kind = draw(st.sampled_from(("whole", "stacked", "grouped")))
    if kind == "whole":
        rows = [4 * draw(st.integers(1, 5))]
        return whole(rows[0], draw(st.sampled_from((None, 0, 1)))), rows
    if kind == "stacked":
        rows = [4 * draw(st.integers(1, 5)) for _ in range(draw(st.integers(2, 3)))]
        arrangement = stacked(*rows)
    else:
        groups, heads, size = 4 * draw(st.integers(1, 2)), draw(st.integers(1, 3)), 2 * draw(st.integers(2, 4))
        rows = [groups * heads * size, groups * size, groups * size]
        arrangement = grouped(groups, heads * size, size, size)
        if draw(st.booleans()):
            first = draw(st.integers(0, size - 2))
            width = 2 * draw(st.integers(1, (size - first) // 2))
            arrangement = rearranged(arrangement, halves(groups, size, width, first), (0, 1))
    if draw(st.booleans()):
        return fused(arrangement, rows), [sum(rows)]
    return arrangement, rows


@settings(max_examples=200, deadline=None)
@given(forms(), st.sampled_from((1, 2, 4)), st.data())
def test_there_and_back(form: Form, tp: int, data: st.DataObject) -> None:
    arrangement, rows = form
    values = torch.arange(4 * sum(rows)).view(-1, 4)
    parts = list(values.split(rows))
    packed = arrangement.pack(parts)
    assert len(packed) == arrangement.size == sum(rows)
    assert sorted(packed.flatten().tolist()) == values.flatten().tolist()  # every row once
    assert all(torch.equal(*pair) for pair in zip(arrangement.unpack(packed), parts, strict=True))

    shards = arrangement.shard(packed, tp)
    assert len(shards) == tp and len({shard.shape for shard in shards}) == 1
    assert shards[0].numel() * (1 if arrangement.split is None else tp) == packed.numel()
    assert torch.equal(arrangement.merge(shards), packed)

    first = data.draw(st.integers(0, len(packed) - 1))
    last = data.draw(st.integers(first + 1, len(packed)))
    pieces = [parts[piece.tensor][piece.first : piece.last : piece.step] for piece in arrangement.rows(first, last)]
    assert torch.equal(torch.cat(pieces), packed[first:last])
    for number, part in enumerate(parts):
        run = arrangement.run(number)
        assert run is None or torch.equal(packed[slice(*run)], part)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 99), st.sampled_from((torch.float32, torch.bfloat16)))
def test_rearranged_heads_rotate_as_in_transformers(heads: int, quarter: int, seed: int, dtype: torch.dtype) -> None:
    """ERNIE's rotation of neighbours, rearranged, is our rotation by halves of rearranged heads: to the bit, by fp32 tables."""
    from transformers.models.ernie4_5.modeling_ernie4_5 import apply_rotary_pos_emb

    from megaswift.megatron.kernels.rope import rotate

    size = 4 * quarter
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, heads, 5, size, generator=generator).to(dtype)
    angles = torch.rand(1, 5, size // 2, generator=generator).repeat(1, 1, 2)
    arrangement = rearranged(whole(heads * size), halves(heads, size), [0])

    def by_halves(x: torch.Tensor) -> torch.Tensor:  # [1, heads, s, d] to [s, 1, heads, d]
        return arrangement.pack([x.transpose(2, 3).flatten(1, 2)[0]]).unflatten(0, (heads, size)).permute(2, 0, 1).unsqueeze(1)

    theirs, _ = apply_rotary_pos_emb(query, query, angles.cos(), angles.sin())
    ours = rotate(by_halves(query), *(table.transpose(0, 1) for table in (angles.cos(), angles.sin())))
    assert ours.dtype == dtype and torch.equal(by_halves(theirs), ours)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=5), st.integers(1, 3), st.booleans(), st.booleans())
def test_places_cover_every_tensor_once(dense: list[bool], experts: int, one_tensor: bool, transposed: bool) -> None:
    """Experts in layers that have them, as one tensor of the folder or each as its own, under stacked or single keys."""
    kinds = [Kind(mlp="gated" if one else "experts") for one in dense]
    hf = "l.{i}.up" if one_tensor else "l.{i}.e.{e}.up"
    rules = (
        Rule("decoder.layers.{i}.norm.weight", ("l.{i}.norm",), lambda sizes: [(4,)], lambda sizes: whole(4)),
        Rule(
            "decoder.layers.{i}.mlp.{e}.up.weight", (hf,), lambda sizes: [(6, 4)], lambda sizes: whole(6, 0),
            layers=lambda kind: kind.mlp == "experts", stacked=one_tensor, transposed=transposed,
        ),
    )  # fmt: skip
    sizes = Sizes(len(kinds), 4, 1, 1, 4, 6, 8, {"experts": experts})
    parameters = expanded(rules, sizes, kinds)
    mixed = is_mixed(rules, kinds)
    assert mixed == (len(set(dense)) == 2)
    assert len(parameters) == len(dense) + experts * dense.count(False)
    places = [(parameter.key, *parameter.place) for parameter in parameters]
    assert len(set(places)) == len(places) and all(key.count(".{") == 0 for key, *_ in places)
    for key, parameter in by_key(parameters).items():
        assert (f"layers.{parameter.name.split('.')[2]}." in key) == mixed
        own = {one.place for one in parameters if one.key == key}
        assert len(own) == torch.Size(parameter.counts).numel(), "every place of the checkpoint's tensor is held"
    stored = {part.name: torch.randn(part.stored_shape) for parameter in parameters for part in parameter.hf}
    for parameter in parameters:
        part = parameter.hf[0]
        value = part.of(stored[part.name])
        assert tuple(value.shape) == part.shape == parameter.shape
        inside = stored[part.name] if part.index is None else stored[part.name][part.index]
        assert torch.equal(part.stored(value), inside)


def test_parts_of_a_stacked_tensor_are_planned_as_one() -> None:
    """A tensor of the folder that holds all experts is made of all its parameters, in their order, whatever the reader's form."""
    from megaswift.weights.convert import FiniteCheck, Precisions
    from megaswift.weights.convert.to_hf import _planned, _Source

    rule = Rule(
        "decoder.layers.{i}.mlp.{e}.fc1.weight", ("l.{i}.gate", "l.{i}.up"), lambda sizes: [(3, 2)] * 2,
        lambda sizes: stacked(3, 3), stacked=True, transposed=True,
    )  # fmt: skip
    parameters = expanded((rule,), Sizes(1, 2, 1, 1, 2, 3, 8, {"experts": 3}), [Kind()])
    values = {parameter.place: torch.randn(6, 2) for parameter in parameters}
    released: list[tuple[int, ...]] = []
    reader = SimpleNamespace(
        read=lambda key, place, rows=None: values[place] if rows is None else values[place][slice(*rows)],
        prefetch=lambda key, place: None,
        release=lambda key, place: released.append(place),
    )
    sources = [_Source(reader, parameter) for parameter in parameters]
    for number, half in enumerate((slice(0, 3), slice(3, 6))):
        planned = _planned(f"l.0.{number}", [(source, number) for source in sources], Precisions(torch.float32), FiniteCheck())
        assert planned.shape == (3, 2, 3)
        assert torch.equal(planned.produce(), torch.stack([values[0, expert][half].T for expert in range(3)]))
        planned.release()
    assert released == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("tp", [1, 2])
def test_rows_of_some_tensors(tp: int) -> None:
    """What `only` leaves is what the others leave free, and `turns` and `places` say where a rank finds it."""
    for arrangement in (grouped(4, 6, 2, 2), stacked(8, 8), rearranged(grouped(2, 8, 4, 4), halves(4, 4), (0, 1)), whole(8, 0)):
        parts = [torch.arange(rows * 2).view(rows, 2) + 1000 * n for n, rows in enumerate(_counts(arrangement))]
        full = arrangement.pack(parts)
        for tensors in [(n,) for n in range(len(parts))] + [tuple(range(len(parts)))]:
            own = arrangement.only(tensors)
            packed = own.pack([parts[n] for n in tensors])
            wanted = torch.cat([row[None] for row in full if int(row[0]) // 1000 in tensors])
            assert torch.equal(packed, wanted)
            for rank, piece in enumerate(arrangement.shard(full, tp)):
                groups, turn = arrangement.turns(tp)
                kinds = [tensor for tensor, count in turn for _ in range(count)] * groups
                assert (piece[:, 0] // 1000).tolist() == kinds
                for first, start, count in arrangement.places(tp, rank):
                    assert torch.equal(piece[first : first + count], full[start : start + count])
                assert sum(count for *_, count in arrangement.places(tp, rank)) == len(piece)


def _counts(arrangement: Arrangement) -> list[int]:
    numbers = sorted({piece.tensor for piece in arrangement.pieces})
    return [sum(piece.count for piece in arrangement.pieces if piece.tensor == number) for number in numbers]
