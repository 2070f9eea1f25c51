"""Qwen3.5 with experts, text (35B-A3B to 397B-A17B): its layers with Qwen3-Next's experts in place of MLPs."""

from __future__ import annotations

from megaswift.models.delta import (
    DELTA_FIELDS,
    PUBLISHED_FIELDS,
    delta_rules,
    gated_attention_rules,
    kind_of,
    projections_apart,
)
from megaswift.models.experts import ROUTING_FIELDS, without_mlp
from megaswift.models.families.qwen3_5_text import OUTSIDE_ATTENTION, TEXT_ONLY
from megaswift.models.families.qwen3_next import EXPERT_RULES, experts_of
from megaswift.models.family import LINEAR_TYPES, Family, decoder_settings

QWEN3_5_MOE_TEXT = Family(
    name="qwen3_5_moe_text",
    hf_types=("qwen3_5_moe_text",),
    rules=without_mlp(OUTSIDE_ATTENTION) + gated_attention_rules() + delta_rules(*projections_apart()) + EXPERT_RULES,
    settings=decoder_settings,
    kind=lambda config, layer: kind_of(config, layer, experts_of(config)),
    partial_rotary=True,
    stacked_experts=True,
    layer_types=LINEAR_TYPES,
    neutral_rotation=TEXT_ONLY,
    ahead=lambda config: ("mtp.*",),
    extra_fields=DELTA_FIELDS | PUBLISHED_FIELDS | (ROUTING_FIELDS - {"norm_topk_prob"}) | {"shared_expert_intermediate_size"},
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=131,
        max_position_embeddings=256,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    ),
)
