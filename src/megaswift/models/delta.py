"""What families with a gated delta net share: the rules of its tensors, its sizes, and attention whose queries bring gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from megaswift.errors import UserError
from megaswift.models.experts import kind_with, only_value
from megaswift.models.kinds import GATED_DELTA, Delta, Experts, Kind
from megaswift.models.parameters import Arrangement, Piece, Shape
from megaswift.models.rules import Rule, Sizes, copy

LINEAR_ATTENTION = "linear_attention"  # in layer_types
DELTA_FIELDS = frozenset(
    "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim "
    "full_attention_interval".split()
)
# What configs of Qwen3.5 say of what transformers computes anyway, and of layers that predict further ahead (`models/prediction.py`).
_SAID_ANYWAY = {"attn_output_gate": True, "output_gate_type": "swish", "mamba_ssm_dtype": "float32"}
PUBLISHED_FIELDS = frozenset((*_SAID_ANYWAY, "mtp_num_hidden_layers"))
_LAYER = "decoder.layers.{i}.self_attention."
_HF = "model.layers.{i}."


def has_delta(kind: Kind) -> bool:
    """Whether a layer has a gated delta net in the place of attention."""
    return kind.delta is not None


def attends(kind: Kind) -> bool:
    """Whether a layer has attention."""
    return kind.delta is None


def delta_of(config: Any) -> Delta:
    """The gated delta net of a config. Raises UserError for heads that cannot be grouped."""
    delta = Delta(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
    )
    if min(delta.key_heads, delta.heads, delta.key_dim, delta.value_dim, delta.width) < 1 or delta.heads % delta.key_heads:
        raise UserError(
            f"linear attention of {delta.heads} value heads, {delta.key_heads} key heads and the sizes {delta.key_dim}, "
            f"{delta.value_dim}, {delta.width} cannot be: value heads are a multiple of the key heads, sizes are 1 at least.",
            where="config.json: linear_num_value_heads, linear_num_key_heads",
            fix="fetch config.json again",
        )
    return delta


def kind_of(config: Any, layer: int, experts: Experts | None = None) -> Kind:
    """A layer of such a model by layer_types: a gated delta net, or attention with a gate and normed queries and keys."""
    for field, value in _SAID_ANYWAY.items():
        only_value(config, field, value)
    make = Kind if experts is None else partial(kind_with, experts)
    if config.layer_types[layer] == LINEAR_ATTENTION:
        return make(norm="zero_centred_rms", attention=GATED_DELTA, rotation=None, delta=delta_of(config))
    return make(norm="zero_centred_rms", qk_norm=True, output_gate=True)


def delta_sizes(kinds: Sequence[Kind]) -> dict[str, int]:
    """Sizes of the gated delta nets by the names that rules use; {} without any. All layers that have one have the same."""
    found = {kind.delta for kind in kinds if kind.delta is not None}
    if not found:
        return {}
    (delta,) = found
    return {
        "delta_key_heads": delta.key_heads,
        "delta_heads": delta.heads,
        "delta_key_dim": delta.key_dim,
        "delta_value_dim": delta.value_dim,
        "delta_values": delta.heads * delta.value_dim,
        "delta_channels": delta.channels,
        "delta_width": delta.width,
        "delta_rows": delta.channels + delta.heads * delta.value_dim,
        "delta_rates": 2 * delta.heads,
        "one": 1,
    }


def by_key_head(sizes: Sizes, places: Sequence[tuple[int, int, int]]) -> Arrangement:
    """For each key head some rows of several parts, each of which lies in one piece of a Hugging Face tensor.

    Args:
        places: of each part the tensor, its first row there, and how many rows of it a key head has.
    """
    pieces: list[Piece] = []
    for head in range(sizes["delta_key_heads"]):
        for tensor, first, count in places:
            start = first + head * count
            if pieces and pieces[-1].tensor == tensor and pieces[-1].last == start:
                pieces[-1] = replace(pieces[-1], last=start + count)
            else:
                pieces.append(Piece(tensor, start, start + count))
    return Arrangement(tuple(pieces), (sum(piece.count for piece in pieces),))


def _widths(sizes: Sizes) -> tuple[int, int]:
    """Rows of a key head: of its key, and of its values."""
    return sizes["delta_key_dim"], sizes["delta_values"] // sizes["delta_key_heads"]


def _channels(sizes: Sizes) -> list[tuple[int, int, int]]:
    """Queries, keys and values one above the other in a tensor."""
    (key, value), keys = _widths(sizes), sizes["delta_key_heads"] * sizes["delta_key_dim"]
    return [(0, 0, key), (0, keys, key), (0, 2 * keys, value)]


def delta_rules(*projections: Rule) -> tuple[Rule, ...]:
    """The tensors of a gated delta net.

    Args:
        projections: `in_proj` and `in_proj_ba`, which folders hold in two ways.
    """
    convolution = Rule(
        _LAYER + "conv1d_weight",
        (_HF + "linear_attn.conv1d.weight",),
        lambda sizes: [(sizes["delta_channels"], 1, sizes["delta_width"])],
        lambda sizes: by_key_head(sizes, _channels(sizes)),
    )
    rules = (
        *projections,
        convolution,
        copy(_LAYER + "dt_bias", _HF + "linear_attn.dt_bias", ("delta_heads",), split=0),
        copy(_LAYER + "A_log", _HF + "linear_attn.A_log", ("delta_heads",), split=0),
        copy(_LAYER + "norm_weight", _HF + "linear_attn.norm.weight", ("delta_value_dim",)),
        copy(_LAYER + "out_proj.weight", _HF + "linear_attn.out_proj.weight", ("hidden", "delta_values"), split=1),
    )
    return tuple(replace(rule, layers=has_delta) for rule in rules)


def projections_apart() -> tuple[Rule, Rule]:
    """`in_proj` of folders that hold queries, keys and values in one tensor, and gates, rates and decays each in one of their own."""

    def shapes(sizes: Sizes) -> list[Shape]:
        return [(sizes["delta_channels"], sizes.hidden), (sizes["delta_values"], sizes.hidden)]

    def rows(sizes: Sizes) -> Arrangement:
        return by_key_head(sizes, [*_channels(sizes), (1, 0, _widths(sizes)[1])])

    def rates(sizes: Sizes) -> Arrangement:
        each = sizes["delta_heads"] // sizes["delta_key_heads"]
        return by_key_head(sizes, [(0, 0, each), (1, 0, each)])

    names = [f"{_HF}linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")]
    return (
        Rule(_LAYER + "in_proj.weight", (names[0], names[1]), shapes, rows),
        Rule(
            _LAYER + "in_proj_ba.weight", (names[2], names[3]), lambda sizes: [(sizes["delta_heads"], sizes.hidden)] * 2, rates
        ),
    )


def projections_by_key_head() -> tuple[Rule, Rule]:
    """`in_proj` of folders that hold two tensors, whose rows are grouped by key head already."""
    return (
        copy(_LAYER + "in_proj.weight", _HF + "linear_attn.in_proj_qkvz.weight", ("delta_rows", "hidden"), split=0),
        copy(_LAYER + "in_proj_ba.weight", _HF + "linear_attn.in_proj_ba.weight", ("delta_rates", "hidden"), split=0),
    )


def gated_attention_rules() -> tuple[Rule, ...]:
    """The tensors of attention whose folder holds for each head the rows of its query and those of its gate, one above the other."""
    names = tuple(f"{_HF}self_attn.{part}_proj.weight" for part in "qkv")

    def shapes(sizes: Sizes) -> list[Shape]:
        return [(2 * sizes["q_rows"], sizes.hidden), *[(sizes["kv_rows"], sizes.hidden)] * 2]

    def arrangement(sizes: Sizes) -> Arrangement:
        """For each key/value head the queries, the gates, key and value, as Megatron-Core's gated attention has them."""
        size, each, pieces = sizes.head_dim, sizes.heads // sizes.kv_heads, []
        for group in range(sizes.kv_heads):
            for part in range(2):
                starts = [(2 * (group * each + head) + part) * size for head in range(each)]
                pieces += [Piece(0, start, start + size) for start in starts]
            pieces += [Piece(tensor, group * size, (group + 1) * size) for tensor in (1, 2)]
        return Arrangement(tuple(pieces), (sum(piece.count for piece in pieces),))

    rules = (
        Rule(_LAYER + "linear_qkv.weight", names, shapes, arrangement),
        copy(_LAYER + "linear_proj.weight", _HF + "self_attn.o_proj.weight", ("hidden", "q_rows"), split=1),
        *(copy(f"{_LAYER}{one}_layernorm.weight", f"{_HF}self_attn.{one}_norm.weight", ("head_dim",)) for one in "qk"),
    )
    return tuple(replace(rule, layers=attends) for rule in rules)
