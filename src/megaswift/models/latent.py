"""Latent attention (DeepSeek): its sizes, the rules of its tensors, and the config fields that say what it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from megaswift.errors import UserError
from megaswift.models.kinds import Kind, Latent
from megaswift.models.rules import Rule, in_layer

LATENT_FIELDS = frozenset("q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim qk_head_dim".split())


def has_query_state(kind: Kind) -> bool:
    """Whether queries are made from a narrow state."""
    return kind.latent is not None and kind.latent.query is not None


def has_plain_query(kind: Kind) -> bool:
    """Whether queries are made from the layer's input."""
    return kind.latent is not None and kind.latent.query is None


def latent_sizes(kinds: Sequence[Kind], heads: int) -> dict[str, int]:
    """Sizes of latent attention by the names that rules use; {} without any. All layers have the same."""
    found = {kind.latent for kind in kinds if kind.latent is not None}
    if not found:
        return {}
    (latent,) = found
    return {
        "query_state": latent.query or 0,
        "key_value_state": latent.key_value,
        "key_value_down": latent.key_value + latent.turning,
        "latent_q_rows": heads * (latent.still + latent.turning),
        "latent_kv_rows": heads * (latent.still + latent.value),
        "latent_v_rows": heads * latent.value,
    }


def latent_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """A dense family's rules with latent attention in place of its own; names are those of Megatron-Core's latent attention.

    Rows stay as Hugging Face has them: Megatron-Core, too, brings features that rotate together to halves as it computes.
    """
    ours, theirs = "self_attention.", "self_attn."
    attention = (
        in_layer("input_layernorm.weight", "input_layernorm.weight", "hidden"),
        in_layer(
            ours + "linear_q_proj.weight", theirs + "q_proj.weight", "latent_q_rows", "hidden", split=0, layers=has_plain_query
        ),
        in_layer(
            ours + "linear_q_down_proj.weight", theirs + "q_a_proj.weight", "query_state", "hidden", layers=has_query_state
        ),
        in_layer(
            ours + "linear_q_up_proj.layer_norm_weight", theirs + "q_a_layernorm.weight", "query_state", layers=has_query_state
        ),
        in_layer(
            ours + "linear_q_up_proj.weight", theirs + "q_b_proj.weight", "latent_q_rows", "query_state", split=0,
            layers=has_query_state,
        ),
        in_layer(ours + "linear_kv_down_proj.weight", theirs + "kv_a_proj_with_mqa.weight", "key_value_down", "hidden"),
        in_layer(ours + "linear_kv_up_proj.layer_norm_weight", theirs + "kv_a_layernorm.weight", "key_value_state"),
        in_layer(ours + "linear_kv_up_proj.weight", theirs + "kv_b_proj.weight", "latent_kv_rows", "key_value_state", split=0),
        in_layer(ours + "linear_proj.weight", theirs + "o_proj.weight", "hidden", "latent_v_rows", split=1),
    )  # fmt: skip
    made: list[Rule] = []
    for rule in rules:
        if ".self_attention." not in rule.megatron:
            made.append(rule)
        elif rule.megatron.endswith(".linear_qkv.layer_norm_weight"):
            made += attention
    return tuple(made)


def latent_of(config: Any) -> Latent:
    """What a config says of it. Raises UserError for sizes that do not go together."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups != heads:
        raise UserError(
            f"num_key_value_heads = {groups} is not the number of attention heads, {heads}: keys and values are made for each head.",
            where="config.json: num_key_value_heads",
            fix=f"set it to {heads}",
        )
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.v_head_dim > width or config.qk_rope_head_dim % 2:
        raise UserError(
            f"values of {config.v_head_dim} features, and {config.qk_rope_head_dim} features that rotate, of {width} of a query are not supported.",
            where="config.json: v_head_dim, qk_rope_head_dim",
            fix="train this model elsewhere; nothing was converted",
        )
    return Latent(
        config.q_lora_rank,
        config.kv_lora_rank,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
        neighbours=bool(getattr(config, "rope_interleave", True)),
    )


def latent_settings(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """A decoder's settings with the width of a query, and the factor on the scores where yarn changes it.

    Where `mscale_all_dim` stands, scores are multiplied by (0.1 mscale_all_dim ln(factor) + 1)^2 beside 1 / sqrt(width), as
    transformers has it for every rotation but the default.
    """
    width, rope = config.qk_nope_head_dim + config.qk_rope_head_dim, config.rope_parameters
    scale = {}
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim"):
        grown = 1.0 if rope["factor"] <= 1 else 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0
        scale = {"softmax_scale": width**-0.5 * grown * grown}
    return settings | {"kv_channels": width} | scale


__all__ = ["LATENT_FIELDS", "latent_of", "latent_rules", "latent_settings", "latent_sizes"]
