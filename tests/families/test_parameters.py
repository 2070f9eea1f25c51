"""The list of a model's tensors: arrangements of rows by hand, and forms that no family of today has, there and back bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests import tiny

from megaswift.errors import DataError
from megaswift.models import families, parameters_of
from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, sizes_of
from megaswift.models.kinds import Kind
from megaswift.models.parameters import (
    Arrangement,
    Parameter,
    by_key,
    fused,
    grouped,
    halves,
    hf_shapes,
    rearranged,
    stacked,
    whole,
)
from megaswift.models.rules import Rule, Sizes, copy, expanded, vocab
from megaswift.weights.convert import Precisions, hf_to_megatron, planned_hf_tensors, verify_round_trip, verify_written
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader

# The arrangement, rows of its Hugging Face tensors, and of which of all these rows, one tensor below the other, it is made.
BY_HAND: dict[str, tuple[Arrangement, tuple[int, ...], list[int]]] = {
    "whole": (whole(4, 0), (4,), [0, 1, 2, 3]),
    "stacked": (stacked(2, 4), (2, 4), [0, 1, 2, 3, 4, 5]),
    "grouped": (grouped(2, 2, 1, 1), (4, 2, 2), [0, 1, 4, 6, 2, 3, 5, 7]),
    "by halves": (rearranged(whole(8, 0), halves(2, 4), [0]), (8,), [0, 2, 1, 3, 4, 6, 5, 7]),
    "middle by halves": (rearranged(whole(8), halves(1, 8, 4, 2), [0]), (8,), [0, 1, 2, 4, 3, 5, 6, 7]),
    "one of several": (rearranged(stacked(4, 4), halves(1, 4), [1]), (4, 4), [0, 1, 2, 3, 4, 6, 5, 7]),
    "fused": (fused(stacked(2, 4), (2, 4)), (6,), [0, 1, 2, 3, 4, 5]),
    "fused groups": (fused(grouped(2, 2, 1, 1), (4, 2, 2)), (8,), [0, 1, 4, 6, 2, 3, 5, 7]),
    "fused by halves": (
        fused(rearranged(grouped(2, 4, 4), halves(1, 4), [0]), (8, 8)),
        (16,),
        [0, 2, 1, 3, 8, 9, 10, 11, 4, 6, 5, 7, 12, 13, 14, 15],
    ),
}
# Rows that each of two tensor-parallel ranks holds.
SHARDS = {
    "whole": ([0, 1], [2, 3]),
    "stacked": ([0, 2, 3], [1, 4, 5]),
    "grouped": ([0, 1, 4, 6], [2, 3, 5, 7]),
    "fused": ([0, 2, 3], [1, 4, 5]),
}


def parts_of(rows: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors of two columns in which every value is another."""
    return list(torch.arange(2.0 * sum(rows)).view(-1, 2).split(rows))


@pytest.mark.parametrize("name", BY_HAND)
def test_rows_by_hand(name: str) -> None:
    arrangement, rows, wanted = BY_HAND[name]
    parts = parts_of(rows)
    expected = torch.cat(parts)[wanted]
    packed = arrangement.pack(parts)
    assert arrangement.size == len(wanted) and torch.equal(packed, expected)
    padded = torch.cat([packed, torch.full((3, 2), -1.0)])  # vocabulary padding
    for value in (packed, padded) if name == "whole" else (packed,):
        assert all(torch.equal(one, part) for one, part in zip(arrangement.unpack(value), parts, strict=True))
    for first in range(len(wanted) + 1):
        for last in range(first, len(wanted) + 1):
            pieces = [parts[piece.tensor][piece.first : piece.last : piece.step] for piece in arrangement.rows(first, last)]
            assert torch.equal(torch.cat([expected[:0], *pieces]), expected[first:last]), (first, last)
    for number, part in enumerate(parts):
        run = arrangement.run(number)
        contiguous = any(torch.equal(expected[k : k + len(part)], part) for k in range(len(wanted) - len(part) + 1))
        assert (run is not None) == contiguous
        assert run is None or torch.equal(expected[slice(*run)], part)


@pytest.mark.parametrize("name", SHARDS)
def test_what_each_rank_holds(name: str) -> None:
    arrangement, rows, _ = BY_HAND[name]
    parts = parts_of(rows)
    whole_one = arrangement.pack(parts)
    shards = arrangement.shard(whole_one, 2)
    assert all(torch.equal(shard, torch.cat(parts)[list(wanted)]) for shard, wanted in zip(shards, SHARDS[name], strict=True))
    assert torch.equal(arrangement.merge(shards), whole_one)
    columns, everywhere = whole(4, 1), whole(4)
    assert [shard.shape for shard in columns.shard(whole_one[:4], 2)] == [(4, 1)] * 2
    assert torch.equal(columns.merge(columns.shard(whole_one[:4], 2)), whole_one[:4])
    assert all(torch.equal(shard, whole_one) for shard in everywhere.shard(whole_one, 2))
    assert torch.equal(everywhere.merge([whole_one, whole_one]), whole_one)


def test_halves_are_the_rotation_by_neighbours() -> None:
    """Rotating a head's neighbouring rows, and then rearranging, is rearranging and then rotating its halves."""
    torch.manual_seed(0)
    head, angle = torch.randn(8), torch.tensor([0.3, 0.7, 1.1])
    cosine, sine = angle.cos(), angle.sin()
    one, other = head[1:7:2], head[2:7:2]
    turned = head.clone()
    turned[1:7:2], turned[2:7:2] = one * cosine - other * sine, other * cosine + one * sine
    order = rearranged(whole(8), halves(1, 8, 6, 1), [0])
    mine = order.pack([head])
    first, second = mine[1:4], mine[4:7]
    by_halves = torch.cat([mine[:1], first * cosine - second * sine, second * cosine + first * sine, mine[7:]])
    assert torch.allclose(order.pack([turned]), by_halves)
    for wrong in ((1, 7, None, 0), (1, 8, 3, 0), (1, 8, 6, 4), (0, 8, None, 0)):
        with pytest.raises(ValueError, match="do not fit heads"):
            halves(*wrong)


class Odd(Family):
    """What experts, mixed stacks and fused matrices will need: one dense layer, then three experts a layer, held as one tensor."""

    def parameters(self, config: Any) -> list[Parameter]:
        return expanded(self.rules, replace(sizes_of(config), more={"experts": 3}), self.layers(config))


def _experts(name: str, hf: tuple[str, ...], arrangement: Any, **more: Any) -> Rule:
    shape = lambda sizes: [(sizes.ffn, sizes.hidden)] * len(hf)  # noqa: E731
    return Rule(f"decoder.layers.{{i}}.mlp.{name}", hf, shape, arrangement, layers=lambda kind: kind.mlp == "experts", **more)


def _qkv(sizes: Sizes) -> Arrangement:
    rows = (sizes["q_rows"], sizes["kv_rows"], sizes["kv_rows"])
    apart = grouped(sizes.kv_heads, rows[0] // sizes.kv_heads, sizes.head_dim, sizes.head_dim)
    return fused(rearranged(apart, halves(sizes.heads, sizes.head_dim), [0, 1]), rows)


ODD = Odd(
    "odd",
    ("llama",),
    (
        vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Rule(
            "decoder.layers.{i}.self_attention.linear_qkv.weight",
            ("model.layers.{i}.qkv.weight",),
            lambda sizes: [(sizes["q_rows"] + 2 * sizes["kv_rows"], sizes.hidden)],
            _qkv,
        ),
        copy("decoder.layers.{i}.input_layernorm.weight", "model.layers.{i}.norm.weight", ("hidden",)),
        replace(copy("decoder.layers.{i}.mlp.dense.weight", "model.layers.{i}.dense.weight", ("ffn", "hidden")), layers=lambda kind: kind.mlp == "gated"),
        _experts(
            "experts.{e}.linear_fc1.weight",
            ("model.layers.{i}.experts.gate", "model.layers.{i}.experts.up"),
            lambda sizes: stacked(sizes.ffn, sizes.ffn),
            stacked=True,
            transposed=True,
        ),
        _experts("shared.{e}.weight", ("model.layers.{i}.shared.{e}.weight",), lambda sizes: whole(sizes.ffn, 0)),
        copy("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    ),
    LLAMA.settings,
    LLAMA.tiny,
    lambda config, layer: Kind(mlp="experts" if layer else "gated"),
)  # fmt: skip


def test_names_and_places() -> None:
    parameters = ODD.parameters(tiny.tiny_config("llama", num_hidden_layers=2))
    keys = by_key(parameters)
    assert {key: (parameter.counts, parameter.shape) for key, parameter in keys.items()} == {
        "embedding.word_embeddings.weight": ((), (131, 64)),
        "decoder.layers.0.self_attention.linear_qkv.weight": ((), (128, 64)),
        "decoder.layers.0.input_layernorm.weight": ((), (64,)),
        "decoder.layers.0.mlp.dense.weight": ((), (96, 64)),
        "decoder.layers.1.self_attention.linear_qkv.weight": ((), (128, 64)),
        "decoder.layers.1.input_layernorm.weight": ((), (64,)),
        "decoder.layers.1.mlp.experts.linear_fc1.weight": ((3,), (192, 64)),
        "decoder.layers.1.mlp.shared.weight": ((3,), (96, 64)),
        "decoder.final_layernorm.weight": ((), (64,)),
    }
    last = [parameter for parameter in parameters if parameter.key.endswith("linear_fc1.weight")][-1]
    assert (last.name, last.place, last.offset) == ("decoder.layers.1.mlp.experts.2.linear_fc1.weight", (2,), (2, 0, 0))
    assert last.global_shape == (3, 192, 64) and last.labels == [
        "model.layers.1.experts.gate[2]",
        "model.layers.1.experts.up[2]",
    ]
    shapes = hf_shapes(parameters)
    assert shapes["model.layers.1.experts.gate"] == (3, 64, 96) and shapes["model.layers.1.shared.0.weight"] == (96, 64)
    plain = LLAMA.parameters(tiny.tiny_config("llama", num_hidden_layers=2))
    assert {(p.place, p.counts) for p in plain if p.key == "decoder.layers.mlp.linear_fc2.weight"} == {
        ((0,), (2,)),
        ((1,), (2,)),
    }


def test_other_forms_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts held as one transposed tensor, a fused matrix in another order, layers that differ: every byte, by both proofs."""
    tiny.tiny_config("llama", num_hidden_layers=2).save_pretrained(tmp_path / "hf")
    monkeypatch.setitem(families(), "llama", ODD)
    config = load_config(tmp_path / "hf")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(parameters_of(config)).items()}
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    source, release = HFCheckpoint.open(tmp_path / "hf"), tmp_path / "release"
    release.mkdir()
    monkeypatch.setattr("megaswift.weights.convert.to_megatron._CHUNK_BYTES", 4096)  # blocks of rows
    precisions = Precisions(torch.float32)
    done = hf_to_megatron(source, config, release, precisions)
    reader = Reader(release)
    experts = reader.read("decoder.layers.1.mlp.experts.linear_fc1.weight", (2,))
    assert torch.equal(experts, torch.cat([tensors[f"model.layers.1.experts.{half}"][2].T for half in ("gate", "up")]))
    qkv, fused_one = reader.read("decoder.layers.1.self_attention.linear_qkv.weight"), tensors["model.layers.1.qkv.weight"]
    assert torch.equal(qkv[:4], fused_one[[0, 2, 4, 6]]) and not torch.equal(qkv, fused_one)
    back = {planned.name: planned.produce() for planned in planned_hf_tensors(reader, config, precisions)}
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], value) for name, value in tensors.items())
    assert verify_round_trip(reader, config, done.tensors, precisions) == len(tensors)
    assert verify_written(source, reader, config, precisions) == len(tensors)
    changed = dict(tensors, **{"model.layers.1.experts.up": tensors["model.layers.1.experts.up"].clone()})
    changed["model.layers.1.experts.up"][1, 3, 5] += 1
    save_file(changed, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="is not the one in the Megatron checkpoint") as caught:
        verify_written(HFCheckpoint.open(tmp_path / "hf"), reader, config, precisions)
    assert caught.value.where == "model.layers.1.experts.gate[1]", "what is made together is named by its first part"
